"""Optimizer steps of the trainer are the same however the batch is split, for what Qwen3-MoE does not have: windows and
sinks, groups and shared experts, multi-token prediction. fp64 weights; norms, head and router stay fp32 by design."""

from __future__ import annotations

import pytest

from tests.ranks import run_on_ranks
from tests.trainers.scenario import differences

RUNS = {
    "gpt_oss": {"family": "gpt_oss", "router_bias_update_rate": 0.0},
    "deepseek_v3": {
        "family": "deepseek_v3",
        "config": {"num_nextn_predict_layers": 1},
        "init": {"mtp_loss_coef": 0.3},
    },
}
SPLIT = {"batch": 2, "accumulation": 2, "packed": True, "gradient_checkpointing": True, "ep_size": 2}
SHARED = {**SPLIT, "batch": 4, "sp_size": 2}  # both ranks have the same rows, and half of the positions each


@pytest.fixture(scope="module")
def whole() -> dict[str, dict]:
    """Each run in one process, in one batch."""
    return {name: run_on_ranks("tests.trainers.scenario:train", 1, **arguments)[0] for name, arguments in RUNS.items()}


@pytest.mark.parametrize(
    ("name", "kind", "layout"),
    [
        ("gpt_oss", "MoETrainer", SPLIT),
        ("deepseek_v3", "MoETrainer", SPLIT),
        ("deepseek_v3", "MoESFTTrainer", SPLIT),
        ("deepseek_v3", "MoESFTTrainer", SHARED),
    ],
)
def test_split_over_ranks_experts_and_micro_batches(name, kind, layout, whole):
    for run in run_on_ranks("tests.trainers.scenario:train", 2, trainer_kind=kind, **RUNS[name], **layout):
        found = differences(run, whole[name])
        assert max(found.values()) < 2e-6, found
