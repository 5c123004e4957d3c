"""Expert parallelism that sends each token once to every rank that needs it, however many of its experts live there.

    sender (T tokens)                                receiver (R rows, M pairs)
    -----------------                                --------------------------
    count rows and pairs by rank   -- counts -->     (the sizes of both go to the host in one copy)
    a row for each rank needed     -- hidden -->     a pair for each expert of a row
                                                     experts -> weighted sum over the row's pairs, fp32
    sum over the token's rows, fp32  <-- sums --     one row back

With top-8 of 128 experts over 8 ranks and even routing a token goes to 5.3 ranks, so 5.3 rows travel each way where
one for every (token, expert) pair makes 8. The routing weights travel with the rows and their gradients come back with
the rows' gradients, both in fp32.

Legend: T tokens, H hidden size, K experts per token, P ranks of the EP group, L experts of a rank, J = min(K, L) most
experts of one token on one rank, S rows sent, R rows received, M (row, expert) pairs computed here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from .._compat import EPImplementation, EPImplementationInterface
from ..host_reads import ExpertTraffic, Pending, host_reads

IMPLEMENTATION_NAME = "xtuner_once_per_rank"


class Routes(NamedTuple):
    """Where this rank's tokens go. Made without a host sync; `counts` arrives while other work runs."""

    pairs_TP: torch.Tensor  # int64, how many of the token's experts live on the rank
    slots_TK: torch.Tensor  # int64, the token's K slots in the order of their ranks
    counts: Pending  # [2, P, J]: rows sent to and received from each rank that have more than j experts there


class OncePerRankEP(EPImplementation):
    """The dispatcher, under the interface of transformers' `EPImplementationInterface`.

    A block that has other work between router and experts (a shared expert) can call `start` first: the counts are then
    exchanged and copied to the host behind that work. Each experts module has its dispatcher as `ep_dispatcher`.

    Raises:
        ValueError: under tensor parallelism, where ranks share a batch.
    """

    _started: Routes | None

    def __init__(self, experts, ep_mesh, tp_mesh):
        super().__init__(experts, ep_mesh, tp_mesh)
        if tp_mesh.size() > 1:
            raise ValueError(
                f"expert_dispatch 'ours' needs ranks with batches of their own, and tp_size is {tp_mesh.size()}; use "
                "'all_to_all' with tensor parallelism."
            )
        self.group = ep_mesh.get_group()
        self.num_ranks = ep_mesh.size()
        self.num_experts_here: int = experts.num_experts
        self._started = None
        experts.ep_dispatcher = self

    def start(self, topk_ids_TK: torch.Tensor) -> None:
        """Begin the exchange of counts for the next call, which must be on the same ids."""
        self._started = self._route(topk_ids_TK)

    def __call__(self, hidden_states, top_k_index, top_k_weights):
        routes = self._started or self._route(top_k_index)
        self._started = None
        num_tokens = hidden_states.shape[0]
        sent_PJ, received_PJ = routes.counts.wait()
        send_sizes, receive_sizes = [row[0] for row in sent_PJ], [row[0] for row in received_PJ]

        token_S, ids_SJ, weights_SJ = self._fill_rows(routes, sum(send_sizes), top_k_index, top_k_weights)
        hidden_SH = _TakeRows.apply(hidden_states, token_S, send_sizes)
        hidden_RH, weights_RJ, ids_RJ = _Exchange.apply(
            hidden_SH, weights_SJ, ids_SJ, send_sizes, receive_sizes, self.group
        )
        # Pairs of each j: rows do not repeat among them.
        pair_sizes = [sum(column) for column in zip(*received_PJ, strict=True)]
        sums_RH = self._run_experts(hidden_RH, ids_RJ, weights_RJ, pair_sizes)
        sums_SH = _ReturnRows.apply(sums_RH.to(hidden_states.dtype), receive_sizes, send_sizes, self.group)
        return _SumRows.apply(sums_SH, token_S, send_sizes, num_tokens).to(hidden_states.dtype)

    @torch.no_grad()
    def _route(self, topk_ids_TK: torch.Tensor) -> Routes:
        rank_TK = topk_ids_TK // self.num_experts_here
        pairs_TP = topk_ids_TK.new_zeros(topk_ids_TK.shape[0], self.num_ranks)
        pairs_TP.scatter_add_(1, rank_TK, torch.ones_like(rank_TK))
        column_J = torch.arange(self._max_pairs(topk_ids_TK), device=topk_ids_TK.device)
        sent_PJ = (pairs_TP[:, :, None] > column_J).sum(0)
        received_PJ = torch.empty_like(sent_PJ)
        dist.all_to_all_single(received_PJ, sent_PJ, group=self.group)
        num_tokens, top_k = topk_ids_TK.shape
        traffic = ExpertTraffic(num_tokens, top_k, self.num_ranks, self.num_experts_here, column_J.numel())
        counts = host_reads().start_counts(torch.stack([sent_PJ, received_PJ]), traffic)
        return Routes(pairs_TP, rank_TK.argsort(dim=1, stable=True), counts)

    def _max_pairs(self, topk_ids_TK: torch.Tensor) -> int:
        return min(topk_ids_TK.shape[1], self.num_experts_here)

    def _fill_rows(self, routes: Routes, num_rows: int, topk_ids_TK, weights_TK):
        """Rows to send, by rank and then by token: their tokens [S], local expert ids [S, J] (-1 where there is none)
        and weights [S, J] fp32 (at least)."""
        num_tokens, top_k = topk_ids_TK.shape
        is_sent = (routes.pairs_TP > 0).t().reshape(-1)
        position_S = true_positions(is_sent, num_rows)
        token_S, rank_S = position_S % max(num_tokens, 1), position_S // max(num_tokens, 1)
        first_TP = routes.pairs_TP.cumsum(1) - routes.pairs_TP
        column_J = torch.arange(self._max_pairs(topk_ids_TK), device=topk_ids_TK.device)
        is_used_SJ = column_J < routes.pairs_TP[token_S, rank_S][:, None]
        place_SJ = (first_TP[token_S, rank_S][:, None] + column_J).clamp(max=top_k - 1)
        slot_SJ = routes.slots_TK[token_S[:, None], place_SJ]
        ids_SJ = topk_ids_TK[token_S[:, None], slot_SJ] % self.num_experts_here
        weights_TK = weights_TK.to(torch.promote_types(weights_TK.dtype, torch.float32))
        weights_SJ = weights_TK[token_S[:, None], slot_SJ].masked_fill(~is_used_SJ, 0.0)
        return token_S, ids_SJ.masked_fill(~is_used_SJ, -1).int(), weights_SJ

    def _run_experts(self, hidden_RH, ids_RJ, weights_RJ, pair_sizes: list[int]) -> torch.Tensor:
        """Weighted sum over each row's experts here, [R, H] fp32."""
        num_rows, num_pairs = hidden_RH.shape[0], sum(pair_sizes)
        position_M = true_positions((ids_RJ >= 0).t().reshape(-1), num_pairs)
        row_M, column_M = position_M % max(num_rows, 1), position_M // max(num_rows, 1)
        x_MH = _TakeRows.apply(hidden_RH, row_M, pair_sizes)
        # The weights go into the experts: a kernel may apply them where that keeps least for the backward.
        weights_M1 = weights_RJ[row_M, column_M][:, None]
        if num_pairs == 0:
            # A kernel may not like zero rows. This one's result is cut off, and leaves zero gradients on every
            # parameter, which FSDP's reduction needs.
            x_MH, ids_M1 = x_MH.sum(0, keepdim=True), ids_RJ.new_zeros(1, 1).long()
            weights_M1 = weights_M1.sum().view(1, 1)
        else:
            ids_M1 = ids_RJ[row_M, column_M].long()[:, None]
        y_MH = self.experts_forward(x_MH, ids_M1, weights_M1)[:num_pairs]
        return _SumRows.apply(y_MH, row_M, pair_sizes, num_rows)


def true_positions(mask_N: torch.Tensor, count: int) -> torch.Tensor:
    """[count] int64: indices of the True entries. `nonzero` for when the host knows their number: no host sync."""
    place_N = torch.where(mask_N, mask_N.cumsum(0) - 1, count)
    positions = torch.empty(count + 1, dtype=torch.int64, device=mask_N.device)
    return positions.scatter_(0, place_N, torch.arange(mask_N.numel(), device=mask_N.device))[:count]


def sum_rows(x_NH, index_N, sizes: list[int], num_rows: int) -> torch.Tensor:
    """[num_rows, H] fp32 (at least): row i is the sum of the x whose index is i.

    Indices do not repeat within a slice of `sizes`, and slices are added one after the other, so the result does not
    depend on the order in which a device happens to add.
    """
    dtype = torch.promote_types(x_NH.dtype, torch.float32)
    total = torch.zeros(num_rows, x_NH.shape[1], dtype=dtype, device=x_NH.device)
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        total.index_add_(0, index_N[rows], x_NH[rows].to(dtype))
        start += size
    return total


class _TakeRows(torch.autograd.Function):
    """x[index]; the gradient of a row that is taken several times is summed in fp32."""

    @staticmethod
    def forward(ctx, x_RH, index_N, sizes):
        ctx.save_for_backward(index_N)
        ctx.sizes, ctx.num_rows = sizes, x_RH.shape[0]
        return x_RH[index_N]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NH):
        (index_N,) = ctx.saved_tensors
        return sum_rows(grad_NH, index_N, ctx.sizes, ctx.num_rows).to(grad_NH.dtype), None, None


class _SumRows(torch.autograd.Function):
    """`sum_rows`, whose gradient does not depend on its input."""

    @staticmethod
    def forward(ctx, x_NH, index_N, sizes, num_rows):
        ctx.save_for_backward(index_N)
        ctx.dtype = x_NH.dtype
        return sum_rows(x_NH, index_N, sizes, num_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RH):
        (index_N,) = ctx.saved_tensors
        return grad_RH[index_N].to(ctx.dtype), None, None, None


def _all_to_all(x_NA: torch.Tensor, send_sizes: list[int], receive_sizes: list[int], group) -> torch.Tensor:
    received = x_NA.new_empty(sum(receive_sizes), x_NA.shape[1])
    dist.all_to_all_single(received, x_NA.contiguous(), receive_sizes, send_sizes, group=group)
    return received


class _Exchange(torch.autograd.Function):
    """Rows with their weights and expert ids to the ranks that compute them; the gradients of both come back.

    One function, so that all ranks run its collectives in the same order in backward too.
    """

    @staticmethod
    def forward(ctx, hidden_SH, weights_SJ, ids_SJ, send_sizes, receive_sizes, group):
        ctx.sizes, ctx.group = (send_sizes, receive_sizes), group
        ids_RJ = _all_to_all(ids_SJ, send_sizes, receive_sizes, group)
        ctx.mark_non_differentiable(ids_RJ)
        return (
            _all_to_all(hidden_SH, send_sizes, receive_sizes, group),
            _all_to_all(weights_SJ, send_sizes, receive_sizes, group),
            ids_RJ,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_hidden_RH, grad_weights_RJ, _):
        send_sizes, receive_sizes = ctx.sizes
        return (
            _all_to_all(grad_hidden_RH, receive_sizes, send_sizes, ctx.group),
            _all_to_all(grad_weights_RJ, receive_sizes, send_sizes, ctx.group),
            *(None, None, None, None),
        )


class _ReturnRows(torch.autograd.Function):
    """Sums back to the ranks that sent the rows."""

    @staticmethod
    def forward(ctx, sums_RH, receive_sizes, send_sizes, group):
        ctx.sizes, ctx.group = (receive_sizes, send_sizes), group
        return _all_to_all(sums_RH, receive_sizes, send_sizes, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_SH):
        receive_sizes, send_sizes = ctx.sizes
        return _all_to_all(grad_SH, send_sizes, receive_sizes, ctx.group), None, None, None


EPImplementationInterface.register(IMPLEMENTATION_NAME, OncePerRankEP)
