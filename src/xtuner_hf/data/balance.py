"""Micro-batches of equal work, or of at most so many tokens: which rows go to which optimizer step, group of ranks and
accumulation step."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

import torch
from transformers.trainer_pt_utils import BatchRebalanceSampler


def equal_work(work: list[float], num_batches: int) -> list[list[int]]:
    """Deal items out so that the batches have about the same work, each at least one item.

    Longest processing time first (Graham 1969): each item goes to the batch with the least so far. The largest batch is
    then at most 4/3 of what the best possible way has.

    Args:
        work: of each item.
        num_batches: at most as many as items.

    Returns:
        indices into `work`, batches in falling order of their work.
    """
    if len(work) < num_batches:
        raise ValueError(f"{len(work)} rows are too few for {num_batches} micro-batches of an optimizer step.")
    order = sorted(range(len(work)), key=lambda item: (-work[item], item))
    batches: list[list[int]] = [[item] for item in order[:num_batches]]
    loads = [(work[item], batch) for batch, item in enumerate(order[:num_batches])]
    heapq.heapify(loads)
    for item in order[num_batches:]:
        load, batch = heapq.heappop(loads)
        batches[batch].append(item)
        heapq.heappush(loads, (load + work[item], batch))
    by_load = sorted(range(num_batches), key=lambda batch: -sum(work[item] for item in batches[batch]))
    return [batches[batch] for batch in by_load]


class EqualWorkSampler(BatchRebalanceSampler):
    """transformers' sampler of micro-batches that all ranks work out alike, with the work itself in place of its guess
    (padded tokens, and a fixed weight of their squares).

    An optimizer step has the same rows as for any other number of ranks; only who computes them with whom changes, and
    with it neither the loss nor a gradient. Micro-batches of the same accumulation step have the most similar work.
    The rest of its arguments is as in the parent.

    Args:
        lengths: the work of each row, in any unit.
    """

    def _assign(self, indices, lengths):
        batches = equal_work(list(lengths), self.dp_size * self.grad_accum)
        rows = [[indices[item] for item in batch] for batch in batches]
        # Batch k * dp_size + r is rank r's in accumulation step k.
        return [[rows[step * self.dp_size + rank] for step in range(self.grad_accum)] for rank in range(self.dp_size)]


@dataclass(frozen=True)
class TokenBudget:
    """What a micro-batch may hold.

    Args:
        max_tokens: of a micro-batch at most.
        padded: rows are filled up to the longest one; otherwise they follow each other.
    """

    max_tokens: int
    padded: bool

    def deal(self, lengths: list[int], work: list[float], num_batches: int) -> list[list[int]] | None:
        """As `equal_work`, with each batch within the budget; None if the items do not fit.

        Args:
            lengths: tokens of each item, none above the budget; at least as many items as batches.
        """
        batches: list[list[int]] = [[] for _ in range(num_batches)]
        tokens = [0] * num_batches
        loads = [(0.0, batch) for batch in range(num_batches)]
        # The longest first where that is what a batch is padded to: its first item then says so.
        keys = lengths if self.padded else work
        for item in sorted(range(len(lengths)), key=lambda item: (-keys[item], item)):
            full = []
            while loads:
                load, batch = heapq.heappop(loads)
                items = batches[batch]
                longest = lengths[items[0] if items else item]
                total = (len(items) + 1) * longest if self.padded else tokens[batch] + lengths[item]
                if total <= self.max_tokens:
                    break
                full.append((load, batch))
            else:
                return None
            items.append(item)
            tokens[batch] = total
            for entry in (*full, (load + work[item], batch)):
                heapq.heappush(loads, entry)
        return [batches[batch] for _, batch in sorted(loads, key=lambda entry: (-entry[0], entry[1]))]

    def steps(
        self, order: list[int], lengths: list[int], work: list[float], num_batches: int, drop_last: bool
    ) -> list[list[list[int]]]:
        """Rows in this order -> optimizer steps of `num_batches` micro-batches, each step with as many rows as fit.

        A rest of fewer rows than micro-batches is dropped, or filled up from the beginning.
        """
        missing = 0 if drop_last else num_batches
        order = order + (order * num_batches)[:missing]
        steps, first, end = [], 0, len(order) - missing

        def dealt(number: int) -> list[list[int]] | None:
            rows = order[first : first + number]
            batches = self.deal([lengths[row] for row in rows], [work[row] for row in rows], num_batches)
            return batches and [[rows[item] for item in batch] for batch in batches]

        while first < end and first + num_batches <= len(order):
            fits, most, room = num_batches, 0, num_batches * self.max_tokens
            while first + most < end and lengths[order[first + most]] <= room:
                room -= lengths[order[first + most]]
                most += 1
            while fits < most:
                number = (fits + most + 1) // 2
                fits, most = (number, most) if dealt(number) else (fits, number - 1)
            step = dealt(fits)
            assert step is not None  # one row in each micro-batch fits
            steps.append(step)
            first += fits
        return steps


class TokenBudgetSampler(EqualWorkSampler):
    """The same with a budget of tokens for each micro-batch in place of a number of rows for the step.

    What rows make up a step is settled once, in a random order, and so are the micro-batches; each epoch shuffles the
    steps. All epochs then have as many, and the step number is a position in the data for any number of ranks with as
    many micro-batches a step.

    Args:
        lengths: tokens of each row, none above the budget.
        work: of each row, in any unit; micro-batches of a step get about as much each.
    """

    def __init__(
        self,
        lengths: list[int],
        work: list[float],
        budget: TokenBudget,
        *,
        dp_size: int,
        grad_accum: int,
        rank: int,
        seed: int,
        drop_last: bool,
    ):
        num_batches = dp_size * grad_accum
        weights: Any = work  # the parent says int
        super().__init__(weights, num_batches, dp_size, grad_accum, seed=seed, rank=rank, drop_last=drop_last)
        order = self._shuffled(len(lengths), seed)
        self.steps = budget.steps(order, lengths, work, num_batches, drop_last)
        self.num_global_batches = len(self.steps)  # the parent's length

    def __iter__(self):
        for step in self._shuffled(len(self.steps), self.seed + self.epoch):
            for accumulated in range(self.grad_accum):
                yield self.steps[step][accumulated * self.dp_size + self.rank]

    @staticmethod
    def _shuffled(number: int, seed: int) -> list[int]:
        return torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()
