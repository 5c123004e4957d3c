"""The corners of DAPO's soft overlong punishment."""

from __future__ import annotations

import torch

from xtuner_hf.rl.overlong import soft_overlong_penalty


def test_corners_of_the_paper():
    """16384 + 4096 tokens: nothing, half way, the limit and beyond."""
    lengths = torch.tensor([0, 16384, 16385, 18432, 20480, 20481])
    penalty = soft_overlong_penalty(lengths, max_length=20480, cache=4096)
    assert penalty.tolist() == [0, 0, -1 / 4096, -0.5, -1, -1]
