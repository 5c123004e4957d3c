"""DAPO's soft punishment of answers that come close to the length limit (arXiv 2503.14476, eq. 13)."""

from __future__ import annotations

import torch


def soft_overlong_penalty(length_B: torch.Tensor, max_length: int, cache: int) -> torch.Tensor:
    """[B] fp32, added to the task's reward: 0 up to `max_length - cache`, from there in a straight line to -1.

    Args:
        length_B: [B] tokens that the model itself wrote; what tools or an environment put in does not count.
        max_length: the limit, where the penalty is -1.
        cache: over how many tokens before the limit it falls.
    """
    return (((max_length - cache) - length_B.float()) / cache).clamp(min=-1.0, max=0.0)
