"""MPO: the formula with its running shift, whatever the split, and through a checkpoint."""

from __future__ import annotations

import pytest
from datasets import Dataset

from tests.ranks import run_on_ranks
from tests.trainers.preference_scenario import (
    expert_lora,
    make_trainer,
    pairs,
    policy,
    reference_losses,
    run_quickly,
    train,
)
from tests.trainers.test_dpo import TOLERANCE, assert_same_run, gradients, worst
from xtuner_hf import MoEMPOConfig, MoEMPOTrainer

KERNEL = {"experts_kernel": "reference"}


@pytest.fixture(scope="module")
def whole() -> dict:
    return train("MoEMPOTrainer", steps=3, **KERNEL)


def test_loss_and_gradients_are_the_formula(tolerance):
    """The shift of the first step is the mean of its own rewards, as InternVL's running moments have it."""
    run = train("MoEMPOTrainer", batch=4, accumulation=2, steps=1, num_rows=8, max_grad_norm=0.0, **KERNEL)
    model, ref_model = policy(0), policy(1)
    shift = reference_losses(model, ref_model, pairs(8), beta=0.3, shift=0.0)["rewards"].item()
    assert abs(shift) > 0.1
    terms = reference_losses(model, ref_model, pairs(8), beta=0.3, shift=shift)
    loss = 0.8 * terms["sigmoid"] + 0.2 * terms["bco_pair"] + 1.0 * terms["sequence"]
    assert run["shifts"] == [pytest.approx(shift, rel=TOLERANCE)]
    assert run["logs"][0]["loss"] == pytest.approx(loss.item(), rel=TOLERANCE)
    assert worst(run["grads"][0], gradients(loss, model)) < max(tolerance, 5e-7)  # rewards are added up in fp32


def test_the_shift_is_the_mean_over_the_steps_so_far(whole):
    """InternVL's trace: the plain cumulative mean of each batch's mean reward, the present one included."""
    means = [(log["rewards/chosen"] + log["rewards/rejected"]) / 2 for log in whole["logs"]]
    expected = [sum(means[: step + 1]) / (step + 1) for step in range(3)]
    assert whole["shifts"] == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize(
    "split",
    [{"batch": 2, "accumulation": 4}, {"batch": 1, "accumulation": 8, "gradient_checkpointing": True}],
    ids=["accumulation", "single pairs, recompute"],
)
def test_one_process(split, whole):
    run = train("MoEMPOTrainer", steps=3, **KERNEL, **split)
    assert run["shifts"] == pytest.approx(whole["shifts"], rel=TOLERANCE)
    assert_same_run(run, whole)


def test_accumulation_with_a_switch_loss_shares_its_extra_pass():
    balance = KERNEL | {"router_aux_loss_coef": 0.05}
    run = train("MoEMPOTrainer", batch=2, accumulation=4, **balance)
    assert_same_run(run, train("MoEMPOTrainer", **balance))


def test_two_processes(whole):
    splits = [{"batch": 4, "ep_size": 1}, {"batch": 2, "accumulation": 2, "ep_size": 2}]
    splits += [{"batch": 4, "accumulation": 2, "sp_size": 2}]
    runs = [{"kind": "MoEMPOTrainer", "steps": 3} | KERNEL | split for split in splits]
    adapted = KERNEL | {"kind": "MoEMPOTrainer", "ref_model": None, "peft_config": expert_lora()}
    adapted |= {"optim": "sgd", "learning_rate": 0.1}
    runs += [adapted | splits[1], adapted | splits[2]]
    expectations = [whole] * len(splits) + [train(**adapted)] * 2
    for results in run_on_ranks("tests.trainers.preference_scenario:train_all", 2, runs=runs):
        for run, expected in zip(results, expectations, strict=True):
            assert run["shifts"] == pytest.approx(expected["shifts"], rel=TOLERANCE, abs=1e-6)
            assert_same_run(run, expected)


def test_a_resumed_run_goes_on_with_the_shift():
    settings = KERNEL | {"steps": 3, "lr_scheduler_type": "constant"}
    reference = train("MoEMPOTrainer", **settings)
    resumed = train("MoEMPOTrainer", resume_at=2, **settings)
    assert resumed["shifts"] == pytest.approx(reference["shifts"], rel=1e-6)
    assert resumed["logs"][-1]["loss"] == pytest.approx(reference["logs"][-1]["loss"], rel=1e-6)


def test_a_resumed_run_on_two_processes(tmp_path):
    """With expert parallelism: the shift, the weights and the optimizer go on where they were."""
    settings = KERNEL | {"kind": "MoEMPOTrainer", "steps": 3, "lr_scheduler_type": "constant"}
    reference = train(**settings)
    run = settings | {"batch": 2, "accumulation": 2, "ep_size": 2, "resume_at": 2, "folder": str(tmp_path)}
    for (resumed,) in run_on_ranks("tests.trainers.preference_scenario:train_all", 2, runs=[run]):
        assert resumed["shifts"] == pytest.approx(reference["shifts"], rel=1e-6)
        assert resumed["logs"][-1]["loss"] == pytest.approx(reference["logs"][-1]["loss"], rel=1e-6)
        assert worst(resumed["grads"][-1], reference["grads"][-1]) < 1e-5


def test_lagged_and_no_shift():
    means = None
    for name in ("lagged", "none"):
        run = train("MoEMPOTrainer", batch=2, accumulation=4, reward_shift=name, **KERNEL)
        means = [(log["rewards/chosen"] + log["rewards/rejected"]) / 2 for log in run["logs"]]
        expected = [0.0, means[0]] if name == "lagged" else [0.0, 0.0]
        assert run["shifts"] == pytest.approx(expected, rel=TOLERANCE)


def test_without_shift_it_is_trls_bco():
    """TRL's 'bco_pair', through MoEDPOTrainer, which leaves it to TRL."""
    settings = KERNEL | {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2]}
    ours = train("MoEMPOTrainer", reward_shift="none", **settings)
    assert_same_run(ours, train("MoEDPOTrainer", **settings))


def test_evaluation_uses_the_shift_and_leaves_it_alone(tmp_path):
    trainer, _ = make_trainer(MoEMPOTrainer, MoEMPOConfig, str(tmp_path), batch=8, accumulation=1, steps=1, **KERNEL)
    run_quickly(trainer)
    before = trainer._shift.value
    metrics = trainer.evaluate(Dataset.from_list(pairs(8, seed=1)))
    assert before != 0
    assert trainer._shift.value == before
    assert metrics["eval_rewards/shift"] == before
