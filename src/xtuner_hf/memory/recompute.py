"""What a decoder layer keeps of its forward pass for the backward, and where.

    none        everything: fastest
    selective   the layer's input, the attention kernel's output, the router's logits and the chosen experts
    full        the layer's input alone

The rest is computed again when the layer's backward begins. It works through transformers' own activation
checkpointing, whichever of its doors switches that on: this file only says what its `torch.utils.checkpoint` keeps.

Recomputed routing is the same routing. With `selective` the chosen experts are not chosen again at all; with `full`
they come from the same kernels on the same values. Nor is it counted twice (moe/balance.py).
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import SAC_IGNORED_OPS, CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.hooks import RemovableHandle

from ..device import is_host
from ..moe.router import Router
from .offload import ActivationOffload

logger = logging.getLogger(__name__)

RECOMPUTE_POLICIES = ("none", "selective", "full")

# Kernels that compute attention as one operation: those behind torch's SDPA and its varlen interface, and, by a part of
# their names, flash-attn's (whose namespaces carry a hash) and torch_npu's.
_ATTENTION_OPS = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_flash_attention_forward",
    "aten::_efficient_attention_forward",
    "aten::_cudnn_attention_forward",
)
_ATTENTION_NAME_PARTS = ("flash_attn", "varlen_attn", "fusion_attention")
# FSDP marks its steps for profilers, and takes other steps in recompute than in forward: which of its parameters are
# gathered already differs. Marks are nothing to keep, and selective checkpointing takes them for a mismatch.
SAC_IGNORED_OPS.update(
    (torch.ops.profiler._record_function_enter_new.default, torch.ops.profiler._record_function_exit._RecordFunction)
)
_MATRIX_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


@functools.cache
def is_attention(op: Any) -> bool:
    """Whether this operation is a whole attention kernel's forward pass."""
    name = op.name() if hasattr(op, "name") else str(op)
    base_name = name.split(".")[0]
    is_backward = any(part in name for part in ("backward", "bwd", "_grad"))
    return base_name in _ATTENTION_OPS or (any(part in name for part in _ATTENTION_NAME_PARTS) and not is_backward)


class LayerCheckpoint:
    """How the decoder layers of one model are checkpointed: goes around transformers' checkpoint function.

    Args:
        selective: keep attention and routing besides the layer's input.
        offload: where layer inputs wait; None leaves them on the device.
    """

    def __init__(self, *, selective: bool = False, offload: ActivationOffload | None = None):
        self.selective = selective
        self.offload = offload
        self._in_router = False
        self._hooks: list[RemovableHandle] = []

    def around(self, checkpoint: Callable) -> Callable:
        """The function that transformers gives its layers.

        Args:
            checkpoint: `torch.utils.checkpoint.checkpoint` with what the user asked of it.
        """
        options = {"context_fn": self._contexts} if self.selective else {}

        def checkpoint_layer(function, *args):
            # Only the arguments of `checkpoint` are saved under these hooks; inside it puts its own on top.
            with self.offload.hooks() if self.offload is not None else contextlib.nullcontext():
                return checkpoint(function, *args, **options)

        return checkpoint_layer

    def watch_router(self, router: nn.Module) -> None:
        """Know when this router runs: its matrix product looks like any other to the policy."""
        self._hooks.append(router.register_forward_pre_hook(self._enter_router))
        # Also when recompute ends in the middle of it, by an exception of torch's.
        self._hooks.append(router.register_forward_hook(self._leave_router, always_call=True))

    def leave_routers(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter_router(self, *_: Any) -> None:
        self._in_router = True

    def _leave_router(self, *_: Any) -> None:
        self._in_router = False

    def _contexts(self):
        return create_selective_checkpoint_contexts(self._policy)

    def _policy(self, ctx, op, *args, **kwargs) -> CheckpointPolicy:
        is_router_logits = self._in_router and op in _MATRIX_PRODUCTS
        is_routing_ids = self._in_router and op is torch.ops.aten.topk.default
        if is_attention(op) or is_router_logits or is_routing_ids:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE


def set_recompute(model: Any, policy: str, *, offload: bool = False, device: torch.device | None = None) -> None:
    """Choose what the layers of a model keep once activation checkpointing is on; it does not switch it on.

    Args:
        model: one of this package.
        policy: "selective" or "full" ("none" is checkpointing switched off).
        offload: keep layer inputs in pinned host memory between forward and backward.
        device: where the model computes, wanted with `offload`.
    """
    if model.layer_checkpoint is not None:
        model.layer_checkpoint.leave_routers()
    selective = policy == "selective"
    if selective and model.config._attn_implementation == "eager":
        logger.warning(
            "recompute='selective' keeps the output of the attention kernel, but eager attention is not one kernel: it "
            "is computed again with the rest. Load the model with attn_implementation='sdpa' or a flash attention."
        )
    store = None
    if offload:
        if device is None:
            raise ValueError("set_recompute(offload=True) needs the device that the model computes on.")
        if is_host(device):
            logger.warning("activation_offload on a CPU copies within the same memory: it costs time, saves nothing.")
        store = ActivationOffload.of_device(device)
    checkpoint = LayerCheckpoint(selective=selective, offload=store)
    if selective:
        for module in model.modules():
            if isinstance(module, Router):
                checkpoint.watch_router(module)
    model.layer_checkpoint = checkpoint
