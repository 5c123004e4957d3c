"""Buffers that stay in fp32 whatever dtype a model is cast to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

# What selects experts, and what turns positions into angles: bf16 changes experts, and logits by some 4e-3.
FP32_BUFFERS = ("e_score_correction_bias", "inv_freq", "original_inv_freq")


@contextlib.contextmanager
def fp32_buffers_kept(model: nn.Module) -> Iterator[None]:
    """Casts inside move these buffers to their device and leave their values."""
    before = [
        (module, name, module._buffers[name])
        for module in model.modules()
        for name in FP32_BUFFERS
        if module._buffers.get(name) is not None
    ]
    yield
    for module, name, buffer in before:
        after = module._buffers[name]
        if buffer is not None and after is not None and after.dtype != torch.float32:
            module._buffers[name] = buffer.to(after.device, torch.float32)
