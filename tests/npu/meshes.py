"""Process groups on NPUs, one way and the other. Runs on the processes of a job."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers.distributed import DistributedConfig

from xtuner_hf.parallel import shard


def make_meshes() -> dict[str, str]:
    """What comes of a mesh in the group that transformers makes for us, and in one that is bound to its device."""
    rank = int(os.environ["RANK"])
    device = torch.device("npu", rank)
    _, mesh = shard.initialize_distributed_mesh(DistributedConfig(fsdp_size=2, ep_size=2))
    total = torch.full((3,), float(rank + 1), device=device)
    dist.all_reduce(total, group=mesh.get_mesh("ep").get_group())
    try:
        dist.all_reduce(torch.ones(1, dtype=torch.float64, device=device))
        float64 = "a sum"
    except RuntimeError as error:
        float64 = str(error)
    dist.destroy_process_group()

    store = Path(tempfile.gettempdir()) / f"group-{os.getppid()}"
    dist.init_process_group("hccl", init_method=f"file://{store}", rank=rank, world_size=2, device_id=device)
    try:
        init_device_mesh("npu", (2, 1), mesh_dim_names=("a", "b"))
        bound = "a mesh"
    except RuntimeError as error:
        bound = str(error)
    return {"bound": bound, "ours": str(total.tolist()), "float64": float64}
