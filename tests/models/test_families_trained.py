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


@pytest.mark.parametrize("name", RUNS)
def test_split_over_ranks_experts_and_micro_batches(name):
    whole = run_on_ranks("tests.trainers.scenario:train", 1, **RUNS[name])[0]
    for run in run_on_ranks("tests.trainers.scenario:train", 2, **RUNS[name], **SPLIT):
        found = differences(run, whole)
        assert max(found.values()) < 2e-6, found
