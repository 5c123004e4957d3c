"""The gradient norm of a model whose parameters lie on several meshes: one collective, no host sync.

transformers takes one norm for each mesh, each with one all-reduce for each axis. Ranks of different groups may then
add in different orders, and clip by factors that differ in the last bit: copies of the parameters (HSDP) drift apart.
Here every rank gets the same sum.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from .shard import local_part


def _num_copies(grad: torch.Tensor) -> int:
    """Ranks of the job that hold the same part of this gradient."""
    if not isinstance(grad, DTensor):
        return dist.get_world_size()
    axes = zip(grad.placements, grad.device_mesh.shape, strict=True)
    return dist.get_world_size() // math.prod(size for placement, size in axes if not placement.is_replicate())


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """2-norm of all gradients over all ranks, as it was before they are scaled to `max_norm` at most.

    Args:
        parameters: sharded or replicated; those without gradient are left out, on all ranks alike.
        max_norm: infinity scales nothing.

    Returns:
        scalar on the gradients' device, fp32 (fp64 for fp64 gradients); the same bits on every rank.
    """
    local_by_copies: dict[int, list[torch.Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            grad = parameter.grad
            local_by_copies[_num_copies(grad)].append(local_part(grad))
    local = [grad for group in local_by_copies.values() for grad in group]
    if not local:
        raise ValueError("No parameter has a gradient: the backward pass has not run, or everything is frozen.")
    dtype = torch.promote_types(max((grad.dtype for grad in local), key=lambda dtype: dtype.itemsize), torch.float32)
    squares = [
        torch.stack(torch._foreach_norm(group, 2, dtype=dtype)).square().sum() / copies
        for copies, group in local_by_copies.items()
    ]
    total = torch.stack(squares).sum()
    dist.all_reduce(total)
    norm = total.sqrt()
    if max_norm != float("inf"):
        # The same small number as torch's clip_grad_norm_ has.
        torch._foreach_mul_(local, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
