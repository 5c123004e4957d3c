from __future__ import annotations

import math

import pytest
import torch

from xtuner_hf.moe.load_metrics import LoadMetrics


def test_figures_of_an_even_a_skewed_and_a_collapsed_layer():
    metrics = LoadMetrics(torch.tensor([[4, 4, 4, 4], [8, 4, 4, 0], [16, 0, 0, 0]]), aux_loss=1.5)
    assert metrics.max_vio_L.tolist() == [0, 1, 3]
    assert metrics.cv_L.tolist() == pytest.approx([0, math.sqrt(8) / 4, math.sqrt(48) / 4])
    assert metrics.dead_experts_L.tolist() == [0, 1, 3]
    skewed = (0.5 * math.log(2) + 2 * 0.25 * math.log(4)) / math.log(4)
    assert metrics.entropy_L.tolist() == pytest.approx([1, skewed, 0], abs=1e-6)
    logs = metrics.logs()
    assert logs["router/max_vio_worst_layer"] == 3
    assert logs["router/dead_experts"] == 4
    assert logs["router/aux_loss"] == 1.5
    assert "router/z_loss" not in logs


def test_a_step_without_tokens_has_finite_figures():
    metrics = LoadMetrics(torch.zeros(2, 4, dtype=torch.int64), aux_loss=0.0)
    assert all(math.isfinite(value) for value in metrics.logs().values())
