"""Model FLOPs of training: the work that the mathematics asks for, whatever an implementation really does.

Matrix products of the parameters that a token meets (experts: K of E), and causal attention counted half. Not counted,
as is usual: embedding look-ups, routers, norms, activations and recomputation. Qwen3-30B-A3B comes to 23.01 GFLOP per
token at 4,096 tokens, forward and backward. An image counts by its tiles, each of which costs the same.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .head import LMHead

_LAYER = re.compile(r"\.layers\.(\d+)\.")

FORWARD, BACKWARD_TO_INPUT, BACKWARD_TO_WEIGHT = 2, 2, 2  # FLOPs per multiply-add


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of forward and backward, linear in two sums over the documents of a batch and in the tiles of its images.

    Args:
        per_token: of the matrix products with parameters, and of attention within a sliding window.
        per_squared_length: of full attention, for each (document length)^2.
        per_tile: of vision tower and projector.
    """

    per_token: float
    per_squared_length: float
    per_tile: float = 0.0

    @classmethod
    def of_model(cls, model: nn.Module) -> TrainingFlops:
        """Count a model, sharded or on the meta device as well."""
        depths = _trained_depths(model)
        windowed, full = _attention_flops(_text_config(model), further_layers=depths)
        return cls(_matrix_flops_per_token(model, depths) + windowed, full, _flops_per_tile(model))

    def __call__(self, num_tokens: float, squared_lengths: float, num_tiles: float = 0) -> float:
        """FLOPs of a batch.

        Args:
            num_tokens: real tokens.
            squared_lengths: sum over documents of their squared number of tokens.
            num_tiles: of images.
        """
        return self.per_token * num_tokens + self.per_squared_length * squared_lengths + self.per_tile * num_tiles


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config()


def _trained_depths(model: Any) -> int:
    """Multi-token prediction layers that training runs; a model may hold some that it does not."""
    return model.num_mtp_layers if getattr(model, "mtp_loss_coef", None) else 0


def _matrix_flops_per_token(model: nn.Module, depths: int) -> float:
    config, total = _text_config(model), 0.0
    share = _share_of_experts_met(model)
    for name, module in model.named_modules():
        layer = _LAYER.search(name)
        if _vision_part(name) or (layer and int(layer[1]) >= config.num_hidden_layers + depths):
            continue
        if isinstance(module, nn.Linear):
            # Each depth of multi-token prediction goes through the head once more.
            times = 1 + depths if isinstance(module, LMHead) else share.get(module, 1.0)
            total += _flops(module.weight) * times
        elif hasattr(module, "num_experts") and "down_proj" in dict(module.named_parameters(recurse=False)):
            weights_EXX = [parameter for parameter in module.parameters() if parameter.dim() == 3]
            # Not `module.num_experts`: under expert parallelism that is the number on this rank.
            total += sum(_flops(weight) * config.num_experts_per_tok / weight.shape[0] for weight in weights_EXX)
    return total


def _share_of_experts_met(model: nn.Module) -> dict[nn.Module, float]:
    """Of the factors that PEFT keeps for all experts of a layer in one matrix, the part that a token meets."""
    share: dict[nn.Module, float] = {}
    for wrapper in model.modules():
        if hasattr(wrapper, "parameter_name") and hasattr(wrapper, "lora_A"):  # PEFT's ParamWrapper
            met = _text_config(model).num_experts_per_tok / wrapper.num_experts
            share |= {factor: met for factors in (wrapper.lora_A, wrapper.lora_B) for factor in factors.values()}
    return share


def _flops(weight: torch.Tensor) -> float:
    # A frozen weight (LoRA's base, say) has no gradient of its own to compute.
    backward = BACKWARD_TO_INPUT + (BACKWARD_TO_WEIGHT if weight.requires_grad else 0)
    return weight.numel() * (FORWARD + backward)


def _vision_part(name: str) -> str | None:
    """Which part of a model that reads images a module belongs to, None for the language model."""
    return next((part for part in ("vision_tower", "multi_modal_projector") if part in name.split(".")), None)


def _flops_per_tile(model: nn.Module) -> float:
    """Of a tower that looks at every patch and one class token, without a mask, and of a projector of image tokens.

    Where nothing of the tower trains, no gradient flows into it.
    """
    config: Any = model.config
    trains = {_vision_part(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    tower_trains, total = "vision_tower" in trains, 0.0
    projector_trains = "multi_modal_projector" in trains
    for name, module in model.named_modules():
        part = _vision_part(name)
        if part is None or not isinstance(module, (nn.Linear, nn.Conv2d)):
            continue
        vision = config.vision_config
        num_patches = math.prod(side // patch for side, patch in zip(vision.image_size, vision.patch_size, strict=True))
        if isinstance(module, nn.Conv2d):  # the patches themselves: nothing trains below
            times, to_input = num_patches, 0
        elif part == "vision_tower":
            times, to_input = num_patches + 1, BACKWARD_TO_INPUT * tower_trains
        else:
            trains_below = tower_trains or (projector_trains and not name.endswith("linear_1"))
            times, to_input = config.image_seq_length, BACKWARD_TO_INPUT * trains_below
        to_weight = BACKWARD_TO_WEIGHT * module.weight.requires_grad
        total += module.weight.numel() * times * (FORWARD + to_input + to_weight)
        if name.endswith("attention.q_proj"):
            per_pair = 2 * module.weight.shape[0]  # queries times keys, probabilities times values
            total += (num_patches + 1) ** 2 * per_pair * FORWARD * (3 if tower_trains else 1)
    return total


def _attention_flops(config: Any, further_layers: int = 0) -> tuple[float, float]:
    """(per token, per squared document length): a layer with a sliding window meets at most its keys, at any length.

    Queries times keys and probabilities times values: one product of each kind forward and two backward, over half of
    the square. Head sizes may differ (MLA). A document shorter than the window is counted as if it had the window's.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    qk_dim = getattr(config, "qk_head_dim", None) or head_dim
    v_dim = getattr(config, "v_head_dim", None) or head_dim
    per_pair = 3 * FORWARD * config.num_attention_heads * (qk_dim + v_dim)
    window = getattr(config, "sliding_window", None) or 0
    layer_types = getattr(config, "layer_types", None) or []
    num_windowed = sum(kind == "sliding_attention" for kind in layer_types) if window else 0
    num_full = config.num_hidden_layers - num_windowed + further_layers
    return num_windowed * per_pair * window, num_full * per_pair / 2
