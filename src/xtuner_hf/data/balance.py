"""Micro-batches of equal work: which rows of an optimizer step go to which group of ranks and accumulation step."""

from __future__ import annotations

import heapq

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
