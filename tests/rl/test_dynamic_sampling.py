"""Choosing groups, drawing prompts and merging rounds of rollouts."""

from __future__ import annotations

import math

import pytest
import torch

from tests.rl.toy import first_operand_task
from xtuner_hf.rl.dynamic_sampling import informative_groups, leave_out, more_prompts, select_rows


def test_informative_groups():
    metric = torch.tensor([1.0, 1.0, 0.0, 1e-7, 0.0, math.nan, math.nan, 1.0, 1.0, 0.0, math.nan, math.nan])
    assert informative_groups(metric, 2).tolist() == [False, True, False, False, True, False]
    # The mean of equal floats need not be equal to them: a standard deviation would call this group informative.
    assert torch.full((7,), 0.1).std() > 0
    assert informative_groups(torch.full((7,), 0.1), 7).tolist() == [False]


def test_ranks_draw_different_prompts_and_a_draw_can_be_repeated():
    dataset = first_operand_task()
    draws = [more_prompts(dataset, 3, 2, rank, seed=7) for rank in (0, 1)]
    prompts = [[row["prompt"] for row in draw] for draw in draws]
    assert all(len(rows) == 6 and rows[0::2] == rows[1::2] for rows in prompts)
    assert len(set(prompts[0] + prompts[1])) == 6
    assert [row["prompt"] for row in more_prompts(dataset, 3, 2, 0, seed=7)] == prompts[0]
    assert [row["prompt"] for row in more_prompts(dataset, 3, 2, 0, seed=8)] != prompts[0]
    assert len(more_prompts(dataset, 20, 2, 1, seed=7)) == 40  # more than the data set has


def rollouts(rows: int, prompt: int, completion: int, first: int, **extra) -> dict:
    ids = torch.arange(first, first + rows)[:, None]
    return {
        "prompt_ids": ids.expand(rows, prompt).clone(),
        "prompt_mask": torch.ones(rows, prompt, dtype=torch.long),
        "completion_ids": ids.expand(rows, completion).clone(),
        "completion_mask": torch.ones(rows, completion, dtype=torch.long),
        "tool_mask": torch.ones(rows, completion, dtype=torch.long),
        "advantages": torch.arange(first, first + rows).float(),
        "routed_experts": ids[:, :, None, None].expand(rows, prompt + completion, 1, 2).to(torch.int16),
        "num_items_in_batch": torch.tensor(rows * completion),
        **extra,
    }


def test_rounds_of_different_widths_become_one_batch():
    merged = select_rows(
        [(rollouts(4, 2, 5, 10), torch.tensor([1, 3])), (rollouts(4, 3, 4, 20), torch.tensor([0]))], pad_token_id=0
    )
    assert merged["advantages"].tolist() == [11, 13, 20]
    assert merged["prompt_ids"].tolist() == [[0, 11, 11], [0, 13, 13], [20, 20, 20]]
    assert merged["prompt_mask"].tolist() == [[0, 1, 1], [0, 1, 1], [1, 1, 1]]
    assert merged["completion_ids"][2].tolist() == [20, 20, 20, 20, 0]
    assert merged["completion_mask"][2].tolist() == [1, 1, 1, 1, 0]
    assert merged["tool_mask"][2].tolist() == [1, 1, 1, 1, 1]
    assert merged["routed_experts"][0, :, 0, 0].tolist() == [-1, *[11] * 7]
    assert merged["routed_experts"][2, :, 0, 0].tolist() == [*[20] * 7, -1]


def test_rows_left_out():
    batch = rollouts(3, 1, 2, 1)
    leave_out(batch, torch.tensor([False, True, False]))
    assert batch["advantages"].tolist() == [1, 0, 3]
    assert batch["completion_mask"].sum(1).tolist() == [2, 0, 2]


def test_images_are_refused():
    with_images = rollouts(2, 1, 1, 0, pixel_values=torch.zeros(9, 4))
    with pytest.raises(ValueError, match="dynamic_sampling cannot merge pixel_values: set dynamic_sampling=False"):
        select_rows([(with_images, torch.tensor([0]))], 0)
