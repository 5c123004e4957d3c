"""Sequence parallelism around a model: whole batches in, whole results out, a share of the positions on each rank.

    all ranks of a group have the same batch
      -> pad to a multiple of the ranks, shift labels, take this rank's positions
      -> the model; its attention layers talk to the other ranks (attention/ulysses.py)
      -> per-token results are gathered, losses summed: what one process would have

So whatever computes a loss from these results, of a language model, of preferences or of rollouts, computes the same
number on every rank of the group, and its gradient flows back into this rank's positions alone. The gradients of the
parameters are then shares, which FSDP adds up as it does those of other ranks: no factor anywhere.

Legend: B rows, P ranks that share them, L positions of a row as given, S = ceil(L / P) positions of a rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

from ..attention.documents import Documents
from ..attention.ulysses import SequenceRanks, SequenceShard
from ..memory.logprobs import IGNORE_INDEX, PER_TOKEN
from ..moe.replay import NATIVE, RearrangedRoutes
from ..moe.tokens import TokenLayout, shift_left
from .layout import ParallelLayout

# Boundaries of documents in other words, which padding would make wrong.
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def sequence_ranks(layout: ParallelLayout, device_type: str) -> SequenceRanks:
    """The ranks that share this rank's sequences: axis "sp" of a mesh over all ranks. Every rank must call it."""
    shape = (layout.data_size, layout.sp_size)
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=("data", "sp"))["sp"]
    return SequenceRanks(mesh.get_group(), mesh.size(), mesh.get_local_rank())


class SequenceParallelModel:
    """Calls a model on this rank's share of a batch.

    Args:
        model: of this package, also with TRL's fused head; any wrapping is fine.
        ranks: that have the same batches.
    """

    def __init__(self, model: Any, ranks: SequenceRanks):
        self.model = model
        self.ranks = ranks

    def __call__(self, **inputs: Any) -> Any:
        """As the model, with results of whole rows: `loss`, and what TRL's fused head gives for each token. All else,
        hidden states and logits say, is of this rank's share.

        Args:
            inputs: the same on all ranks of the group.

        Raises:
            ValueError: for inputs that cannot be shared.
        """
        labels_BL = inputs.pop("labels", None)
        length = inputs["input_ids"].shape[1] if inputs.get("input_ids") is not None else 0
        shard, inputs = split(inputs, self.ranks)
        if labels_BL is None:
            return self.model(**inputs)
        num_items = inputs.get("num_items_in_batch")
        if num_items is None:
            num_items = (labels_BL[:, 1:] != IGNORE_INDEX).sum().clamp(min=1)
        padding = (0, shard.real_BL.shape[1] - length)
        labels_BL = F.pad(labels_BL, padding, value=IGNORE_INDEX)
        weights = inputs.get("loss_weights")
        if weights is not None:
            inputs["loss_weights"] = weights.moved(lambda weights_BS: F.pad(weights_BS, padding))
        inputs["num_items_in_batch"] = num_items
        if inputs.get("fused_lm_head"):
            further = inputs.get("further")
            if further is not None:
                further.labels_BS = labels_BL
            outputs = self.model(**inputs, shift_labels=shard.take(shift_left(labels_BL, 1, IGNORE_INDEX)))
            for name in PER_TOKEN:
                if outputs.get(name) is not None:
                    outputs[name] = _Gather.apply(outputs[name], self.ranks)[:, : length - 1]
            if further is not None:
                further.loss_sum = _Sum.apply(further.loss_sum, self.ranks)
        elif inputs.get("chunked_loss"):
            outputs = self.model(**inputs, labels=labels_BL)
            if outputs.get("mtp_loss") is not None:
                outputs["mtp_loss"] = self.ranks.sum(outputs["mtp_loss"])
        else:
            raise ValueError(
                "sp_size above 1 needs a loss that is computed without full logits (chunked_loss=True), and this "
                "forward asked for another one."
            )
        outputs["loss"] = _Sum.apply(outputs["loss"], self.ranks)
        return outputs


def split(inputs: dict[str, Any], ranks: SequenceRanks) -> tuple[SequenceShard, dict[str, Any]]:
    """This rank's share of a model's inputs, without labels; `sequence` among them is the share itself.

    Args:
        inputs: `input_ids` [B, L] and perhaps `attention_mask`, `position_ids` or `token_mask`; others are passed on.
    """
    if inputs.get("input_ids") is None:
        raise ValueError(
            "sp_size above 1 shares token ids between ranks, and this forward has no input_ids; set sp_size to 1."
        )
    input_ids = inputs["input_ids"]
    num_rows, length = input_ids.shape
    padding = -length % ranks.size
    masks = {name: inputs.get(name) for name in ("attention_mask", "position_ids", "token_mask")}
    position_ids = masks["position_ids"]
    if position_ids is None:
        position_ids = torch.arange(length, device=input_ids.device)[None]
    # Padding is a document of its own, and no real token.
    tail = torch.arange(padding, device=input_ids.device).expand(position_ids.shape[0], -1)
    position_ids = torch.cat([position_ids, tail], dim=1).expand(num_rows, -1)
    real_BL = F.pad(TokenLayout.of_batch({"input_ids": input_ids, **masks}).real_T.view(num_rows, length), (0, padding))
    boundaries: dict[str, Any] = {"position_ids": position_ids}
    if masks["attention_mask"] is not None:
        boundaries["attention_mask"] = real_BL
    elif not padding:
        boundaries["cu_seq_lens_q"] = inputs.get("cu_seq_lens_q")
    documents = Documents.of_batch(num_rows, length + padding, input_ids.device, **boundaries)
    shard = SequenceShard(ranks, F.pad(input_ids, (0, padding)), real_BL, documents)
    others = {name: value for name, value in inputs.items() if name not in (*masks, *_BOUNDARIES)}
    if others.get("routes") is not None:
        others["routes"] = _share_of_routes(others["routes"], shard, length)
    return shard, others | {
        "input_ids": shard.take(shard.input_ids),
        "position_ids": shard.take(position_ids),
        "token_mask": shard.take(real_BL),
        "sequence": shard,
    }


def _share_of_routes(routes: Any, shard: SequenceShard, length: int) -> RearrangedRoutes:
    """Routes by position of whole rows [B, L], for a forward of this rank's share."""
    num_rows, padded_length = shard.input_ids.shape

    def put(ids_TK: torch.Tensor) -> torch.Tensor:
        whole_BLK = ids_TK.new_full((num_rows, padded_length, ids_TK.shape[1]), NATIVE)
        shard.take_view(whole_BLK).copy_(ids_TK.unflatten(0, (num_rows, -1)))
        return whole_BLK[:, :length].flatten(0, 1)

    def take(ids_NK: torch.Tensor) -> torch.Tensor:
        whole_BLK = F.pad(ids_NK.unflatten(0, (num_rows, -1)), (0, 0, 0, padded_length - length), value=NATIVE)
        return shard.take(whole_BLK).flatten(0, 1)

    return RearrangedRoutes(routes, put, take)


class _Gather(torch.autograd.Function):
    """[B, S] -> [B, P*S] on all ranks. What follows is the same on all and counts once, so backward is a slice."""

    @staticmethod
    def forward(ctx, x_BS, ranks):
        ctx.ranks = ranks
        sent = x_BS.to(torch.uint8) if x_BS.dtype == torch.bool else x_BS.contiguous()
        parts = sent.new_empty(ranks.size * sent.shape[0], sent.shape[1])
        dist.all_gather_into_tensor(parts, sent, group=ranks.group)
        return parts.unflatten(0, (ranks.size, -1)).transpose(0, 1).flatten(1, 2).to(x_BS.dtype)

    @staticmethod
    def backward(ctx, grad_BL):
        return grad_BL.chunk(ctx.ranks.size, dim=1)[ctx.ranks.rank].contiguous(), None


class _Sum(torch.autograd.Function):
    """The sum over ranks, on all ranks; as it counts once, each share's gradient is the sum's."""

    @staticmethod
    def forward(ctx, share, ranks):
        return ranks.sum(share)

    @staticmethod
    def backward(ctx, grad):
        return grad, None
