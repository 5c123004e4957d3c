"""One MoE block, forward and backward: peak activation memory and time, ours next to transformers'.

    python -m benchmarks.moe_block                           # this machine's CPU, a small block
    python -m benchmarks.moe_block --shape qwen3-30b-a3b     # a GPU

`overhead` is what routing, dispatch, activation and combine cost: the time of the whole block over that of its six
grouped matrix products alone, minus 1, in the same run. `peak` is the most that lives at once above weights, their
gradients and the block's input: what the block adds while it runs forward and backward.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from xtuner_hf.device import device_name, synchronize
from xtuner_hf.models.qwen3_moe.modeling import build_sparse_block

RESULTS = Path(__file__).parent / "results"

SHAPES = {
    "small": {"hidden_size": 256, "moe_intermediate_size": 96, "num_experts": 32, "num_experts_per_tok": 8},
    "qwen3-30b-a3b": {
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
}
# What computes the experts: transformers' own, ours step by step (which was all before there was a fused path), fused.
KERNELS = {"transformers grouped_mm": "grouped_mm", "step by step": "xtuner_grouped_mm", "fused": "xtuner_fused"}
BARE = "bare grouped products"


class PeakOfLiving(TorchDispatchMode):
    """The most bytes that tensors made in here occupy at once, by what operators return: any device, exact."""

    def __init__(self):
        super().__init__()
        self.peak = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in known | self._known:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


def _storages(tree: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def make_block(kernel: str, options: dict, dtype: torch.dtype, device: str) -> nn.Module:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SHAPES[options["shape"]], norm_topk_prob=True)
    config._experts_implementation = KERNELS[kernel]
    with torch.device(device):
        is_stock = kernel.startswith("transformers")
        block = Qwen3MoeSparseMoeBlock(config) if is_stock else build_sparse_block(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block.to(dtype)


def make_input(options: dict, dtype: torch.dtype, device: str) -> torch.Tensor:
    size = SHAPES[options["shape"]]["hidden_size"]
    return torch.randn(1, options["tokens"], size, device=device, dtype=dtype, requires_grad=True)


def peak_bytes(kernel: str, options: dict, dtype: torch.dtype, device: str) -> int:
    """Above weights, gradients and input, over forward and backward."""
    block, hidden_BSH = make_block(kernel, options, dtype, device), make_input(options, dtype, device)
    grad_BSH = torch.randn_like(hidden_BSH)
    for parameter in (*block.parameters(), hidden_BSH):
        parameter.grad = torch.zeros_like(parameter)
    if device != "cpu":
        block(hidden_BSH).backward(grad_BSH)  # what libraries keep for themselves from the first call on
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        block(hidden_BSH).backward(grad_BSH)
        return torch.cuda.max_memory_allocated() - before
    with PeakOfLiving() as meter:
        block(hidden_BSH).backward(grad_BSH)
    return meter.peak


def median_seconds(steps: dict[str, Callable[[], None]], device: str, repeats: int) -> dict[str, float]:
    """Of each, in turns: what else a machine does meanwhile meets all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            synchronize(torch.device(device))
            start = time.perf_counter()
            step()
            synchronize(torch.device(device))
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def bare_products(options: dict, dtype: torch.dtype, device: str) -> Callable[[], None]:
    """The six grouped matrix products of a forward and backward, on rows that lie ready."""
    shape = SHAPES[options["shape"]]
    hidden, inner, experts = shape["hidden_size"], shape["moe_intermediate_size"], shape["num_experts"]
    block, x = make_block("step by step", options, dtype, device), make_input(options, dtype, device)
    _, _, ids_TK = block.gate(x[0])
    offsets_E = torch.bincount(ids_TK.reshape(-1), minlength=experts).cumsum(0).int()
    rows = ids_TK.numel()
    x_RH, up_RF = (torch.randn(rows, width, device=device, dtype=dtype) for width in (hidden, 2 * inner))
    gated_RI, grad_RH = (torch.randn(rows, width, device=device, dtype=dtype) for width in (inner, hidden))
    up_EFH, down_EHI = block.experts.gate_up_proj.detach(), block.experts.down_proj.detach()

    def step() -> None:
        F.grouped_mm(x_RH, up_EFH.transpose(1, 2), offs=offsets_E)
        F.grouped_mm(gated_RI, down_EHI.transpose(1, 2), offs=offsets_E)
        F.grouped_mm(grad_RH, down_EHI, offs=offsets_E)
        F.grouped_mm(grad_RH.t(), gated_RI, offs=offsets_E)
        F.grouped_mm(up_RF, up_EFH, offs=offsets_E)
        F.grouped_mm(up_RF.t(), x_RH, offs=offsets_E)

    return step


def whole_step(kernel: str, options: dict, dtype: torch.dtype, device: str) -> Callable[[], None]:
    """Forward and backward of the block."""
    block, hidden_BSH = make_block(kernel, options, dtype, device), make_input(options, dtype, device)
    grad_BSH = torch.randn_like(hidden_BSH)

    def step() -> None:
        block.zero_grad()
        hidden_BSH.grad = None
        block(hidden_BSH).backward(grad_BSH)

    return step


def measure(options: dict, dtype: torch.dtype, device: str, repeats: int) -> dict:
    """Figures by kernel."""
    peaks = {kernel: peak_bytes(kernel, options, dtype, device) for kernel in KERNELS}
    steps = {kernel: whole_step(kernel, options, dtype, device) for kernel in KERNELS}
    seconds = median_seconds({BARE: bare_products(options, dtype, device), **steps}, device, repeats)
    figures: dict = {BARE: {"milliseconds": seconds[BARE] * 1e3}}
    for kernel in KERNELS:
        figures[kernel] = {
            "milliseconds": seconds[kernel] * 1e3,
            "overhead": seconds[kernel] / seconds[BARE] - 1,
            "peak_megabytes": peaks[kernel] / 1e6,
            "peak_over_transformers": peaks[kernel] / peaks["transformers grouped_mm"],
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = arguments.dtype or ("float32" if device == "cpu" else "bfloat16")
    options = {"shape": arguments.shape, "tokens": arguments.tokens}
    figures = {
        "device": platform.processor() if device == "cpu" else device_name(torch.device(device)),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        **options,
        **SHAPES[arguments.shape],
        "figures": measure(options, getattr(torch, dtype), device, arguments.repeats),
    }
    output = arguments.output or RESULTS / f"moe_block_{arguments.shape}_{device}.json"
    output.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
