"""InternVL around the language models of this package. Parameter names, `model_type` and checkpoints are those of
transformers and the Hub (`*-HF` repositories).

Legend: B rows, S positions of a rank, N tiles, Q image tokens of a tile, H hidden size of the language model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.models.internvl import modeling_internvl as hf
from transformers.models.internvl.configuration_internvl import InternVLConfig

from ...attention.ulysses import SequenceShard
from ...host_reads import host_reads
from ..auto import causal_lm_class
from ..base import HubModelMixin, use_hub_layout
from ..head import ChunkedLossMixin, LMHead
from ..moe_model import BalanceDefaults
from .images import check_counts, compute_features, place_features
from .vision import InternVLVisionModel, keep_own_rules

use_hub_layout("internvl")


class InternVLModel(HubModelMixin, hf.InternVLModel):
    """Vision tower, projector, and the trunk of a language model of this package."""

    _fsdp_plan: ClassVar = {"multi_modal_projector": "free_full_weight"}
    vision_class: ClassVar[type[InternVLVisionModel]] = InternVLVisionModel

    def __init__(self, config: Any):
        PreTrainedModel.__init__(self, config)
        text_class: Any = causal_lm_class(config.text_config)
        self.vision_tower = self.vision_class(config.vision_config)
        self.multi_modal_projector = hf.InternVLMultiModalProjector(config)
        self.language_model = text_class.model_class(config.text_config)
        self.post_init()

    def init_parallel_plans(self) -> None:
        super().init_parallel_plans()
        keep_own_rules(self)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: Any = None,
        num_tiles: torch.Tensor | None = None,
        image_sizes: Any = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Any,
    ):
        """As in transformers; what the language models of this package take besides (`token_mask`, `routes`,
        `sequence`, boundaries of packed documents) goes to theirs.

        Args:
            pixel_values: [N, 3, height, width]: all tiles of the rows, in the order of their tokens. None or 0 tiles
                for rows of text.
            num_tiles: of each row; for those who slice images by row, not read here.

        Raises:
            ValueError: image tokens that are not as many as the tiles fill.
        """
        is_decoding = past_key_values is not None and past_key_values.get_seq_length() > 0
        if inputs_embeds is None and mm_encoder_outputs is None and not is_decoding:
            encode = functools.partial(
                self._encode,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
            )
            inputs_embeds = self.embed(input_ids, pixel_values, encode, kwargs.get("sequence"))
            input_ids = pixel_values = None
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )

    def embed(
        self,
        input_ids: Any,
        pixel_values: torch.Tensor | None,
        encode: Callable[[torch.Tensor], torch.Tensor],
        sequence: SequenceShard | None = None,
    ) -> torch.Tensor:
        """[B, S, H]: embedded tokens, with the features of images where their tokens stand.

        Args:
            encode: tiles [N, 3, height, width] -> features [N, Q, H].
        """
        whole_ids = input_ids if sequence is None else sequence.input_ids
        is_image_BL = whole_ids == self.config.image_token_id
        if pixel_values is None:
            pixel_values = self._no_tile(whole_ids.device)
        row_I = host_reads().image_tokens(is_image_BL.flatten())
        check_counts(len(row_I), len(pixel_values), self.tokens_per_tile, self.config.image_token_id)
        if not len(pixel_values) and not self._takes_part_without_images():
            return self.get_input_embeddings()(input_ids)
        features_NQH = compute_features(pixel_values, encode, sequence)
        return place_features(self.get_input_embeddings()(input_ids), is_image_BL, row_I, features_NQH, sequence)

    def _encode(self, pixel_values: torch.Tensor, **selection: Any) -> torch.Tensor:
        return self.get_image_features(pixel_values=pixel_values, return_dict=True, **selection).pooler_output

    @property
    def tokens_per_tile(self) -> int:
        patches = self.vision_tower.embeddings.patch_embeddings.num_patches
        return int(patches * self.config.downsample_ratio**2)

    def _no_tile(self, device: torch.device) -> torch.Tensor:
        vision: Any = self.config.vision_config
        return torch.zeros(0, vision.num_channels, *vision.image_size, device=device)

    def _takes_part_without_images(self) -> bool:
        """Whether other ranks wait for this one in the vision tower, or its gradients have to be there."""
        return self.training or isinstance(self.vision_tower.encoder.layer[0], FSDPModule)


class InternVLForConditionalGeneration(ChunkedLossMixin, HubModelMixin, hf.InternVLForConditionalGeneration):
    """InternVL with a language-model head; `chunked_loss=True` with `labels` never builds the full logits.

    Attributes:
        vision_recompute: what the vision tower recomputes ("none", "selective", "full"); None: as the language model.
    """

    _fsdp_plan: ClassVar = {"lm_head": "keep_full_weight"}
    model_class: ClassVar[type[InternVLModel]] = InternVLModel
    vision_recompute: str | None = None
    keeps_unknown_tensors: ClassVar[bool] = True

    def __init__(self, config: InternVLConfig):
        PreTrainedModel.__init__(self, config)
        self.model = self.model_class(config)
        text: Any = config.text_config
        self.lm_head = LMHead(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        *,
        labels=None,
        num_tiles=None,
        **kwargs,
    ):
        """As in transformers, and as of the language models of this package. generate() and the trainers read here
        which inputs there are; `InternVLModel.forward` says what those of images hold."""
        named = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels)
        return super().forward(*named, pixel_values=pixel_values, **kwargs)

    @property
    def parts(self) -> dict[str, list[nn.Module]]:
        """What can be frozen and have a learning rate of its own; every parameter is in one of them."""
        trunk: Any = self.model
        return {
            "vision": [trunk.vision_tower],
            "projector": [trunk.multi_modal_projector],
            "language": [trunk.language_model, self.lm_head],
        }

    def freeze(self, parts: Sequence[str]) -> None:
        """Take these parts out of training, adapters in them included; a frozen tower leaves no branch out."""
        for part in parts:
            for module in self.parts[part]:
                module.requires_grad_(False)
        if "vision" in parts:
            tower: Any = self.model.vision_tower
            tower.set_drop_path_rate(0.0)

    @property
    def balance_defaults(self) -> BalanceDefaults:
        text: Any = self.config.text_config
        text_class: Any = causal_lm_class(text)
        return text_class.balance_defaults_of(text) if hasattr(text_class, "balance_defaults_of") else BalanceDefaults()

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, every_n_layers=1):
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, every_n_layers)
        if self.vision_recompute is not None:
            own = self.vision_recompute != "none"
            self.model.vision_tower._set_gradient_checkpointing(own, gradient_checkpointing_func)
