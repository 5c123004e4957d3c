"""The same optimizer steps however the global batch is split: accumulation, packing, recompute, ranks, EP.

All runs train on the same 8 rows a step, with very different numbers of labels, and all balance terms on. fp64 weights,
so that what is compared is the method; the head's and the router's softmax stay fp32 by design, hence 1e-6.
"""

from __future__ import annotations

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.trainers.scenario import differences

TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def reference() -> dict:
    return run_on_ranks("tests.trainers.scenario:train", 1)[0]


def assert_same(run: dict, reference: dict, tolerance: float = TOLERANCE) -> None:
    found = differences(run, reference)
    assert max(found.values()) < tolerance, found


@pytest.mark.parametrize(
    "split",
    [
        pytest.param({"batch": 2, "accumulation": 4}, id="accumulation"),
        pytest.param({"packed": True}, id="packed"),
        pytest.param({"packed": True, "pad_to_multiple_of": 64}, id="packed and padded"),
        pytest.param({"gradient_checkpointing": True}, id="recompute"),
        pytest.param({"batch": 1, "accumulation": 8, "packed": True, "gradient_checkpointing": True}, id="all of them"),
        pytest.param({"trainer_kind": "MoESFTTrainer"}, id="SFT"),
        pytest.param({"trainer_kind": "MoESFTTrainer", "batch": 2, "accumulation": 4, "packed": True}, id="SFT packed"),
    ],
)
def test_one_process(split, reference):
    assert_same(run_on_ranks("tests.trainers.scenario:train", 1, **split)[0], reference)


@pytest.mark.parametrize("ep_size", [1, 2])
@pytest.mark.parametrize(
    "split",
    [
        pytest.param({"batch": 4}, id="plain"),
        pytest.param(
            {"batch": 1, "accumulation": 4, "packed": True, "gradient_checkpointing": True},
            id="accumulated, packed, recomputed",
        ),
        pytest.param({"trainer_kind": "MoESFTTrainer", "batch": 2, "accumulation": 2, "packed": True}, id="SFT"),
    ],
)
def test_two_processes(ep_size, split, reference):
    runs = run_on_ranks("tests.trainers.scenario:train", 2, ep_size=ep_size, **split)
    for run in runs:
        assert_same(run, reference)


def test_fp32_with_grouped_mm(reference):
    """The default dtype and kernel: fp32 rounding, some 1e-5 on parameters whose gradient nearly cancels."""
    runs = run_on_ranks(
        "tests.trainers.scenario:train",
        2,
        ep_size=2,
        batch=2,
        accumulation=2,
        dtype=torch.float32,
        experts_kernel="auto",
    )
    assert_same(runs[0], reference, 2e-4)
    assert differences(runs[0], reference)["loss"] < 2e-6


def test_equal_runs_are_equal_to_the_last_bit():
    split = {"dtype": torch.float32, "experts_kernel": "auto", "steps": 4}
    runs = [run_on_ranks("tests.trainers.scenario:train", 1, **split)[0] for _ in range(2)]
    assert [log["loss"] for log in runs[0]["logs"]] == [log["loss"] for log in runs[1]["logs"]]
    assert all(torch.equal(runs[0]["state"][name], tensor) for name, tensor in runs[1]["state"].items())
