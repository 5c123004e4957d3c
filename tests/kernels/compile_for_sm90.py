"""Compiles every Triton kernel for an H200 (sm_90), which needs no GPU: a process of its own, TRITON_INTERPRET unset.

python -m tests.kernels.compile_for_sm90      # prints what became of each kernel
"""

from __future__ import annotations

import json
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from xtuner_hf.kernels import triton_fp8, triton_rows

HALF, INT, LONG, FLOAT, FP8 = "*bf16", "*i32", "*i64", "*fp32", "*fp8e4nv"
TILE = {"ROWS": 8, "COLUMNS": 512}
SIZES = {"EXPERTS": 256, "BLOCK": 32}
GPT_OSS = {"HAS_BIAS": True, "HAS_LIMIT": True, "INTERLEAVED": True} | TILE

PRODUCT = {"num_warps": 8, "num_stages": 3}

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
    triton_fp8.quantise_rows_kernel: ([HALF, FP8, FLOAT, "i32", "i32"], {"ROWS": 32, "SIZE": 128}),
    triton_fp8.quantise_columns_kernel: (
        [HALF, INT, FP8, FLOAT, "i32", "i32", "i32"],
        {"TAKES": True, "COLUMNS": 32, "SIZE": 128},
    ),
    triton_fp8.quantise_blocks_kernel: ([HALF, FP8, FLOAT, "i32", "i32"], {"SIZE": 128}),
}
TILE_OF_FP8 = "tensordesc<fp8e4nv[128,128]>"
PRODUCTS: dict[str, tuple[Any, list[str], dict[str, Any]]] = {
    f"{kernel.__name__}, {'by descriptors' if described else 'by pointers'}": (
        kernel,
        [operand, FLOAT, operand, FLOAT, INT, HALF, *["i32"] * sizes],
        constants | {"SIZE": 128, "DESCRIBED": described},
    )
    for described, operand in ((True, TILE_OF_FP8), (False, FP8))
    for kernel, sizes, constants in (
        (triton_fp8.mm_kernel, 4, {"EXPERTS": 128, "SIDE_BY_SIDE": 8}),
        (triton_fp8.outer_kernel, 3, {}),
    )
}


def compile_kernel(kernel: Any, types: list[str], constants: dict[str, Any], **options: Any) -> Any:
    names = [name for name in kernel.arg_names if name not in constants]
    signature = dict(zip(names, types, strict=True)) | {name: "constexpr" for name in constants}
    # As for a launch with pointers of torch's and sizes that are multiples of 16.
    divisible = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if name in names and "desc" not in signature[name]
    }
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants, divisible)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


TENSOR_CORES = "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3"


def main() -> dict[str, dict[str, int]]:
    """By kernel: bytes of shared memory, and how often the products' code multiplies, copies ahead and spills."""
    found = {}
    for kernel, (types, constants) in KERNELS.items():
        found[kernel.__name__] = {"shared": compile_kernel(kernel, types, constants).metadata.shared}
    for name, (kernel, types, constants) in PRODUCTS.items():
        compiled = compile_kernel(kernel, types, constants, **PRODUCT)
        code = compiled.asm["ptx"]
        counts = {"multiplies": TENSOR_CORES, "copies": "cp.async", "spills": "st.local"}
        found[name] = {"shared": compiled.metadata.shared} | {what: code.count(text) for what, text in counts.items()}
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
