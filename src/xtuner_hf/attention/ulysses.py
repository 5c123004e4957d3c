"""Sequence parallelism in attention (DeepSpeed Ulysses, arXiv 2309.14509): all-to-alls trade positions for heads.

    4 ranks, 8 heads       before attention              in attention                after it
    rank 0                 positions 0..S/4, 8 heads     all positions, heads 0 1    as before
    rank 1                 positions S/4..S/2, 8 heads   all positions, heads 2 3
    ...

Queries, keys and values travel in one all-to-all, the result in a second one. Where there are fewer key and value heads
than ranks, each is sent to all ranks whose query heads use it, and its gradients are summed when they come back.

Legend: B rows, P ranks that share them, S positions of a rank, L = P*S positions of a whole row, N query heads, M key
and value heads, K size of a query and key head, V of a value head, F numbers of a token on its way to one rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device

from .documents import Documents


@dataclass(frozen=True)
class SequenceRanks:
    """The ranks that share each sequence, and one's place among them.

    Args:
        group: of torch.distributed.
    """

    group: Any
    size: int
    rank: int

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks; not differentiable."""
        total = tensor.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def from_first(self, value: Any, device: torch.device) -> Any:
        """The first rank's value of anything that can be pickled, tensors in it on `device`."""
        # A pickled tensor of another rank's device would be read back there.
        shared = [send_to_device(value, "cpu")]
        dist.broadcast_object_list(shared, src=dist.get_global_rank(self.group, 0), group=self.group)
        return send_to_device(shared[0], device)


@dataclass(eq=False)
class SequenceShard:
    """This rank's share of a batch: of each row, positions `rank * S` to `(rank + 1) * S`.

    Args:
        input_ids: [B, L] of the whole rows.
        real_BL: [B, L] bool, False on padding.
        documents: of the whole rows.
    """

    ranks: SequenceRanks
    input_ids: torch.Tensor
    real_BL: torch.Tensor
    documents: Documents

    def take(self, whole_BL: torch.Tensor) -> torch.Tensor:
        """[B, L, ...] -> [B, S, ...]"""
        return self.take_view(whole_BL).contiguous()

    def take_view(self, whole_BL: torch.Tensor) -> torch.Tensor:
        """`take`, in the same memory."""
        return whole_BL.chunk(self.ranks.size, dim=1)[self.ranks.rank]


class _AllToAll(torch.autograd.Function):
    """[P, ...]: part i goes to rank i, and part i of the result came from it; gradients go the same way back."""

    @staticmethod
    def forward(ctx, parts, group):
        ctx.group = group
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return received

    @staticmethod
    def backward(ctx, grad):
        return _AllToAll.apply(grad.contiguous(), ctx.group), None


def sequence_to_heads(
    q_BSNK: torch.Tensor, k_BSMK: torch.Tensor, v_BSMV: torch.Tensor, ranks: SequenceRanks
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This rank's positions of all heads -> all positions [B, L, ...] of this rank's heads: N/P, lcm(M, P)/P and again.

    Raises:
        ValueError: the ranks do not divide the query heads.
    """
    num_rows, num_heads, num_kv_heads = q_BSNK.shape[0], q_BSNK.shape[2], k_BSMK.shape[2]
    check_heads(num_heads, ranks.size)
    repeats = math.lcm(num_kv_heads, ranks.size) // num_kv_heads
    if repeats > 1:
        k_BSMK, v_BSMV = k_BSMK.repeat_interleave(repeats, dim=2), v_BSMV.repeat_interleave(repeats, dim=2)
    by_rank = [tensor.unflatten(2, (ranks.size, -1)) for tensor in (q_BSNK, k_BSMK, v_BSMV)]
    widths = [tensor.shape[3] * tensor.shape[4] for tensor in by_rank]
    parts_PBSF = torch.cat([tensor.permute(2, 0, 1, 3, 4).flatten(3) for tensor in by_rank], dim=-1)
    whole_BLF = _AllToAll.apply(parts_PBSF, ranks.group).transpose(0, 1).reshape(num_rows, -1, sum(widths))
    q, k, v = (
        numbers.unflatten(-1, tensor.shape[3:])
        for numbers, tensor in zip(whole_BLF.split(widths, dim=-1), by_rank, strict=True)
    )
    return q, k, v


def heads_to_sequence(output_BLNV: torch.Tensor, ranks: SequenceRanks) -> torch.Tensor:
    """All positions of this rank's heads -> this rank's positions of all heads, [B, S, N, V]."""
    parts_PBSNV = output_BLNV.unflatten(1, (ranks.size, -1)).transpose(0, 1).contiguous()
    return _AllToAll.apply(parts_PBSNV, ranks.group).permute(1, 2, 0, 3, 4).flatten(2, 3)


def check_heads(num_heads: int, sp_size: int) -> None:
    """Raises a ValueError if `sp_size` ranks cannot have as many query heads each."""
    if num_heads % sp_size:
        divisors = [size for size in range(1, num_heads + 1) if num_heads % size == 0]
        raise ValueError(
            f"sp_size {sp_size} does not divide the model's {num_heads} query heads; every rank computes as many. "
            f"Choose one of {', '.join(map(str, divisors))}."
        )


class _GatherParts(torch.autograd.Function):
    """Every rank uses what all computed, so backward adds up what each found."""

    @staticmethod
    def forward(ctx, part, ranks):
        ctx.ranks = ranks
        whole = part.new_empty(ranks.size * len(part), *part.shape[1:])
        dist.all_gather_into_tensor(whole, part.contiguous(), group=ranks.group)
        return whole

    @staticmethod
    def backward(ctx, grad):
        part = grad.new_empty(len(grad) // ctx.ranks.size, *grad.shape[1:])
        dist.reduce_scatter_tensor(part, grad.contiguous(), group=ctx.ranks.group)
        return part, None


def gather_parts(part: torch.Tensor, ranks: SequenceRanks) -> torch.Tensor:
    """The ranks' parts one behind the other along dimension 0, on all of them.

    Of work that ranks share because all of them use the result: the gradient of a part is the sum of all ranks'.
    """
    return _GatherParts.apply(part, ranks)
