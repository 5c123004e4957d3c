"""The same optimizer steps however the global batch is split: accumulation, packing, recompute, ranks, EP.

All runs train on the same 8 rows a step, with very different numbers of labels, and all balance terms on. fp64 weights,
so that what is compared is the method; the router's softmax stays fp32 by design, hence 1e-6.
"""

from __future__ import annotations

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.trainers.scenario import differences

TOLERANCE = 1e-6


RUNS = "tests.trainers.scenario:train_each"

ONE_PROCESS = {
    "accumulation": {"batch": 2, "accumulation": 4},
    "packed": {"packed": True},
    "packed and padded": {"packed": True, "pad_to_multiple_of": 64},
    "recompute": {"gradient_checkpointing": True},
    "all of them": {"batch": 1, "accumulation": 8, "packed": True, "gradient_checkpointing": True},
    "SFT": {"trainer_kind": "MoESFTTrainer"},
    "SFT packed": {"trainer_kind": "MoESFTTrainer", "batch": 2, "accumulation": 4, "packed": True},
}
SPLITS = {
    "plain": {"batch": 4},
    "accumulated, packed, recomputed": {
        "batch": 1,
        "accumulation": 4,
        "packed": True,
        "gradient_checkpointing": True,
    },
    "SFT": {"trainer_kind": "MoESFTTrainer", "batch": 2, "accumulation": 2, "packed": True},
}
TWO_PROCESSES = {
    f"{name}, EP {ep_size}": {**split, "ep_size": ep_size} for name, split in SPLITS.items() for ep_size in (1, 2)
}
FP32 = {"ep_size": 2, "batch": 2, "accumulation": 2, "dtype": torch.float32, "experts_kernel": "auto"}


@pytest.fixture(scope="module")
def alone() -> dict[str, dict]:
    """What one process makes of each split, and "reference" of none."""
    found = run_on_ranks(RUNS, 1, runs=[{}, *ONE_PROCESS.values()])[0]
    return dict(zip(["reference", *ONE_PROCESS], found, strict=True))


@pytest.fixture(scope="module")
def on_two_ranks() -> list[dict[str, dict]]:
    """The same of each of two processes."""
    ranks = run_on_ranks(RUNS, 2, runs=[*TWO_PROCESSES.values(), FP32])
    return [dict(zip([*TWO_PROCESSES, "fp32"], found, strict=True)) for found in ranks]


def assert_same(run: dict, reference: dict, tolerance: float = TOLERANCE) -> None:
    found = differences(run, reference)
    assert max(found.values()) < tolerance, found


@pytest.mark.parametrize("split", ONE_PROCESS)
def test_one_process(split, alone):
    assert_same(alone[split], alone["reference"])


@pytest.mark.parametrize("split", TWO_PROCESSES)
def test_two_processes(split, on_two_ranks, alone):
    for rank in on_two_ranks:
        assert_same(rank[split], alone["reference"])


def test_fp32_with_grouped_mm(on_two_ranks, alone):
    """The default dtype and kernel: fp32 rounding, some 1e-5 on parameters whose gradient nearly cancels."""
    run = on_two_ranks[0]["fp32"]
    assert_same(run, alone["reference"], 2e-4)
    assert differences(run, alone["reference"])["loss"] < 2e-6


def test_equal_runs_are_equal_to_the_last_bit():
    split = {"dtype": torch.float32, "experts_kernel": "auto", "steps": 4}
    runs = [run_on_ranks("tests.trainers.scenario:train", 1, **split)[0] for _ in range(2)]
    assert [log["loss"] for log in runs[0]["logs"]] == [log["loss"] for log in runs[1]["logs"]]
    assert all(torch.equal(runs[0]["state"][name], tensor) for name, tensor in runs[1]["state"].items())
