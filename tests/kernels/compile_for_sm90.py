"""Compiles every Triton kernel for an H200 (sm_90), which needs no GPU: a process of its own, TRITON_INTERPRET unset.

python -m tests.kernels.compile_for_sm90      # prints {kernel: bytes of shared memory}
"""

from __future__ import annotations

import json
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from xtuner_hf.kernels import triton_rows

HALF, INT, LONG, FLOAT = "*bf16", "*i32", "*i64", "*fp32"
TILE = {"ROWS": 8, "COLUMNS": 512}
SIZES = {"EXPERTS": 256, "BLOCK": 32}
GPT_OSS = {"HAS_BIAS": True, "HAS_LIMIT": True, "INTERLEAVED": True} | TILE

# kernel: types of its arguments in their order, and its constants
KERNELS: dict[Any, tuple[list[str], dict[str, Any]]] = {
    triton_rows.count_kernel: ([LONG, INT, "i32", "i32"], SIZES),
    triton_rows.place_kernel: ([LONG, INT, INT, INT, "i32", "i32"], SIZES),
    triton_rows.take_kernel: ([HALF, INT, HALF, "i32", "i32", "i32"], TILE),
    triton_rows.sum_slots_kernel: ([HALF, INT, FLOAT, HALF, "i32", "i32"], {"HAS_BASE": True, "TOP_K": 8} | TILE),
    triton_rows.gate_kernel: ([HALF, HALF, LONG, FLOAT, INT, HALF, "i32", "i32", *["fp32"] * 3], GPT_OSS),
    triton_rows.gate_backward_kernel: (
        [HALF, HALF, HALF, LONG, FLOAT, INT, HALF, HALF, FLOAT, "i32", "i32", *["fp32"] * 3],
        GPT_OSS,
    ),
    triton_rows.segment_sum_kernel: ([HALF, INT, FLOAT, "i32"], {"ROWS": 64, "COLUMNS": 128}),
}


def compile_kernel(kernel: Any, types: list[str], constants: dict[str, Any], **options: Any) -> Any:
    names = [name for name in kernel.arg_names if name not in constants]
    signature = dict(zip(names, types, strict=True)) | {name: "constexpr" for name in constants}
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


if __name__ == "__main__":
    print(
        json.dumps({kernel.__name__: compile_kernel(kernel, *what).metadata.shared for kernel, what in KERNELS.items()})
    )
