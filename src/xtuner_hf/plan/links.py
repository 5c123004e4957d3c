"""Collectives: what they carry over which link, and how long that takes.

    within a node     every rank has its own way to every other (NVLink, HCCS)
    between nodes     every rank has its own network card; groups that reach over nodes use all cards of a node

All-gather, reduce-scatter and all-reduce over several nodes are taken as hierarchical rings over all cards: the slower
of the two links counts. Bandwidths are one way, for each device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .devices import Device

ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE, ALL_TO_ALL = "all-gather", "reduce-scatter", "all-reduce", "all-to-all"
BROADCAST = "broadcast"
INSIDE, BETWEEN = "inside nodes", "between nodes"


class Transfer(NamedTuple):
    """One rank's part of a collective."""

    seconds: float
    link: str  # the slower one
    bytes_inside: float  # sent by this rank to ranks of its node
    bytes_between: float  # and to other nodes


def transfer(device: Device, kind: str, ranks: Sequence[int], num_bytes: float) -> Transfer:
    """The cost of a collective.

    Args:
        ranks: of the group.
        num_bytes: of the whole buffer (gathered, or to be reduced); of an all-to-all, what a rank sends, to itself too.
    """
    size = len(ranks)
    if size <= 1:
        return Transfer(0.0, INSIDE, 0.0, 0.0)
    num_nodes = len({rank // device.ranks_per_node for rank in ranks})
    in_node = size / num_nodes
    inside = device.link_inside * device.efficiencies["link_inside"]
    between = device.link_between * device.efficiencies["link_between"]
    rounds = 2 if kind == ALL_REDUCE else 1
    on_wire = rounds * num_bytes * (size - 1) / size
    if num_nodes == 1:
        return Transfer(device.latency_inside + on_wire / inside, INSIDE, on_wire, 0.0)
    if kind == ALL_TO_ALL:
        far, near = num_bytes * (size - in_node) / size, num_bytes * (in_node - 1) / size
    else:
        far = rounds * num_bytes * (num_nodes - 1) / num_nodes / in_node
        near = on_wire - far if in_node > 1 else 0.0
    # A ring over n nodes has n - 1 hops; their latencies mostly hide behind each other.
    latency = device.latency_between * (1 + num_nodes / 64)
    seconds = latency + max(far / between, on_wire / inside if in_node > 1 else 0.0)
    return Transfer(seconds, BETWEEN, near, far)
