"""A job of any number of ranks, of which this process is one and the others do not exist."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from .._compat import TransformersDeviceMesh
from ..parallel.layout import ParallelLayout
from .devices import PlanError
from .torch_internals import FakeStore


@contextlib.contextmanager
def fake_cluster(world_size: int, rank: int = 0) -> Iterator[None]:
    """Inside, torch.distributed is initialised, and no collective carries anything."""
    if dist.is_initialized():
        raise PlanError(
            "a dry run needs a process of its own, and this one has joined a job already: run `xtuner-hf plan`, or "
            "call the planner before torch.distributed is initialised."
        )
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def fake_mesh(layout: ParallelLayout) -> TransformersDeviceMesh:
    """The meshes that transformers' `initialize_distributed_mesh` makes, on the CPU whatever the machine has."""
    dense = init_device_mesh(
        "cpu", (1, layout.dp_replicate_size, layout.fsdp_size, 1), mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp")
    )
    experts = init_device_mesh(
        "cpu",
        (1, layout.dp_replicate_size, layout.efsdp_size, layout.ep_size),
        mesh_dim_names=("pp", "dp_replicate", "efsdp", "ep"),
    )
    return TransformersDeviceMesh(dense, experts)


def axis_of(layout: ParallelLayout, ranks: tuple[int, ...]) -> str:
    """The name of the mesh axis that these ranks lie on, by their number and distance."""
    if len(ranks) == layout.world_size:
        return "fsdp" if layout.dp_replicate_size == 1 else "all ranks"
    distance = ranks[1] - ranks[0]
    if distance == layout.fsdp_size:
        return "dp_replicate"
    if distance == layout.ep_size and distance > 1:
        return "efsdp"
    names = {layout.ep_size: "ep", layout.sp_size: "sp", layout.fsdp_size: "fsdp"}
    if layout.ep_size == layout.sp_size > 1 and len(ranks) == layout.ep_size:
        return "ep and sp"
    return names.get(len(ranks), f"{len(ranks)} ranks")
