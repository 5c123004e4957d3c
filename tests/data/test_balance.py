"""Micro-batches of equal work, by the imbalance that they leave: the slowest rank's work over the mean."""

from __future__ import annotations

import pytest
import torch

from xtuner_hf.data.balance import EqualWorkSampler, equal_work
from xtuner_hf.models.flops import TrainingFlops

RANKS, ACCUMULATION, ROWS = 8, 2, 128


def work() -> list[float]:
    """FLOPs of Qwen3-30B-A3B for rows of log-normal lengths: median 2,000, up to a window of 16k."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randn(1024, generator=generator).exp().mul(2000).long().clamp(16, 16384).tolist()
    flops = TrainingFlops(per_token=18.2e9, per_squared_length=1.18e6)
    return [flops(length, length**2) for length in lengths]


def imbalance(batches: dict[tuple[int, int, int], list[int]], work: list[float]) -> float:
    """Mean over optimizer steps of: sum over accumulation steps of the slowest rank's work / the mean rank's work."""
    steps = sorted({step for step, _, _ in batches})
    found = []
    for step in steps:
        loads = torch.tensor(
            [[sum(work[row] for row in batches[step, k, rank]) for rank in range(RANKS)] for k in range(ACCUMULATION)]
        )
        found.append((loads.amax(1).sum() / loads.mean(1).sum()).item())
    return sum(found) / len(found)


def sampled(work: list[float]) -> dict[tuple[int, int, int], list[int]]:
    batches = {}
    for rank in range(RANKS):
        sampler = EqualWorkSampler(work, ROWS, RANKS, ACCUMULATION, rank=rank, seed=3)
        for index, rows in enumerate(sampler):
            batches[index // ACCUMULATION, index % ACCUMULATION, rank] = rows
    return batches


def test_log_normal_lengths():
    weights = work()
    balanced = sampled(weights)
    by_step: dict[int, list[int]] = {}
    for (step, _, _), rows in balanced.items():
        by_step.setdefault(step, []).extend(rows)
    assert sorted(row for rows in by_step.values() for row in rows) == list(range(len(weights)))
    size = ROWS // RANKS // ACCUMULATION
    by_number = {
        (step, k, rank): rows[(k * RANKS + rank) * size :][:size]
        for step, rows in ((step, sorted(rows)) for step, rows in by_step.items())
        for k in range(ACCUMULATION)
        for rank in range(RANKS)
    }
    before, after = imbalance(by_number, weights), imbalance(balanced, weights)
    print(f"slowest rank over mean: {before:.3f} by numbers of rows, {after:.3f} by work")
    assert before > 1.5
    assert after < 1.1


def test_rows_with_images_are_not_as_cheap_as_their_tokens_say():
    """InternVL3.5-241B-A28B: a tile costs 256 tokens of its language model and 34 TFLOP of its 6B tower. Half of the
    rows have images, of 1 to 13 tiles; the others as many tokens of text."""
    generator = torch.Generator().manual_seed(1)
    tiles = torch.randint(1, 14, (1024,), generator=generator).mul(torch.arange(1024) % 2).tolist()
    lengths = torch.randint(300, 3600, (1024,), generator=generator).tolist()
    flops = TrainingFlops(per_token=164e9, per_squared_length=4.6e6, per_tile=34e12)
    lengths = [max(length, 256 * number + 40) for length, number in zip(lengths, tiles, strict=True)]
    weights = [flops(length, length**2, number) for length, number in zip(lengths, tiles, strict=True)]
    by_tokens = imbalance(sampled([flops(length, length**2) for length in lengths]), weights)
    by_work = imbalance(sampled(weights), weights)
    print(f"slowest rank over mean: {by_tokens:.3f} by tokens alone, {by_work:.3f} with the tiles")
    assert by_tokens > 1.1
    assert by_work < 1.05


def test_small_ones():
    assert equal_work([4.0, 1.0, 3.0, 2.0], 2) == [[0, 1], [2, 3]]
    assert equal_work([1.0, 5.0], 2) == [[1], [0]]
    with pytest.raises(ValueError, match="1 rows are too few for 2 micro-batches"):
        equal_work([1.0], 2)
