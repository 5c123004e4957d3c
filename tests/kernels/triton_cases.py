"""The Triton kernels against plain torch in fp64; run by tests in Triton's interpreter, by benchmarks on a GPU.

TRITON_INTERPRET=1 python -m tests.kernels.triton_cases

prints {case: worst error, relative to the largest entry}.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from tests.kernels.layers import EXPERTS, ROUTINGS, make_experts, step
from tests.moe.ep_cases import WAITING_OPERATORS, OperatorSpy
from xtuner_hf.kernels import fp8, fp8_weights, fused, rows, triton_fp8, triton_rows
from xtuner_hf.kernels.swiglu import SwiGLU

GATES = {
    "swiglu": SwiGLU(),
    "gpt_oss": SwiGLU(interleaved=True, alpha=1.702, limit=0.8, up_shift=1.0),
}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = found.double().cpu() - expected.double().cpu()
    return (difference.abs().max() / expected.abs().max().clamp(min=1e-30)).item() if expected.numel() else 0.0


def grouping_case(ids_TK: torch.Tensor, align: int) -> float:
    found, expected = (module.group_by_expert(ids_TK, EXPERTS, align) for module in (triton_rows, rows))
    return float(not all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(found, expected, strict=True)))


def row_cases(ids_TK: torch.Tensor, align: int, dtype: torch.dtype, width: int, inner: int) -> dict[str, float]:
    """Every kernel on rows, with NaN wherever nothing may be read."""
    device = ids_TK.device
    generator = torch.Generator(device.type).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    def poisoned(*shape: int) -> torch.Tensor:
        x = random(*shape)
        x[grouping.slot_of_row_R < 0] = torch.nan
        return x

    grouping = rows.group_by_expert(ids_TK, EXPERTS, align)
    tokens, num_rows = ids_TK.shape[0], grouping.slot_of_row_R.numel()
    errors = {}
    x_TH, y_RH, base_TH = random(tokens, width), poisoned(num_rows, width), random(tokens, width).float()
    errors["take"] = relative_error(triton_rows.take(x_TH, grouping), rows.take(x_TH.double(), grouping))
    for name, base in (("sum_slots", None), ("sum_slots with a base", base_TH)):
        expected = rows.sum_slots(y_RH.double(), grouping, base)
        errors[name] = relative_error(triton_rows.sum_slots(y_RH, grouping, base), expected)
    gate_up_RF, grad_RI = poisoned(num_rows, 2 * inner), poisoned(num_rows, inner)
    weights_TK = torch.rand(ids_TK.shape, generator=generator, device=device)
    for kind, swiglu in GATES.items():
        bias_EF = random(EXPERTS, 2 * inner) if kind == "gpt_oss" else None
        exact_bias = None if bias_EF is None else bias_EF.double()
        exact = (gate_up_RF.double(), exact_bias, ids_TK, weights_TK.double(), grouping, swiglu)
        ours = (gate_up_RF, bias_EF, ids_TK, weights_TK, grouping, swiglu)
        errors[f"{kind} gate"] = relative_error(triton_rows.gate(*ours), rows.gate(*exact))
        found = triton_rows.gate_backward(grad_RI.clone(), *ours)
        expected = rows.gate_backward(grad_RI.double(), *exact)
        names = ("gate again", "gate's gradient", "weights' gradient")
        for name, a, b in zip(names, found, expected, strict=True):
            errors[f"{kind} {name}"] = relative_error(a, b)
        grad_RF = expected[1].to(dtype)
        errors[f"{kind} segment_sum"] = relative_error(
            triton_rows.segment_sum(grad_RF, grouping.offsets_E), rows.segment_sum(grad_RF.double(), grouping.offsets_E)
        )
    return errors


def fp8_for_the_interpreter() -> Any:
    """The FP8 products, with plain quantisation: the interpreter's rounding is wrong (triton_fp8_cases)."""
    names = triton_fp8.__all__
    return SimpleNamespace(**{name: getattr(fp8 if "quantise" in name else triton_fp8, name) for name in names})


def path_cases() -> dict[str, float]:
    """Whole experts, forward and backward, with every step a Triton kernel (but the products in high precision)."""
    errors, ids_TK = {}, ROUTINGS["random"]
    for kind in ("swiglu", "gpt_oss"):
        experts = make_experts(kind, torch.float32)
        expected = {kernel: step(kernel, experts, ids_TK, torch.float32) for kernel in ("fused", "fp8")}
        with (
            mock.patch.object(fused, "row_kernels", return_value=triton_rows),
            mock.patch.object(fused, "fp8_kernels", return_value=fp8_for_the_interpreter()),
            mock.patch.object(fp8_weights, "fp8_kernels", return_value=fp8_for_the_interpreter()),
            OperatorSpy(WAITING_OPERATORS) as spy,
        ):
            found = {kernel: step(kernel, experts, ids_TK, torch.float32) for kernel in expected}
        errors[f"path, {kind}, operators that wait"] = float(len(spy.found))
        for kernel, values in expected.items():
            for name, value in values.items():
                error = (found[kernel][name] - value).norm() / value.norm()
                errors[f"path, {kernel}, {kind}, {name}"] = error.item()
    return errors


def all_cases(device: str = "cpu") -> dict[str, float]:
    errors = path_cases() if device == "cpu" else {}  # benchmarks/gpu_session.py has them for a GPU, in bf16
    errors["grouping, no token"] = grouping_case(torch.empty(0, 2, dtype=torch.int64, device=device), 16)
    for routing, ids_TK in ROUTINGS.items():
        ids_TK = ids_TK.to(device)
        for align, dtype in ((1, torch.float32), (16, torch.bfloat16)):
            errors[f"grouping, {routing}, aligned to {align}"] = grouping_case(ids_TK, align)
            if device == "cpu" and routing in ("one takes all", "many"):
                continue  # the interpreter is slow, and these are special for the grouping alone
            cases = row_cases(ids_TK[:64], align, dtype, width=88, inner=40)
            errors |= {f"{name}, {routing}, aligned to {align}, {dtype}": error for name, error in cases.items()}
    return errors


if __name__ == "__main__":
    print(json.dumps(all_cases(*sys.argv[1:])))
