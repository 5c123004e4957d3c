"""Adapters in a plan: PEFT's own, placed and sharded as a trainer does it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..models.auto import num_experts
from .devices import PlanError

# Linear layers of decoder layers, but for routers; towers call theirs "layer".
_PROJECTIONS = r".*\.layers\.\d+\.(self_attn|mlp|mlp\.shared_experts)\.\w+_proj\w*"


def lora_of_rank(rank: int, config: PreTrainedConfig) -> Any:
    """PEFT's configuration of adapters on attention, dense MLPs, shared and routed experts.

    Raises:
        PlanError: for a rank below 1.
    """
    from peft import LoraConfig

    from ..moe.lora import ADAPTED

    if rank < 1:
        raise PlanError(f"lora_rank is {rank}; it must be 1 or more.")
    experts = [f"mlp.experts.{name}" for name in ADAPTED] if num_experts(config) else None
    return LoraConfig(r=rank, target_modules=_PROJECTIONS, target_parameters=experts)


def with_adapters(model: Any, adapter: Any) -> Any:
    """PEFT around a model of this package; on the meta device if the model is.

    Args:
        adapter: PEFT's configuration; it is not changed.
    """
    from peft import get_peft_model

    with torch.device(model.device):
        return get_peft_model(model, copy.deepcopy(adapter))
