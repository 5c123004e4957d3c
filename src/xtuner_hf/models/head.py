"""The output head of our language models, and the forward that scores labels through it without full logits.

Legend: B rows, S positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..memory.chunked_loss import IGNORE_INDEX, LossWeights, chunked_cross_entropy
from ..moe.tokens import shift_left


class LMHead(nn.Linear):
    """A linear head that can also score labels. Both go through `forward`, where FSDP gathers the weight."""

    def forward(
        self,
        hidden_BSH: torch.Tensor,
        labels_BS: torch.Tensor | None = None,
        weights: LossWeights | None = None,
    ) -> torch.Tensor:
        """Logits [B, S, V]; with labels, the sum of the cross entropy over them (scalar fp32).

        Args:
            labels_BS: the label of each position itself (already shifted), -100 where there is none.
            weights: of these labels; 1 by default.
        """
        if labels_BS is None:
            return super().forward(hidden_BSH)
        hidden_TH = hidden_BSH.reshape(-1, hidden_BSH.shape[-1])
        weights_T = None if weights is None or weights.weights_BS is None else weights.weights_BS.reshape(-1)
        return chunked_cross_entropy(hidden_TH, self.weight, self.bias, labels_BS.reshape(-1), weights_T)


class ChunkedLossMixin:
    """Adds `chunked_loss=True` to a causal language model's forward; without it the parent's forward runs."""

    model: nn.Module
    lm_head: LMHead

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        *,
        chunked_loss: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        loss_weights: LossWeights | None = None,
        **kwargs,
    ):
        """What the parent takes and returns, by the same names and in the same order (transformers' trainer keeps the
        columns of a data set that it finds here, and `generate` refuses what it does not find), and:

        Args:
            chunked_loss: with `labels`, compute the loss without full logits and return none.
            num_items_in_batch: what the summed loss is divided by; the number of labels here by default. A whole
                number: FSDP casts others to bf16.
            loss_weights: how much each label counts, and what the sum is divided by instead. (transformers' trainer
                takes every argument with "label" in its name for one that its batches must have.)

        Raises:
            ValueError: for weights without `chunked_loss`.
        """
        named = {"attention_mask": attention_mask, "position_ids": position_ids}
        named |= {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds}
        kwargs |= {name: value for name, value in named.items() if value is not None}
        if not chunked_loss or labels is None:
            if loss_weights is not None:
                raise ValueError("loss_weights need chunked_loss=True and labels: the loss over full logits has none.")
            if labels is not None:
                kwargs |= {"labels": labels, "num_items_in_batch": num_items_in_batch}
            return super().forward(input_ids=input_ids, **kwargs)
        kwargs.pop("logits_to_keep", None)
        if loss_weights is not None:
            num_items_in_batch = loss_weights.total
        elif num_items_in_batch is None:
            num_items_in_batch = (labels[:, 1:] != IGNORE_INDEX).sum().clamp(min=1)
        trunk_outputs = self.model(input_ids=input_ids, **kwargs)
        return self.chunked_output(trunk_outputs, labels, num_items_in_batch, {**kwargs, "loss_weights": loss_weights})

    def chunked_output(
        self, trunk_outputs: Any, labels_BS: torch.Tensor, num_items: torch.Tensor | int, inputs: dict[str, Any]
    ) -> CausalLMOutputWithPast:
        """The loss from the trunk's outputs; `inputs` is what the trunk was called with, and `loss_weights`.

        With a `sequence` among the inputs, labels and weights are those of the whole rows and the loss is this rank's
        share.
        """
        next_labels_BS = shift_left(labels_BS, 1, IGNORE_INDEX)
        sequence = inputs.get("sequence")
        weights = inputs["loss_weights"]
        if weights is not None:
            weights = weights.moved(lambda weights_BS: shift_left(weights_BS, 1))
        if sequence is not None:
            next_labels_BS = sequence.take(next_labels_BS)
            weights = None if weights is None else weights.moved(sequence.take)
        total = self.lm_head(trunk_outputs.last_hidden_state, next_labels_BS, weights)
        return CausalLMOutputWithPast(loss=total / num_items)
