"""What a device reaches in the kernels that a layer is made of, as parts of its matrix rate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..attention.documents import Documents
from ..attention.kernels import choose
from ..device import data_sheet_flops, device_name, is_host, measured_matmul_flops, synchronize
from .shapes import Shape


def seconds_of(function: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """Median time of a call."""
    function()
    taken = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def efficiencies(shape: Shape, tokens: int, length: int, device: torch.device) -> dict[str, Any]:
    """What `xtuner-hf plan` takes in place of its own guesses.

    Returns:
        `device`, `flops_per_second` that efficiencies are parts of (the data sheet's where there is one, otherwise
        measured), `measured_flops_per_second`, and `efficiencies`: dense_matmul, grouped_matmul, attention_forward and
        attention_backward, at this shape.
    """
    dtype = torch.float32 if is_host(device) else torch.bfloat16
    measured = measured_matmul_flops(device)
    peak = data_sheet_flops(device_name(device)) or measured
    config: Any = shape.config()
    parts = {
        "dense_matmul": _dense(config, tokens, device, dtype),
        "grouped_matmul": _grouped(config, tokens, device, dtype),
        **_attention(config, tokens, length, device, dtype),
    }
    return {
        "device": device_name(device),
        "flops_per_second": peak,
        "measured_flops_per_second": measured,
        "efficiencies": {name: flops / peak for name, flops in parts.items()},
    }


def _dense(config: Any, tokens: int, device: torch.device, dtype: torch.dtype) -> float:
    hidden, heads = config.hidden_size, config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or hidden // heads)
    x_TH = torch.randn(tokens, hidden, device=device, dtype=dtype)
    weight_HW = torch.randn(hidden, width, device=device, dtype=dtype)
    return 2 * tokens * hidden * width / seconds_of(lambda: x_TH @ weight_HW, device)


def _grouped(config: Any, tokens: int, device: torch.device, dtype: torch.dtype) -> float:
    hidden, experts, top_k = config.hidden_size, config.num_local_experts, config.num_experts_per_tok
    width = 2 * (getattr(config, "moe_intermediate_size", None) or config.intermediate_size)
    rows = tokens * top_k // experts * experts
    x_RH = torch.randn(rows, hidden, device=device, dtype=dtype)
    weight_EWH = torch.randn(experts, width, hidden, device=device, dtype=dtype)
    ends = torch.arange(1, experts + 1, device=device, dtype=torch.int32) * (rows // experts)
    taken = seconds_of(lambda: F.grouped_mm(x_RH, weight_EWH.transpose(1, 2), offs=ends), device)
    return 2 * rows * hidden * width / taken


def _attention(config: Any, tokens: int, length: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    heads, size = config.num_attention_heads, getattr(config, "qk_head_dim", None) or config.head_dim
    kv_heads = heads if hasattr(config, "kv_lora_rank") else config.num_key_value_heads
    shapes = ((tokens, heads, size), (tokens, kv_heads, size), (tokens, kv_heads, size))
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes)
    positions = (torch.arange(tokens, device=device) % length)[None]
    documents = Documents.of_batch(1, tokens, device, position_ids=positions)
    kernel = choose(device.type, dtype, size, False, False)

    def forward() -> torch.Tensor:
        return kernel(q, k, v, documents, scaling=size**-0.5, window=None, sinks_N=None, dropout=0.0)

    grad = torch.randn_like(forward())

    def both() -> None:
        torch.autograd.grad(forward(), (q, k, v), grad)

    forward_seconds = seconds_of(forward, device)
    backward_seconds = max(seconds_of(both, device) - forward_seconds, 1e-9)
    # Queries times keys and probabilities times values, over half of the square; five such products in backward, the
    # scores once more among them (plan/costs.py counts the same).
    product = 2 * heads * size * tokens * length / 2
    return {"attention_forward": 2 * product / forward_seconds, "attention_backward": 5 * product / backward_seconds}
