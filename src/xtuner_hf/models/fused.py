"""What of a decoder layer besides experts and attention kernels is computed in fewer passes over memory on a GPU.

    norms            torch's fused RMSNorm, forward and backward (torch.nn.functional.rms_norm)
    compile_blocks   torch.compile of each layer's attention (projections, QK-norm, RoPE), norms and dense MLPs; the
                     attention kernel, the router and the experts stay outside, so a batch of other documents compiles
                     nothing anew

Parameters and their names stay as they are.
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from ..attention.varlen import VARLEN_ATTENTION, varlen_attention_forward
from ..kernels.fp8_linear import Fp8Linear
from ..moe.block import SparseMoEBlock
from .norm import put_in_front

logger = logging.getLogger(__name__)


class FusedRMSNorm(nn.Module):
    """In front of a family's RMSNorm: x / rms(x) * weight in one kernel, rounded once, and not before the weight."""

    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H] in the same dtype."""
        weight = self.weight.to(hidden_states.dtype)
        with torch.autocast(hidden_states.device.type, enabled=False):
            return F.rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon)


def fuse_norms(model: nn.Module) -> int:
    """Let every RMSNorm of a model use torch's fused kernel, in place; returns how many do.

    Results are not equal to transformers' to the last bit in bf16, which rounds before it multiplies by the weight.
    """
    number = put_in_front(model, FusedRMSNorm)
    logger.info("RMSNorm: torch's fused kernel, in %d modules.", number)
    return number


def compile_blocks(model: nn.Module, backend: str = "inductor") -> list[str]:
    """Compile what stands around the kernels of each decoder layer, in place; returns the names of the modules.

    Compilation happens in the first forward and backward passes.
    """
    names = []
    AttentionInterface.register(VARLEN_ATTENTION, torch.compiler.disable(varlen_attention_forward))
    for name, module in model.named_modules():
        if isinstance(module, Fp8Linear):
            # It looks up quantised weights by object and version, which a graph cannot hold.
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
        if _is_compiled(name, module):
            module.compile(backend=backend)
            names.append(name)
    logger.info("torch.compile (%s): attention, norms and dense MLPs, %d modules.", backend, len(names))
    return names


def _is_compiled(name: str, module: nn.Module) -> bool:
    in_layer = ".layers." in f".{name}"
    part = name.rsplit(".", 1)[-1]
    is_norm = part in ("input_layernorm", "post_attention_layernorm")
    is_dense = part in ("mlp", "shared_experts") and not isinstance(module, SparseMoEBlock)
    return in_layer and (part == "self_attn" or is_norm or is_dense)
