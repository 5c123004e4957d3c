"""Explicit FSDP prefetch: each block asks for the parameters of the next one while it computes."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule


def fsdp_units(model: nn.Module, idle: Collection[nn.Module] = ()) -> list[list[FSDPModule]]:
    """The FSDP modules below the root in order of forward: each block with what is sharded apart inside it.

    Args:
        idle: blocks that no forward runs.
    """
    units: list[list[FSDPModule]] = []
    inside = ""  # name of the block that we are in
    rests = {module for block in idle for module in block.modules()}
    for name, module in model.named_modules():
        if not name or not isinstance(module, FSDPModule) or module in rests:
            continue
        if units and name.startswith(inside):
            units[-1].append(module)
        else:
            units.append([module])
            inside = f"{name}."
    return units


def set_prefetch(model: Any) -> None:
    """Let every block prefetch the next block that runs and its experts, forward and backward.

    FSDP prefetches on its own only as long as the host runs ahead of the device. Expert parallelism makes the host wait
    for split sizes in every layer, and the next all-gather would start only after that. Costs the memory of one more
    block's gathered parameters. A block that is gathered and does not run keeps what was gathered: hence `idle_layers`.
    """
    units = fsdp_units(model, model.idle_layers() if hasattr(model, "idle_layers") else ())
    for unit, following in pairwise(units):
        unit[0].set_modules_to_forward_prefetch(following)
    # The final norm and the head are one unit under two modules: the later call, for the norm, is the one that counts.
    for unit, preceding in pairwise(reversed(units)):
        unit[0].set_modules_to_backward_prefetch(preceding)
