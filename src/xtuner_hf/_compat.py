"""Names of torch and HuggingFace libraries that this package leans on and that their documentation does not promise.

Checked with torch 2.13, transformers 5.23 and TRL 1.16; `tests/test_compat.py` fails when one moves or changes its
signature.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import torch
from huggingface_hub.serialization._base import parse_size_to_int
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, revert_weight_conversion
from transformers.distributed.utils import initialize_distributed_mesh
from transformers.utils.output_capturing import OutputRecorder
from trl.kernels import ChunkedLogProbFunction

if TYPE_CHECKING:
    from trl.chat_template_utils import has_generation_markers, is_chat_template_stop_token_trained
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
    from trl.trainer.utils import global_then_local_main_first

# Imported when first used: TRL's trainers take seconds, and models need none of them.
_LAZY_HOMES = {
    "DataCollatorForLanguageModeling": "trl.trainer.sft_trainer",
    "global_then_local_main_first": "trl.trainer.utils",
    "has_generation_markers": "trl.chat_template_utils",
    "is_chat_template_stop_token_trained": "trl.chat_template_utils",
}

__all__ = [
    "ChunkedLogProbFunction",
    "ConversionOps",
    "DataCollatorForLanguageModeling",
    "OutputRecorder",
    "WeightConverter",
    "compute_local_shape_and_global_offset",
    "cpu_flash_attention",
    "cpu_flash_attention_backward",
    "get_checkpoint_conversion_mapping",
    "global_then_local_main_first",
    "has_generation_markers",
    "initialize_distributed_mesh",
    "is_chat_template_stop_token_trained",
    "parse_size_to_int",
    "register_checkpoint_conversion_mapping",
    "revert_weight_conversion",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY_HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY_HOMES[name]), name)


def cpu_flash_attention(query, key, value, mask, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's flash attention for CPU: output [B, N, S, D] and the log-sum-exp [B, N, S] that SDPA keeps to itself."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=mask, scale=scaling
    )


def cpu_flash_attention_backward(grad_output, query, key, value, output, lse, mask, scaling: float):
    """Gradients of query, key and value."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_output, query, key, value, output, lse, 0.0, False, attn_mask=mask, scale=scaling
    )
