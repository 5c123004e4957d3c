"""Multi-token prediction: decoder layers behind the trunk that predict tokens further ahead (DeepSeek-V3, GLM-4.5).

    h'_i = eh_proj [ enorm(emb(t_{i+k})) ; hnorm(h_i) ]        depth k = 1, 2, ...
    h_i  = decoder_layer(h'_i)
    p(t_{i+k+1}) = softmax(lm_head(shared_head.norm(h_i)))

(arXiv 2412.19437, eq. 21-25). h of depth 0 is the trunk's output behind its final norm, as engines feed the published
weights. Embedding and head are the trunk's own; a checkpoint stores copies of both under the layer's name, which are
written again on saving. In memory the layers stand in `model.layers` behind the last ordinary one, under their Hub
names.

    mtp_loss_coef    None    the layers are not built: a checkpoint's are not loaded, a saved one has none and says so
                     0       loaded and saved as they are, not trained
                     > 0     trained: the loss is L + mtp_loss_coef / D * (L_1 + ... + L_D)

The published coefficient is 0.3, and 0.1 in the last part of pre-training.

Legend: B rows, S positions, H hidden size, D depths.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from .._compat import ConversionOps, WeightConverter
from ..memory.chunked_loss import IGNORE_INDEX
from ..moe.tokens import TokenLayout, shift_left
from ..parallel.prefetch import set_prefetch
from .moe_model import MoECausalLMMixin, MoEDecoderLayer, MoEModelMixin

# A mixin: the layer that it stands in front of is its base for the type checker alone.
if TYPE_CHECKING:
    _LayerBase = MoEDecoderLayer
else:
    _LayerBase = object

logger = logging.getLogger(__name__)

# What a trunk's forward is called with that means nothing to a layer without a cache.
_TRUNK_ONLY = ("past_key_values", "use_cache", "output_hidden_states", "output_attentions", "output_router_logits")


@dataclass
class MTPCausalLMOutput(CausalLMOutputWithPast):
    """`loss` is the objective; `mtp_loss` the mean of the depths' losses in it, before the coefficient, detached."""

    mtp_loss: torch.Tensor | None = None


class _SharedHead(nn.Module):
    """Holds the norm in front of the head under its Hub name; the head itself is the trunk's."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm


class MTPLayerMixin(_LayerBase):
    """In front of a family's decoder layer."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)  # type: ignore[call-arg, arg-type]
        norm_class = type(self.input_layernorm)
        self.enorm = norm_class(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = norm_class(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = _SharedHead(norm_class(config.hidden_size, eps=config.rms_norm_eps))

    def forward(self, hidden_states: torch.Tensor, next_embeds: torch.Tensor, **kwargs):
        """[B, S, H] twice -> the layer's output, and the same behind its norm (which FSDP gathers only in here)."""
        joined = torch.cat([self.enorm(next_embeds), self.hnorm(hidden_states)], dim=-1)
        hidden_states = super().forward(self.eh_proj(joined), **kwargs)
        return hidden_states, self.shared_head.norm(hidden_states)


def same_document(layout: TokenLayout, distance: int) -> torch.Tensor:
    """[B, S] bool: whether a real token has another of its document `distance` positions further on."""
    real_BL, document_BL = layout.rows()
    further_BL = shift_left(document_BL, distance, value=-1)
    return layout.take(real_BL & shift_left(real_BL, distance) & (further_BL == document_BL))


class FurtherTokens:
    """Asks a trunk to run its multi-token prediction layers, and scores what they predict.

    It goes in as an argument, `further=`, and brings the loss out, because TRL's fused head hands on all arguments of a
    trunk and drops all of its outputs but the hidden states. A plain class: FSDP would copy a dataclass.

    Args:
        score: (hidden states [B, S, H], labels [B, S] of these positions) -> summed loss, a model's head; None where
            the layers run only for the load of their experts to be counted.
        labels_BS: of each position itself, as the language model takes them.

    Attributes:
        loss_sum: scalar, the mean over depths of the summed loss over labels; None until a trunk has run.
    """

    def __init__(self, score: Callable[..., torch.Tensor] | None = None, labels_BS: torch.Tensor | None = None) -> None:
        self.score = score
        self.labels_BS = labels_BS
        self.loss_sum: torch.Tensor | None = None

    def take(self, hidden_DBSH: list[torch.Tensor], layout: TokenLayout) -> None:
        """Score the predictions of all depths."""
        if self.score is None or self.labels_BS is None:
            return
        losses_D = []
        for distance, hidden_BSH in enumerate(hidden_DBSH, start=2):
            further_BS = layout.take(shift_left(self.labels_BS, distance, IGNORE_INDEX))
            further_BS = further_BS.masked_fill(~same_document(layout, distance), IGNORE_INDEX)
            losses_D.append(self.score(hidden_BSH, further_BS))
        self.loss_sum = torch.stack(losses_D).mean()


class MTPModelMixin(MoEModelMixin):
    """In front of a family's trunk: builds `config.num_nextn_predict_layers` further layers and runs them on demand."""

    mtp_layer_class: ClassVar[Any]
    mtp_trains = False  # set by the language model, whose forward must then ask for them

    def build_layers(self, config: Any) -> list[nn.Module]:
        first = config.num_hidden_layers
        indices = range(first, first + config.num_nextn_predict_layers)
        return super().build_layers(config) + [self.mtp_layer_class(config, index) for index in indices]

    def run(self, layout: TokenLayout, *, further: FurtherTokens | None = None, **inputs: Any) -> Any:
        """As in the parent; with `further` the multi-token prediction layers run too."""
        if self.training and self.mtp_trains and torch.is_grad_enabled() and further is None:
            raise RuntimeError(
                "mtp_loss_coef trains the multi-token prediction layers, but this forward goes past the loss that they "
                "are part of. Train with MoETrainer or MoESFTTrainer and their own loss, or load the model with "
                "mtp_loss_coef=0 (keep the layers as they are) or None (leave them out)."
            )
        outputs = super().run(layout, **inputs)
        if further is not None:
            further.take(self._predict_further(outputs.last_hidden_state, layout, **inputs), layout)
        return outputs

    def _predict_further(self, hidden_BSH, layout, inputs_embeds, position_ids, **kwargs) -> list[torch.Tensor]:
        kwargs = {name: value for name, value in kwargs.items() if name not in _TRUNK_ONLY}
        position_embeddings = self.rotary_emb(hidden_BSH, position_ids)
        predictions = []
        for depth, layer in enumerate(self.layers[self.config.num_hidden_layers :], start=1):
            # A position whose next token is another document's is computed and not counted: the layers are causal, so
            # no position of its own document sees it.
            hidden_BSH, normed_BSH = layer(
                hidden_BSH,
                self._embeds_further_on(inputs_embeds, layout, depth),
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                layout=_layout_at(layout, depth),
                **kwargs,
            )
            predictions.append(normed_BSH)
        return predictions

    def _embeds_further_on(self, inputs_embeds: torch.Tensor, layout: TokenLayout, distance: int) -> torch.Tensor:
        if layout.sequence is None:
            return shift_left(inputs_embeds, distance)
        # Some of these tokens are on the next rank; their ids are everywhere.
        return self.embed_tokens(layout.take(shift_left(layout.sequence.input_ids, distance)))


def _layout_at(layout: TokenLayout, depth: int) -> TokenLayout:
    return dataclasses.replace(layout, token_mask=same_document(layout, depth))


class MTPCausalLMMixin(MoECausalLMMixin):
    """In front of a family's `...ForCausalLM`.

    Args:
        mtp_loss_coef: see the top of this file; `from_pretrained` and `from_config` pass it on.
    """

    supports_mtp = True

    def __init__(self, config: Any, mtp_loss_coef: float | None = None):
        depths = config.num_nextn_predict_layers
        if mtp_loss_coef is None:
            config = self._without_mtp(config)
        super().__init__(config)
        self.num_mtp_layers = config.num_nextn_predict_layers
        self.mtp_loss_coef: float | None = None
        if mtp_loss_coef is not None:
            self.set_mtp_loss_coef(mtp_loss_coef)
        # What was left out above is no surprise in a checkpoint. (transformers' class ignores layer 61 of any model.)
        left_out = range(config.num_hidden_layers, config.num_hidden_layers + depths - self.num_mtp_layers)
        self._keys_to_ignore_on_load_unexpected = {rf"(^|\.)layers\.{index}\." for index in left_out}

    def _without_mtp(self, config: Any) -> Any:
        depths = config.num_nextn_predict_layers
        if not depths:
            return config
        logger.warning(
            "%s is built without its %d multi-token prediction layer(s): they are not loaded, and a checkpoint saved "
            "from it has none and says num_nextn_predict_layers 0. Pass mtp_loss_coef=0 to keep them as they are, or "
            "a positive number to train them.",
            type(self).__name__,
            depths,
        )
        config = copy.deepcopy(config)
        config.num_nextn_predict_layers = 0
        return config

    def set_mtp_loss_coef(self, coef: float) -> None:
        """Train the multi-token prediction layers with this coefficient from now on; 0: keep them as they are.

        Raises:
            ValueError: for a negative coefficient, or a model that was built without the layers.
        """
        if coef < 0 or not self.num_mtp_layers:
            raise ValueError(
                f"mtp_loss_coef is {coef} and the model has {self.num_mtp_layers} multi-token prediction layers: it "
                "takes at least one (config.num_nextn_predict_layers, and a model loaded with mtp_loss_coef) and a "
                "coefficient of 0 (keep the layers as they are) or more."
            )
        self.mtp_loss_coef = coef
        self.model.mtp_trains = bool(coef)
        set_prefetch(self)  # of a model that is sharded already

    def idle_layers(self) -> list[nn.Module]:
        """The multi-token prediction layers, where they are kept and not trained."""
        layers: Any = self.model.layers
        return [] if self.mtp_loss_coef else list(layers[self.config.num_hidden_layers :])

    def further_tokens(self, labels_BS: torch.Tensor | None = None) -> FurtherTokens | None:
        """What a forward takes as `further`, to be scored by this model's head; None where nothing of it trains."""
        if not self.training or not self.mtp_loss_coef:
            return None
        return FurtherTokens(self.lm_head, labels_BS)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        *,
        chunked_loss: bool = False,
        **kwargs,
    ):
        """As in the parent; in training, `chunked_loss=True` with `labels` adds the loss of the further tokens, whose
        own value is in `mtp_loss`. A forward without gradients runs the layers too: it may count the experts' load."""
        has_loss = chunked_loss and labels is not None
        if has_loss or not torch.is_grad_enabled():
            kwargs.setdefault("further", self.further_tokens(labels if has_loss else None))
        named = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels)
        return super().forward(*named, chunked_loss=chunked_loss, **kwargs)

    def chunked_output(self, trunk_outputs: Any, labels_BS: torch.Tensor, num_items: Any, inputs: dict) -> Any:
        output = super().chunked_output(trunk_outputs, labels_BS, num_items, inputs)
        further = inputs["further"]
        if further is None:
            return output
        mtp_loss = further.loss_sum / num_items
        return MTPCausalLMOutput(loss=output.loss + self.mtp_loss_coef * mtp_loss, mtp_loss=mtp_loss.detach())

    def explain_missing(self, names: set[str]) -> str:
        first = self.config.num_hidden_layers
        layers = {f".layers.{index}." for index in range(first, first + self.num_mtp_layers)}
        if not any(layer in name for name in names for layer in layers):
            return ""
        return (
            " Among them are the multi-token prediction layers, though config.json promises "
            f"{self.num_mtp_layers}: the checkpoint was saved without them (transformers drops them). Load it with "
            "mtp_loss_coef=None, or take these layers from the original checkpoint."
        )


class _KeepTrunks(ConversionOps):
    """Loading: one tensor for the trunk and for the copies that a checkpoint stores under its MTP layers."""

    def __init__(self, name_in_layer: str):
        self.name_in_layer = name_in_layer

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        return {target_patterns[0]: next(input_dict[name] for name in source_patterns if name in input_dict)}

    @property
    def reverse_op(self) -> _StoreCopies:
        return _StoreCopies(self.name_in_layer)


class _StoreCopies(ConversionOps):
    """Saving: the trunk's tensor, and a copy for each MTP layer of the model."""

    def __init__(self, name_in_layer: str):
        self.name_in_layer = name_in_layer

    def convert(self, input_dict, source_patterns, target_patterns, *, model, config, **kwargs):
        (tensors,) = input_dict.values()
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        # transformers' own classes of this model_type use this mapping too, and have no such layers.
        num_copies, first = getattr(model, "num_mtp_layers", 0), config.get_text_config().num_hidden_layers
        names = [f"model.layers.{index}.{self.name_in_layer}" for index in range(first, first + num_copies)]
        return {target_patterns[0]: tensor} | {name: tensor.clone() for name in names}

    @property
    def reverse_op(self) -> _KeepTrunks:
        return _KeepTrunks(self.name_in_layer)


def stored_copies() -> list[WeightConverter]:
    """Conversions for the copies of embedding and head that a checkpoint stores under its MTP layers."""
    pairs = {"model.embed_tokens.weight": "embed_tokens.weight", "lm_head.weight": "shared_head.head.weight"}
    return [
        WeightConverter([name, rf"model.layers.\d+.{copy_name}"], name, [_KeepTrunks(copy_name)])
        for name, copy_name in pairs.items()
    ]
