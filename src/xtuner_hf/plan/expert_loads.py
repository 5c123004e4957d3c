"""How many rows travel between expert-parallel ranks, where no router has chosen: even loads, or one rank hit harder.

A token chooses K experts. How many of them live on one rank follows a hypergeometric distribution if all choices are
alike; a rank whose experts are chosen x times as often follows Fisher's noncentral one, of the mean that this makes.
Where the router limits a token to some groups of experts (DeepSeek V3), a rank takes part only if its group does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import comb, exp, lgamma, log

import torch

from ..host_reads import ExpertTraffic, HostReads
from .clock import Clock


@dataclass(frozen=True)
class ExpertChoice:
    """How a model's routers choose.

    Args:
        num_groups: that experts stand in.
        topk_groups: of them a token may use.
    """

    num_experts: int
    num_groups: int = 1
    topk_groups: int = 1


@lru_cache(maxsize=256)
def pairs_probabilities(choice: ExpertChoice, top_k: int, num_here: int, load: float) -> tuple[float, ...]:
    """Probability that a token has 0, 1, ... K of its experts among a rank's `num_here`.

    Args:
        load: how often these experts are chosen, 1 as often as all others.
    """
    group_size = choice.num_experts // choice.num_groups
    reachable = choice.topk_groups * group_size  # experts that one token can choose among
    # (experts of this rank among the reachable ones, probability)
    if num_here >= group_size:
        groups_here = num_here // group_size
        cases = [
            (here * group_size, _hypergeometric(choice.num_groups, groups_here, choice.topk_groups, here))
            for here in range(min(groups_here, choice.topk_groups) + 1)
        ]
    else:
        share = choice.topk_groups / choice.num_groups
        cases = [(num_here, share), (0, 1.0 - share)]
    even = top_k * num_here / choice.num_experts
    largest = sum(probability * min(top_k, here) for here, probability in cases)
    mean = min(load * even, largest)
    odds = _odds_for_mean(cases, reachable, top_k, mean) if load != 1 else 0.0
    total = [0.0] * (top_k + 1)
    for here, probability in cases:
        for pairs, p in enumerate(_noncentral(reachable, here, top_k, odds)):
            total[pairs] += probability * p
    return tuple(total)


def _hypergeometric(population: int, marked: int, drawn: int, found: int) -> float:
    return comb(marked, found) * comb(population - marked, drawn - found) / comb(population, drawn)


def _log_comb(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1) if 0 <= k <= n else float("-inf")


def _noncentral(population: int, marked: int, drawn: int, log_odds: float) -> list[float]:
    """Fisher's noncentral hypergeometric distribution of 0..drawn."""
    logs = [_log_comb(marked, k) + _log_comb(population - marked, drawn - k) + k * log_odds for k in range(drawn + 1)]
    most = max(logs)
    weights = [exp(value - most) for value in logs]
    return [weight / sum(weights) for weight in weights]


def _odds_for_mean(cases, reachable: int, top_k: int, mean: float) -> float:
    """Logarithm of the odds that make this mean, by bisection."""
    low, high = log(1e-9), log(1e9)
    for _ in range(80):
        middle = (low + high) / 2
        found = sum(
            probability * sum(k * p for k, p in enumerate(_noncentral(reachable, here, top_k, middle)))
            for here, probability in cases
        )
        low, high = (middle, high) if found < mean else (low, middle)
    return (low + high) / 2


def rows_by_pairs(choice: ExpertChoice, traffic: ExpertTraffic, load: float) -> list[int]:
    """Of one sender's tokens, how many have more than j experts on a rank, j = 0, 1, ... `max_pairs` - 1."""
    probabilities = pairs_probabilities(choice, traffic.top_k, traffic.num_experts_here, load)
    return [round(traffic.num_tokens * sum(probabilities[j + 1 :])) for j in range(traffic.max_pairs)]


class PlannedReads(HostReads):
    """Answers what the host would read, and lets it wait as long as it would.

    Args:
        documents: tokens of each.
        load: of this rank's experts; what it gets more, the group's other ranks get less.
        num_unlabelled: tokens of a micro-batch that have no label, the last of each row say.
        image_tokens: of the whole rows of a micro-batch.
        num_ranks: that share the rows, and so the tokens of images.
    """

    def __init__(
        self,
        clock: Clock,
        documents: list[int],
        choice: ExpertChoice | None,
        load: float = 1.0,
        num_unlabelled: int = 0,
        image_tokens: int = 0,
        num_ranks: int = 1,
    ):
        self.clock, self.documents, self.choice, self.load = clock, documents, choice, load
        self.num_unlabelled = num_unlabelled
        self._image_tokens, self._num_ranks = image_tokens, num_ranks

    def lengths(self, cu_seqlens) -> list[int]:
        self.clock.current.synchronize()
        return self.documents

    def true_rows(self, mask_N):
        self.clock.current.synchronize()
        return torch.arange(mask_N.shape[0] - self.num_unlabelled, device=mask_N.device)

    def image_tokens(self, mask_N):
        self.clock.current.synchronize()
        is_share = mask_N.shape[0] < sum(self.documents)
        return torch.arange(self._image_tokens // (self._num_ranks if is_share else 1), device=mask_N.device)

    def start_counts(self, counts, traffic: ExpertTraffic) -> PlannedCounts:
        assert self.choice is not None
        load = min(self.load, traffic.num_ranks)
        others = (traffic.num_ranks - load) / max(traffic.num_ranks - 1, 1)
        here = rows_by_pairs(self.choice, traffic, load)
        elsewhere = rows_by_pairs(self.choice, traffic, others)
        sent = [here] + [elsewhere] * (traffic.num_ranks - 1)
        return PlannedCounts(self.clock, [sent, [here] * traffic.num_ranks])


class PlannedCounts:
    """Counts that arrive once the work that made them is done."""

    def __init__(self, clock: Clock, counts: list):
        self._event, self._counts = clock.new_event(), counts
        self._event.record()

    def wait(self) -> list:
        self._event.synchronize()
        return self._counts
