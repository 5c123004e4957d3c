"""A run goes on elsewhere: from two NPUs to one, to the CPU, and back; what it exports is the same model everywhere."""

from __future__ import annotations

import pytest
import torch

from tests.npu.ranks import run_on_npus
from tests.trainers import resume_scenario
from xtuner_hf import Qwen3MoeForCausalLM

TRAIN = "tests.trainers.resume_scenario:train"
# An eps above rounding: AdamW divides gradients by their size, and would make steps of lr of errors.
OPTIONS = {"no_dropout": True, "save_steps": 2, "max_steps": 8, "experts_kernel": "grouped_mm", "adam_epsilon": 1e-5}


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max((found[name] - expected[name]).abs().max().item() for name in expected)


def test_two_npus_then_one_then_the_cpu_then_two(tmp_path):
    reference = resume_scenario.train(str(tmp_path / "one"), **OPTIONS)
    options = OPTIONS | {"output_dir": str(tmp_path / "many"), "resume": "auto"}
    on_two = {"use_cpu": False, "ep_size": 2, "per_device_train_batch_size": 2}
    runs = [
        run_on_npus(TRAIN, 2, stop_after=2, **(options | on_two))[0],
        resume_scenario.train(**(options | {"stop_after": 4, "use_cpu": False})),
        resume_scenario.train(**(options | {"stop_after": 6, "use_cpu": True})),
        run_on_npus(TRAIN, 2, export_to=str(tmp_path / "exported"), **(options | on_two))[0],
    ]
    losses = {step: loss for run in runs for step, loss in run["losses"].items()}
    assert sorted(losses) == list(range(1, 9))
    for step, loss in losses.items():
        assert loss == pytest.approx(reference["losses"][step], rel=1e-5)
    assert worst(runs[-1]["state"], reference["state"]) < 2e-5
    exported = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "exported")
    assert worst({n: t.double() for n, t in exported.state_dict().items()}, runs[-1]["state"]) == 0


def test_the_same_layout_is_equal_to_the_last_bit(tmp_path):
    """With dropout, whose random numbers are the NPU's own: the checkpoint holds their state."""
    options = {"output_dir": str(tmp_path), "use_cpu": False, "experts_kernel": "grouped_mm"}
    options["config"] = {"attention_dropout": 0.0}
    reference = resume_scenario.train(**options)
    run = resume_scenario.train(**(options | {"resume": f"{tmp_path}/checkpoint-3"}))
    assert sorted(run["losses"]) == [4, 5, 6]
    assert run["losses"] == {step: reference["losses"][step] for step in run["losses"]}
    assert worst(run["state"], reference["state"]) == 0
