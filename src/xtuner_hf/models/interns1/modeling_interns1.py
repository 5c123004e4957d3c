"""Intern-S1 of transformers' own parts. This file travels with checkpoints, for `trust_remote_code=True`: it uses
nothing but transformers (5 or newer). Names of parameters are those of the published checkpoints."""

from typing import Any

from torch import nn
from transformers import AutoModel
from transformers.models.internvl.modeling_internvl import (
    InternVLForConditionalGeneration,
    InternVLModel,
    InternVLMultiModalProjector,
    InternVLPreTrainedModel,
    InternVLVisionModel,
)

from .configuration_interns1 import InternS1Config, InternS1VisionConfig


class InternS1VisionModel(InternVLVisionModel):
    config: InternS1VisionConfig


class InternS1Model(InternVLModel):
    config: InternS1Config

    def __init__(self, config: Any):
        InternVLPreTrainedModel.__init__(self, config)
        self.vision_tower = InternS1VisionModel(config.vision_config)
        self.multi_modal_projector = InternVLMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()


class InternS1ForConditionalGeneration(InternVLForConditionalGeneration):
    config: InternS1Config

    def __init__(self, config: Any):
        InternVLPreTrainedModel.__init__(self, config)
        self.model = InternS1Model(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
