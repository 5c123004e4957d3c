"""SFT, DPO and GRPO on an NPU give what they give on the CPU; LoRA on experts does over two NPUs."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.npu.ranks import run_on_npus
from tests.parallel import lora
from tests.trainers import preference_scenario, rl_scenario, scenario
from tests.trainers.scenario import differences

ON_NPU = {"use_cpu": False}
# An eps above rounding: AdamW divides gradients by their size, and would make steps of lr of errors.
COMMON = {"experts_kernel": "grouped_mm", "adam_epsilon": 1e-5}


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """It remembers the device of the trainer before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def both(train, calls, **options) -> tuple[dict, dict]:
    """The run on the NPU, with fused operators, and the one on the CPU."""
    found = train(**(options | ON_NPU))
    assert calls["npu_grouped_matmul"]
    assert calls["npu_fusion_attention_grad"]
    AcceleratorState._reset_state(reset_partial_state=True)
    return found, train(**options)


def test_packed_sft(calls):
    options = {"trainer_kind": "MoESFTTrainer", "packed": True, "dtype": torch.float32} | COMMON
    found, expected = both(scenario.train, calls, **options)
    worst = differences(found, expected)
    assert max(worst.values()) < 1e-5, worst


def test_bf16_with_every_layer_recomputed_selectively(calls):
    options = {"dtype": torch.float32, "bf16": True, "recompute": "selective", "steps": 1} | COMMON
    found = scenario.train(**(options | ON_NPU))
    # Attention is kept and not computed again; three layers, one step.
    assert calls["npu_fusion_attention"] == calls["npu_fusion_attention_grad"] == 3
    expected = scenario.train(**(options | {"recompute": "none"} | ON_NPU))
    assert found["logs"][0]["loss"] == expected["logs"][0]["loss"]
    assert all(torch.equal(grad, expected["grads"][0][name]) for name, grad in found["grads"][0].items())


def test_layer_inputs_and_optimizer_states_that_wait_on_the_host(calls):
    options = {"dtype": torch.float32, "steps": 2, "max_grad_norm": 0} | COMMON | ON_NPU
    waiting = {
        "recompute": "full",
        "activation_offload": True,
        "optimizer_offload": True,
        "optimizer_in_backward": True,
    }
    found, expected = scenario.train(**(options | waiting)), scenario.train(**options)
    assert max((found["state"][name] - expected["state"][name]).abs().max() for name in expected["state"]) < 1e-6


def policies() -> dict:
    return {name: preference_scenario.policy(seed, torch.float32) for seed, name in enumerate(("model", "ref_model"))}


def test_dpo(calls):
    def train(**options):
        return preference_scenario.train("MoEDPOTrainer", **policies(), **options)

    found, expected = both(train, calls, **COMMON)
    for key in ("loss", "grad_norm", "rewards/margins"):
        for ours, theirs in zip(found["logs"], expected["logs"], strict=True):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key


def test_grpo_with_an_engine(calls):
    def train(**options):
        return rl_scenario.train(model=policies()["model"], engine={}, **options)

    found, expected = both(train, calls, **COMMON)
    for ours, theirs in zip(found["logs"], expected["logs"], strict=True):
        assert ours["reward"] == theirs["reward"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    for ours, theirs in zip(found["grads"], expected["grads"], strict=True):
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5 * max(theirs[name].abs().max(), 1))


def test_grpo_whose_model_samples_on_the_npu():
    run = rl_scenario.train(model=policies()["model"], engine=None, **(COMMON | ON_NPU))
    assert all(math.isfinite(log["grad_norm"]) for log in run["logs"])


def test_lora_on_experts_over_two_npus(tmp_path):
    layouts = [{"ep_size": size} | COMMON | ON_NPU for size in (1, 2)]
    runs = run_on_npus("tests.parallel.lora:run_layouts", 2, folder=str(tmp_path / "npu"), layouts=layouts)[0]
    expected = lora.train(str(tmp_path / "cpu"), **COMMON)
    for run in runs:
        for step, loss in run["losses"].items():
            assert loss == pytest.approx(expected["losses"][step], rel=1e-5)
        for name, factor in run["adapter"].items():
            # Four steps of lr 1e-2.
            torch.testing.assert_close(factor, expected["adapter"][name], rtol=0, atol=4e-5)


def test_float64_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match=r"float64, which npu devices do not compute in.*dtype='float32'"):
        scenario.train(dtype=torch.float64, **ON_NPU)
