"""Explicit FSDP prefetch: each block asks for the parameters of the next one while it computes."""

from __future__ import annotations

from itertools import pairwise

from torch import nn
from torch.distributed.fsdp import FSDPModule


def fsdp_units(model: nn.Module) -> list[list[FSDPModule]]:
    """The FSDP modules below the root in order of forward: each block with what is sharded apart inside it."""
    units: list[list[FSDPModule]] = []
    inside = ""  # name of the block that we are in
    for name, module in model.named_modules():
        if not name or not isinstance(module, FSDPModule):
            continue
        if units and name.startswith(inside):
            units[-1].append(module)
        else:
            units.append([module])
            inside = f"{name}."
    return units


def set_prefetch(model: nn.Module) -> None:
    """Let every block prefetch the next block and its experts, forward and backward.

    FSDP prefetches on its own only as long as the host runs ahead of the device. Expert parallelism makes the host wait
    for split sizes in every layer, and the next all-gather would start only after that. Costs the memory of one more
    block's gathered parameters.
    """
    units = fsdp_units(model)
    for unit, following in pairwise(units):
        unit[0].set_modules_to_forward_prefetch(following)
    # The final norm and the head are one unit under two modules: the later call, for the norm, is the one that counts.
    for unit, preceding in pairwise(reversed(units)):
        unit[0].set_modules_to_backward_prefetch(preceding)
