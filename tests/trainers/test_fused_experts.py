"""The fused experts through the trainer: with recompute, FSDP and expert parallelism equal to the reference kernel."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.trainers.scenario import differences, train, train_each

ACCUMULATED = {"batch": 4, "accumulation": 2}


@pytest.fixture(scope="module")
def reference() -> dict:
    return train(experts_kernel="reference", **ACCUMULATED)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_equals_the_reference_with_any_recompute(reference, recompute):
    run = train(experts_kernel="fused", recompute=recompute, **ACCUMULATED)
    assert max(differences(run, reference).values()) < 1e-9


def test_equals_the_reference_on_ranks(reference):
    runs = [{"experts_kernel": "fused", "batch": 4, "accumulation": 1, "ep_size": ep_size} for ep_size in (1, 2)]
    for rank in run_on_ranks("tests.trainers.scenario:train_each", 2, runs=runs):
        for run in rank:
            # Losses are logged in fp32, and routing weights travel in fp32 between ranks.
            assert max(differences(run, reference).values()) < 2e-6


def test_gpt_oss_in_bf16_by_autocast():
    """Parameters and biases in fp32, products in bf16."""
    common = {"family": "gpt_oss", "dtype": torch.float32, "steps": 1, "router_bias_update_rate": 0.0}
    runs = [common | {"experts_kernel": "reference"}, common | {"experts_kernel": "fused", "bf16": True}]
    exact, run = train_each(runs)
    for name, expected in exact["grads"][0].items():
        assert run["grads"][0][name].dtype == expected.dtype
        if "experts" in name:
            assert (run["grads"][0][name] - expected).norm() < 0.25 * expected.norm(), name
