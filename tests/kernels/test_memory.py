"""What the MoE block needs between forward and backward, next to transformers'."""

from __future__ import annotations

import torch

from benchmarks.moe_block import PeakOfLiving, peak_bytes

OPTIONS = {"shape": "small", "tokens": 4096}


def test_the_measure_counts_what_lives_at_once():
    with PeakOfLiving() as meter:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b.view(10, 100) * 2
        c.add_(1)
        del b
        torch.zeros(100)
    assert meter.peak == 2 * 4000


def test_the_fused_path_needs_at_most_0_6_of_transformers():
    stock, ours = (peak_bytes(kernel, OPTIONS, torch.float32, "cpu") for kernel in ("transformers grouped_mm", "fused"))
    assert stock > 4096 * 8 * 4 * (256 + 3 * 96), "the rows of at least the two projections: the measure sees them"
    assert ours <= 0.6 * stock
