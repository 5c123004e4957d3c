"""Micro-batches of equal work, by the imbalance that they leave: the slowest rank's work over the mean."""

from __future__ import annotations

import pytest
import torch

from xtuner_hf.data.balance import EqualWorkSampler, TokenBudget, TokenBudgetSampler, equal_work
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


# ---- a budget of tokens ----


def token_lengths(number: int = 512) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(number, generator=generator).exp().mul(600).long().clamp(16, 4096).tolist()


def of_budget(
    lengths: list[int], padded: bool, dp_size: int = RANKS, grad_accum: int = ACCUMULATION, **options
) -> list:
    """By rank: its micro-batches in order."""
    samplers = [
        TokenBudgetSampler(
            lengths,
            options.get("work", lengths),
            TokenBudget(4096, padded),
            **{"dp_size": dp_size, "grad_accum": grad_accum, "rank": rank, "seed": 3},
            drop_last=options.get("drop_last", False),
        )
        for rank in range(dp_size)
    ]
    for sampler in samplers:
        sampler.set_epoch(options.get("epoch", 0))
    batches = [list(sampler) for sampler in samplers]
    assert all(len(of_rank) == len(sampler) for of_rank, sampler in zip(batches, samplers, strict=True))
    return batches


@pytest.mark.parametrize("padded", [False, True])
def test_no_micro_batch_has_more_tokens_than_the_budget(padded):
    lengths = token_lengths()
    batches = [rows for of_rank in of_budget(lengths, padded) for rows in of_rank]
    tokens = [max(map(lengths.__getitem__, rows)) * len(rows) if padded else 0 for rows in batches]
    real = [sum(lengths[row] for row in rows) for rows in batches]
    assert max(tokens if padded else real) <= 4096
    assert sorted({row for rows in batches for row in rows}) == list(range(len(lengths)))
    fill = sum(real) / (4096 * len(batches))
    print(f"tokens of a budget of 4096, {'padded' if padded else 'packed'}: {fill:.3f}")
    assert fill > (0.5 if padded else 0.85)


def test_a_step_is_the_same_for_any_split_into_ranks():
    """So that the step number is a position in the data at another number of ranks too."""
    lengths = token_lengths()
    by_layout = []
    for dp_size, grad_accum in ((8, 2), (4, 4), (1, 16)):
        batches = of_budget(lengths, False, dp_size, grad_accum, epoch=2)
        steps = range(len(batches[0]) // grad_accum)
        of_step = [[rows for of_rank in batches for rows in of_rank[s * grad_accum :][:grad_accum]] for s in steps]
        by_layout.append([sorted(map(sorted, step)) for step in of_step])
    assert by_layout[0] == by_layout[1] == by_layout[2]
    other_epoch = of_budget(lengths, False, 1, 16, epoch=3)
    assert other_epoch != of_budget(lengths, False, 1, 16, epoch=2)
    assert sorted(map(sorted, other_epoch[0])) == sorted(rows for step in by_layout[2] for rows in step)


def test_a_rest_of_too_few_rows():
    """5 rows that fill a micro-batch each, 4 micro-batches a step: one row is left."""
    (batches,) = of_budget([4096] * 5, False, 1, 4)
    assert sorted(map(len, batches)) == [1] * 8
    assert {row for rows in batches for row in rows} == set(range(5))
    (batches,) = of_budget([4096] * 5, False, 1, 4, drop_last=True)
    assert len(batches) == 4


def test_work_is_equal_within_the_budget():
    """Equal tokens of one long document and of many short ones are not equal work."""
    lengths = token_lengths()
    flops = TrainingFlops(per_token=1e6, per_squared_length=2e3)
    work = [flops(length, length**2) for length in lengths]
    loads = []
    for weights in (lengths, work):
        batches = of_budget(lengths, False, work=weights)
        slots = torch.tensor([[sum(work[row] for row in rows) for rows in of_rank] for of_rank in batches])
        loads.append((slots.amax(0).sum() / slots.mean(0).sum()).item())
    print(f"slowest rank over mean: {loads[0]:.3f} by tokens, {loads[1]:.3f} by work")
    assert loads[1] < 0.9 * loads[0]
