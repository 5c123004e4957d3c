"""DAPO: the batch is full of groups that differ in the task, whatever the lengths; length counts model tokens only."""

from __future__ import annotations

import logging

import pytest
import torch
from datasets import Dataset

from tests.ranks import run_on_ranks
from tests.trainers.preference_scenario import expert_lora, policy
from tests.trainers.rl_scenario import PROMPTS, make_trainer, train
from tests.trainers.test_dpo import assert_same_run
from xtuner_hf import MoEDAPOConfig, MoEDAPOTrainer

KERNEL = {"experts_kernel": "reference", "engine": {}}


def solved_half(prompts, completions, **_) -> list[float]:
    """Prompts with '=' have answers of two kinds; all answers to the others are right."""
    return [float(len(text) % 2) if "=" in prompt else 1.0 for prompt, text in zip(prompts, completions, strict=True)]


def trainer_of(tmp_path, reward=solved_half, engine=None, **settings):
    return make_trainer(
        MoEDAPOTrainer, MoEDAPOConfig, str(tmp_path), reward=reward, **(KERNEL | {"engine": engine or {}} | settings)
    )


def sampled(trainer, prompts: tuple[str, ...]) -> dict:
    trainer.model.train()
    return trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts for _ in range(4)])


def test_the_papers_defaults(tmp_path):
    config = MoEDAPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert (config.loss_type, config.epsilon, config.epsilon_high, config.beta) == ("dapo", 0.2, 0.28, 0.0)
    assert config.dynamic_sampling
    assert config.soft_overlong_fraction == 4096 / 20480


def test_the_batch_is_filled_with_groups_that_differ(tmp_path):
    """'say hi' has no group that differs in the task, though its answers differ in length and thus in the reward."""
    trainer, _, engine = trainer_of(tmp_path, soft_overlong_fraction=1.0)
    batch = sampled(trainer, ("say hi", "3+5="))
    assert len(engine.calls) > 1
    assert len(batch["prompt_ids"]) == 8
    prompts = trainer.processing_class.batch_decode(batch["prompt_ids"], skip_special_tokens=True)
    assert prompts[:4] == ["3+5="] * 4  # the first that differs comes first
    assert all("=" in prompt for prompt in prompts)
    assert (batch["advantages"].view(2, 4).std(1) > 0).all()
    assert batch["num_items_in_batch"] == batch["completion_mask"].sum()
    metrics = trainer._metrics["train"]
    assert metrics["dynamic_sampling/filled"] == [1.0]
    assert metrics["dynamic_sampling/rounds"] == [len(engine.calls)]


def test_what_is_missing_in_the_end_does_not_train(tmp_path, caplog):
    prompts = Dataset.from_list([{"prompt": "say hi"}, {"prompt": "what?"}])
    trainer, _, engine = trainer_of(tmp_path, dynamic_sampling_max_rounds=3, train_dataset=prompts)
    with caplog.at_level(logging.WARNING):
        batch = sampled(trainer, ("say hi", "3+5="))
    assert len(engine.calls) == 3
    assert "found 1 of 2 groups whose answers differ in the reward after 3 rounds" in caplog.text
    assert batch["completion_mask"].sum(1).view(2, 4).bool().tolist() == [[True] * 4, [False] * 4]
    assert (batch["advantages"][4:] == 0).all()
    assert batch["num_items_in_batch"] == batch["completion_mask"][:4].sum()
    assert trainer._metrics["train"]["dynamic_sampling/filled"] == [0.5]


def test_the_metric_may_be_one_reward_function(tmp_path):
    def style(completions, **_):
        return [float(index) for index in range(len(completions))]

    trainer, _, engine = trainer_of(tmp_path, [solved_half, style], dynamic_sampling_metric="style")
    sampled(trainer, ("say hi", "what?"))
    assert len(engine.calls) == 1
    trainer, _, engine = trainer_of(tmp_path, [solved_half, style], dynamic_sampling_metric="solved_half")
    sampled(trainer, ("say hi", "what?"))
    assert len(engine.calls) > 1
    with pytest.raises(ValueError, match="metric is 'taste'; the reward functions are solved_half, style"):
        trainer_of(tmp_path, [solved_half, style], dynamic_sampling_metric="taste")


def test_evaluation_does_not_choose(tmp_path):
    trainer, _, engine = trainer_of(tmp_path)
    trainer.model.eval()
    trainer._generate_and_score_completions([{"prompt": "say hi"}] * 4)
    assert len(engine.calls) == 1


def test_the_overlong_punishment_counts_what_the_model_wrote(tmp_path):
    settings = {"soft_overlong_fraction": 1.0, "dynamic_sampling": False}
    trainer, _, _ = trainer_of(tmp_path, engine={"tool_tokens": True}, **settings)
    batch = sampled(trainer, ("3+5=", "12+9="))
    written = (batch["completion_mask"] * batch["tool_mask"]).sum(1)
    assert (written < batch["completion_mask"].sum(1)).any()
    expected = -written.float() / 12
    assert trainer.reward_func_names[-1] == "soft_overlong_penalty"
    assert torch.allclose(trainer._rewards_per_func[:, -1], expected)


def test_overlong_filtering_is_trls(tmp_path):
    trainer, _, _ = trainer_of(tmp_path, mask_truncated_completions=True, dynamic_sampling=False)
    batch = sampled(trainer, ("3+5=", "12+9="))
    assert (batch["completion_mask"].sum(1) == 0).tolist() == [index % 4 == 3 for index in range(8)]


def test_a_run_on_one_process():
    """Whole groups on each rank, so that the accumulation may be anything; refills depend on the step alone."""
    runs = [
        train("MoEDAPOTrainer", reward=solved_half, steps=3, **KERNEL, **split)
        for split in ({}, {"batch": 4, "accumulation": 2})
    ]
    assert_same_run(runs[1], runs[0])
    assert runs[0]["logs"][0]["dynamic_sampling/filled"] == 1.0


def test_two_processes_without_refill():
    """Clip-higher, the mean over tokens and the overlong punishment do not depend on the ranks."""
    settings = KERNEL | {"kind": "MoEDAPOTrainer", "dynamic_sampling": False, "soft_overlong_fraction": 0.5}
    adapted = settings | {"peft_config": expert_lora(), "optim": "sgd", "learning_rate": 0.1}
    whole = [train(**run) for run in (settings, adapted)]
    runs = [run | {"batch": 2, "accumulation": 2, "ep_size": 2} for run in (settings, adapted)]
    for results in run_on_ranks("tests.trainers.rl_scenario:train_all", 2, runs=runs):
        for found, expected in zip(results, whole, strict=True):
            assert_same_run(found, expected)


def test_two_processes():
    """Ranks sample equally often, and each fills its part; token counts are those of both."""
    settings = {"kind": "MoEDAPOTrainer", "reward": solved_half, "steps": 2, "batch": 4, "ep_size": 2} | KERNEL
    shared = settings | {"accumulation": 2, "sp_size": 2}
    first, second = run_on_ranks("tests.trainers.rl_scenario:train_all", 2, runs=[settings, shared])
    whole = train(**settings | {"batch": 8, "ep_size": 1})
    for run in (first[1], second[1]):  # one batch, which both have a half of
        assert_same_run(run, whole)
        assert run["calls"] == whole["calls"]
        assert run["logs"][0]["dynamic_sampling/filled"] == 1.0
    assert len(first[0]["calls"]) == len(second[0]["calls"]) > 2
    assert {prompt for call in first[0]["calls"] + second[0]["calls"] for prompt in call} > set(PROMPTS[:2])
    for name, tensor in first[0]["state"].items():
        assert torch.equal(tensor, second[0]["state"][name])
    assert any(not torch.equal(t, policy(0).state_dict()[n].double()) for n, t in first[0]["state"].items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"soft_overlong_fraction": 2.0}, "soft_overlong_fraction is 2.0; it must be between 0 and 1"),
        ({"dynamic_sampling_max_rounds": 0}, "dynamic_sampling_max_rounds is 0; it must be 1 or more"),
        ({"per_device_train_batch_size": 6, "generation_batch_size": 24, "num_generations": 8}, None),
        ({"per_device_train_batch_size": 4, "steps_per_generation": 3, "num_generations": 4}, None),
    ],
)
def test_settings(settings, message, tmp_path):
    values = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False} | settings
    if message is None:
        MoEDAPOConfig(**values)
        return
    with pytest.raises(ValueError, match=message):
        MoEDAPOConfig(**values)
