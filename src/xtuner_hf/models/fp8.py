"""FP8 training of a model: its experts and dense projections multiply in FP8, everything else stays as it is.

What is in a decoder layer and is a matrix product with a weight is FP8, except the router and the projection that joins
the inputs of a multi-token prediction layer; the head and the embeddings are outside. Names, shapes and dtypes of
parameters do not change, so checkpoints do not either.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..kernels.fp8_linear import Fp8Linear
from ..kernels.fp8_weights import Fp8State, cache_quantised, fp8_kernels
from ..kernels.fused import refusal_of
from ..moe.experts import expert_weights, implementation_name
from ..parallel.fp8_gather import gather_in_fp8
from ..parallel.shard import is_sharded

logger = logging.getLogger(__name__)

# Parts of names: adapters are too thin to gain, the others are high precision in published FP8 checkpoints.
KEPT_HIGH = ("lora_", "eh_proj", "vision_tower", "multi_modal_projector")


def use_fp8(model: Any, device: Any) -> None:
    """Switch a model of this package to FP8 products, in place; `model.fp8` then is its `Fp8State`.

    Args:
        model: sharded or not, before its first forward pass.
        device: where it will compute.

    Raises:
        ValueError: for a device without FP8 products, or experts that have no such kernel.
    """
    fp8_kernels(device)
    experts = [
        module for module in model.modules() if hasattr(module, "gate_up_proj") and hasattr(module, "num_experts")
    ]
    for module in experts:
        refusal = refusal_of(expert_weights(module))
        if refusal is not None:
            raise ValueError(f"fp8=True has no kernel for these experts: {refusal}. Leave fp8 off.")
    if experts:
        model.set_experts_implementation(implementation_name("fp8"))
    linears = [module for name, module in dense_projections(model)]
    for linear in linears:
        # As FSDP does with what it shards: the module stays, its class is a subclass.
        linear.__class__ = Fp8Linear
    weights = [linear.weight for linear in linears]
    weights += [weight for module in experts for weight in (module.gate_up_proj, module.down_proj)]
    logger.info("FP8: %d dense projections, experts of %d layers.", len(linears), len(experts))
    model.fp8 = Fp8State(gather_in_fp8(model) if is_sharded(model) else [cache_quantised(weight) for weight in weights])


def dense_projections(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Names and modules of the linear layers that become FP8."""
    for name, module in model.named_modules():
        in_layer = ".layers." in f".{name}"
        if type(module) is nn.Linear and in_layer and not any(part in name for part in KEPT_HIGH):
            yield name, module
