"""Dynamic sampling of DAPO (arXiv 2503.14476, sec. 3.2): only groups whose answers differ in the task's reward train.

A group that is all right or all wrong has no advantage. Further prompts are sampled until the batch is full of groups
that have one. What counts is the task's metric, not the reward with its length penalty, which differs nearly always.

Legend: B samples of a rank, G samples of a prompt (a group).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..moe.replay import NATIVE

Rollouts = dict[str, Any]  # what TRL's GRPO hands from sampling to training: [B, ...] tensors by name

_SCALAR = "num_items_in_batch"
# What is laid out by position, with what fills up a shorter row, on the left (prompts) or on the right.
_PADDED_LEFT = {"prompt_ids": None, "prompt_mask": 0}
_PADDED_RIGHT = {
    "completion_ids": None,
    "completion_mask": 0,
    "tool_mask": 1,
    "advantages": 0,
    "old_per_token_logps": 0,
    "ref_per_token_logps": 0,
    "sampling_per_token_logps": 0,
    "importance_sampling_ratio": 0,
}


def informative_groups(metric_B: torch.Tensor, group_size: int) -> torch.Tensor:
    """[B / G] bool: the group's answers differ in the metric.

    Compared exactly, since a standard deviation of equal floats need not be 0. Answers without a metric (NaN) do not
    count.
    """
    metric = metric_B.view(-1, group_size)
    highest = metric.nan_to_num(nan=-torch.inf).amax(1)
    lowest = metric.nan_to_num(nan=torch.inf).amin(1)
    return highest > lowest


def more_prompts(dataset: Any, num_prompts: int, group_size: int, rank: int, seed: int) -> list[dict]:
    """Rows of `num_prompts` random prompts for this rank, each `group_size` times in a row.

    Ranks that call it with one seed get different prompts, as far as the data set has enough.
    """
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    chosen = order[(rank * num_prompts + torch.arange(num_prompts)) % len(dataset)].tolist()
    # A row of its own for each sample: reward functions and environments may write into it.
    return [dict(dataset[index]) for index in chosen for _ in range(group_size)]


def select_rows(rounds: Sequence[tuple[Rollouts, torch.Tensor]], pad_token_id: int) -> Rollouts:
    """The chosen rows of several rounds as one batch, padded to the longest prompt and completion.

    Args:
        rounds: the rollouts of each round, and which of their rows to take (int64).
        pad_token_id: fills `prompt_ids` and `completion_ids`.

    Raises:
        ValueError: for rollouts with images, which are not laid out by row.
    """
    first = rounds[0][0]
    unknown = first.keys() - {_SCALAR, "routed_experts", *_PADDED_LEFT, *_PADDED_RIGHT}
    if unknown:
        raise ValueError(f"dynamic_sampling cannot merge {', '.join(sorted(unknown))}: set dynamic_sampling=False.")
    prompt_width = max(rollouts["prompt_ids"].shape[1] for rollouts, _ in rounds)
    merged: Rollouts = {}
    for key in first.keys() - {_SCALAR}:
        fill = NATIVE if key == "routed_experts" else (_PADDED_LEFT | _PADDED_RIGHT)[key]
        fill = pad_token_id if fill is None else fill
        parts, shifts = [], []
        for rollouts, rows in rounds:
            parts.append(rollouts[key][rows])
            is_right = key in _PADDED_RIGHT
            shifts.append(0 if is_right else prompt_width - rollouts["prompt_ids"].shape[1])
        merged[key] = torch.cat(_pad(parts, shifts, fill))
    return merged | {_SCALAR: first[_SCALAR]}  # last: TRL takes the number of rows from what comes first


def _pad(parts: list[torch.Tensor], shifts: list[int], fill: int) -> list[torch.Tensor]:
    """Make the parts [B, width, ...] equally wide, each moved to the right by its shift."""
    if parts[0].dim() == 1:
        return parts
    width = max(part.shape[1] + shift for part, shift in zip(parts, shifts, strict=True))
    padded = []
    for part, shift in zip(parts, shifts, strict=True):
        wide = part.new_full((part.shape[0], width, *part.shape[2:]), fill)
        wide[:, shift : shift + part.shape[1]] = part
        padded.append(wide)
    return padded


def leave_out(rollouts: Rollouts, row_B: torch.Tensor) -> None:
    """Give the rows of `row_B` [B] bool neither advantage nor tokens in the loss's mean; in place."""
    rollouts["advantages"] = rollouts["advantages"].masked_fill(row_B, 0.0)
    rollouts["completion_mask"] = rollouts["completion_mask"].masked_fill(row_B[:, None], 0)
