"""DPO: TRL's numbers, the formula's numbers, and the same numbers however the step is split."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from tests.ranks import run_on_ranks
from tests.rl.toy import char_tokenizer
from tests.trainers.exact_head import EXACT_TOLERANCE, KERNEL_TOLERANCE
from tests.trainers.preference_scenario import (
    expert_lora,
    make_trainer,
    pairs,
    policy,
    reference_losses,
    run_quickly,
    train,
)
from xtuner_hf import MoEDPOConfig, MoEDPOTrainer, MoEMPOConfig

# fp64 models, but TRL's kernel returns log-probabilities in fp32: up to 1.5e-6 of a gradient's largest entry.
TOLERANCE = KERNEL_TOLERANCE


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(((found[k] - expected[k]).abs().max() / expected[k].abs().max().clamp(min=1e-9)).item() for k in found)


def gradients(loss: torch.Tensor, model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_run(run: dict, reference: dict, tolerance: float = TOLERANCE) -> None:
    for log, expected in zip(run["logs"], reference["logs"], strict=True):
        assert log["loss"] == pytest.approx(expected["loss"], rel=tolerance)
        assert log["grad_norm"] == pytest.approx(expected["grad_norm"], rel=tolerance)
    for found, expected in zip(run["grads"], reference["grads"], strict=True):
        assert worst(found, expected) < tolerance


@pytest.mark.parametrize(
    ("losses", "weights", "reduction"),
    [
        (["sigmoid"], [1.0], "token"),
        (["sigmoid", "sft"], [0.7, 1.5], "token"),
        (["sigmoid", "sft"], [0.7, 1.5], "sequence"),
        (["sft"], [1.0], "token"),
    ],
)
def test_loss_and_gradients_are_the_formula(losses, weights, reduction, tolerance):
    run = train(
        batch=2,
        accumulation=4,
        steps=1,
        num_rows=8,
        max_grad_norm=0.0,
        experts_kernel="reference",
        loss_type=losses,
        loss_weights=weights,
        sft_reduction=reduction,
    )
    model = policy(0)
    terms = reference_losses(model, policy(1), pairs(8), beta=0.3, shift=0.0)
    loss = sum(
        weight * terms[reduction if name == "sft" else name] for name, weight in zip(losses, weights, strict=True)
    )
    assert run["logs"][0]["loss"] == pytest.approx(loss.item(), rel=TOLERANCE)
    assert worst(run["grads"][0], gradients(loss, model)) < tolerance


@pytest.mark.usefixtures("exact_head")
@pytest.mark.parametrize("losses", [["sigmoid"], ["ipo", "nca_pair"], ["sigmoid", "bco_pair", "sft"]])
def test_equals_trl(losses, tmp_path):
    """One micro-batch a step, where TRL's means over micro-batches are means over the step."""
    settings = {"batch": 8, "accumulation": 1, "steps": 2, "loss_type": losses}
    runs = []
    for kind, config, extra in (
        (DPOTrainer, DPOConfig, {}),
        (MoEDPOTrainer, MoEDPOConfig, {"experts_kernel": "reference"}),
    ):
        trainer, recorder = make_trainer(kind, config, str(tmp_path / kind.__name__), **settings, **extra)
        run_quickly(trainer)
        runs.append({"logs": recorder.logs, "grads": recorder.grads})
    assert_same_run(runs[1], runs[0], EXACT_TOLERANCE)
    for name in ("rewards/margins", "logps/chosen", "entropy", "logits/rejected"):
        assert runs[1]["logs"][1][name] == pytest.approx(runs[0]["logs"][1][name], rel=1e-6)


BALANCED = {"router_aux_loss_coef": 0.05, "router_z_loss_coef": 0.01, "experts_kernel": "reference"}


@pytest.fixture(scope="module")
def whole() -> dict:
    return train(loss_type=["sigmoid", "sft"], **BALANCED)


@pytest.mark.parametrize(
    "split",
    [
        {"batch": 2, "accumulation": 4},
        {"batch": 4, "accumulation": 2, "gradient_checkpointing": True},
        {"batch": 3, "accumulation": 3, "num_rows": 8, "steps": 1},
    ],
    ids=["accumulation", "recompute", "unequal micro-batches"],
)
def test_one_process(split, whole):
    reference = (
        whole if "num_rows" not in split else train(steps=1, num_rows=8, loss_type=["sigmoid", "sft"], **BALANCED)
    )
    assert_same_run(train(loss_type=["sigmoid", "sft"], **BALANCED, **split), reference)


def test_two_processes(whole):
    splits = [{"batch": 4, "ep_size": 1}, {"batch": 2, "accumulation": 2, "ep_size": 2}]
    # Adapters off are the reference; pairs of which two ranks have half of each answer.
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=4)
    adapted = {"peft_config": lora, "ref_model": None, "evaluate": True, "per_device_eval_batch_size": 4}
    splits += [split | {"batch": 4, "accumulation": 2, "sp_size": 2} for split in ({}, adapted)]
    runs = [{"loss_type": ["sigmoid", "sft"]} | BALANCED | split for split in splits]
    # Adapters of experts start at 0, and so do gradients of half of them, of which AdamW would make any rounding a
    # whole step.
    experts = {"ref_model": None, "peft_config": expert_lora(), "experts_kernel": "reference"}
    experts |= {"optim": "sgd", "learning_rate": 0.1}
    runs.append(experts | {"batch": 2, "accumulation": 2, "ep_size": 2})
    with_adapters = train(loss_type=["sigmoid", "sft"], **BALANCED, **adapted)
    with_experts = train(**experts)
    assert with_experts["logs"][1]["loss"] < math.log(2) - 1e-4  # it has moved
    function = "tests.trainers.preference_scenario:train_all"
    for *results, of_adapters, of_experts in run_on_ranks(function, 2, runs=runs):
        for run in results:
            assert_same_run(run, whole)
        assert_same_run(of_adapters, with_adapters)
        assert of_adapters["evaluated"] == pytest.approx(with_adapters["evaluated"], rel=1e-6)
        assert_same_run(of_experts, with_experts, 1e-6)


def test_the_reference_is_sharded_as_the_policy_is():
    for layout in run_on_ranks("tests.trainers.preference_scenario:reference_layout", 2, ep_size=2):
        assert layout["sharded"] == [True, True, True]
        assert layout["experts"] == layout["policy_experts"] == (4, 64, 48)
        assert not layout["trains"]


def test_adapters_off_are_the_reference_and_the_load_is_counted_once(tmp_path):
    trainer, recorder = make_trainer(
        MoEDPOTrainer,
        MoEDPOConfig,
        str(tmp_path),
        batch=8,
        accumulation=1,
        steps=2,
        ref_model=None,
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=True),
        **BALANCED,
    )
    run_quickly(trainer)
    assert trainer.ref_model is None
    assert recorder.logs[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert recorder.logs[1]["loss"] != pytest.approx(math.log(2), rel=1e-4)
    pairs_of_tokens_and_experts = trainer._balance.metrics().load_LE.sum(1)
    assert pairs_of_tokens_and_experts.tolist() == [2 * int(trainer._totals[0])] * 2


def test_reference_log_probabilities_may_be_computed_before(whole, tmp_path):
    run = train(loss_type=["sigmoid", "sft"], precompute_ref_log_probs=True, **BALANCED)
    assert_same_run(run, whole)


def test_positional_arguments_are_trls(tmp_path):
    args = MoEDPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False)
    ref_model = policy(1)
    trainer = MoEDPOTrainer(policy(0), ref_model, args, None, Dataset.from_list(pairs(2)), None, char_tokenizer())
    assert trainer.ref_model is ref_model


def test_settings_that_cannot_be(tmp_path):
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    with pytest.raises(ValueError, match="sft_reduction is 'mean'; choose 'token' or 'sequence'"):
        MoEDPOConfig(sft_reduction="mean", **settings)
    with pytest.raises(ValueError, match="MPO is not defined with ld_alpha"):
        MoEMPOConfig(ld_alpha=0.5, **settings)
    with pytest.raises(ValueError, match="reward_shift is 'mean'; choose 'running', 'lagged' or 'none'"):
        MoEMPOConfig(reward_shift="mean", **settings)
    with pytest.raises(TypeError, match="MoEDPOTrainer needs its own arguments class, got DPOConfig"):
        MoEDPOTrainer(policy(0), args=DPOConfig(**settings))
