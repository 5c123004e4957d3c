"""The FP8 kernels in Triton against the same recipe in plain torch; as `triton_cases.py`.

TRITON_INTERPRET=1 python -m tests.kernels.triton_fp8_cases
"""

from __future__ import annotations

import json
import sys

import torch

from tests.kernels.triton_cases import relative_error
from xtuner_hf.kernels import fp8, rows, triton_fp8

# (rows of each expert, A, B): ragged features, an expert without rows, one of several blocks.
GROUPS = {"ragged": ([128, 0, 256], 200, 72), "whole": ([0, 128, 128], 128, 256)}
# (rows, A, B) of a dense layer.
DENSE = {"one token": (1, 136, 40), "ragged": (150, 72, 200)}


def quantise_cases(x_RA: torch.Tensor) -> dict[str, float]:
    errors = {}
    ids_TK = torch.rand(x_RA.shape[0], 3, device=x_RA.device).topk(2).indices
    grouping = rows.group_by_expert(ids_TK, 3, fp8.BLOCK)
    for name, *taken in (
        ("quantise_rows",),
        ("quantise_columns",),
        ("quantise_columns", grouping),
        ("quantise_blocks",),
    ):
        found, expected = (getattr(module, name)(x_RA, *taken) for module in (triton_fp8, fp8))
        name += " of taken rows" if taken else ""
        errors[f"{name}, scale"] = relative_error(found.scale, expected.scale)
        steps = (found.values.view(torch.int8).int() - expected.values.view(torch.int8).int()).abs()
        if x_RA.device.type == "cpu":
            # Triton's interpreter loses the carry of a value that rounds up to a power of two (124.3 becomes 64).
            steps[expected.values.view(torch.int8) % 8 == 0] = 0
        # On a GPU, whose division is not exact, a value on the edge between two may fall to either side.
        errors[f"{name}, values"] = float(steps.max() > 1) + float((steps > 0).float().mean() > 1e-3)
    return errors


def product_cases(sizes: list[int], a: int, b: int, device: str, is_dense: bool) -> dict[str, float]:
    torch.manual_seed(0)
    num_rows = sum(sizes)
    offsets_E = torch.tensor(sizes, device=device).cumsum(0).int()
    # Scales of very different sizes: one that is read at the wrong place shows.
    x_RA, grad_RB, weight_EBA = (
        torch.randn(*shape, device=device) * torch.randn(*shape[:-1], 1, device=device).exp()
        for shape in ((num_rows, a), (num_rows, b), (len(sizes), b, a))
    )
    x, weight = fp8.quantise_rows(x_RA), fp8.quantise_blocks(weight_EBA)
    columns = fp8.quantise_columns(grad_RB), fp8.quantise_columns(x_RA)
    if is_dense:
        weight = fp8.Quantised(*(part[0] for part in weight))
        results = [(m.mm(x, weight, torch.float32), m.outer(*columns, torch.float32)) for m in (triton_fp8, fp8)]
    else:
        results = [
            (m.grouped_mm(x, weight, offsets_E, torch.float32), m.grouped_outer(*columns, offsets_E, torch.float32))
            for m in (triton_fp8, fp8)
        ]
    (row, outer), (exact_row, exact_outer) = results
    return {"row product": relative_error(row, exact_row), "outer product": relative_error(outer, exact_outer)}


def all_cases(device: str = "cpu") -> dict[str, float]:
    torch.manual_seed(0)
    x_RA = torch.randn(150, 200, device=device) * 3
    x_RA[:, :128] *= 1e-3
    x_RA[7, :128] = 0
    errors = quantise_cases(x_RA)
    for name, (sizes, a, b) in GROUPS.items():
        errors |= {f"grouped {k}, {name}": v for k, v in product_cases(sizes, a, b, device, False).items()}
    for name, (num_rows, a, b) in DENSE.items():
        errors |= {f"dense {k}, {name}": v for k, v in product_cases([num_rows], a, b, device, True).items()}
    return errors


if __name__ == "__main__":
    print(json.dumps(all_cases(*sys.argv[1:])))
