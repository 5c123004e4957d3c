"""The one room that knows the kinds of device apart: cuda, npu and cpu."""

from __future__ import annotations

import time

import torch

# Dense bf16 matrix rate in FLOP/s, from the makers' data sheets (no sparsity). The longest name that a device's own
# name contains counts.
DATA_SHEET_BF16_FLOPS = {
    "A100": 312e12,
    "A800": 312e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H800": 989e12,
    "H20": 148e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def device_name(device: torch.device) -> str:
    """What the maker calls it, "NVIDIA H200" say; "cpu" for a CPU."""
    if device.type == "cpu":
        return "cpu"
    return torch.get_device_module(device).get_device_name(device)


def data_sheet_flops(name: str) -> float | None:
    """Dense bf16 FLOP/s of the device of that name, None where no data sheet is known here."""
    known = [key for key in DATA_SHEET_BF16_FLOPS if key in name]
    return DATA_SHEET_BF16_FLOPS[max(known, key=len)] if known else None


def logits_tile_width(device: torch.device) -> int:
    """Vocabulary entries that a chunked loss scores at once.

    On a CPU a tile of 1,024 stays in the cache (2.1x faster than 8,192 at 1,024 tokens, hidden 128, vocabulary 152k);
    an accelerator wants matrix products that fill it.
    """
    return 1024 if device.type == "cpu" else 8192


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on the device; a CPU has none queued."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def measured_matmul_flops(device: torch.device, repeats: int = 5) -> float:
    """FLOP/s of a square matrix product on this device, the best of some: bf16, and fp32 on a CPU.

    Takes a tenth of a second or so.
    """
    size, dtype = (1024, torch.float32) if device.type == "cpu" else (8192, torch.bfloat16)
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(repeats + 1):  # the first one also warms up
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
