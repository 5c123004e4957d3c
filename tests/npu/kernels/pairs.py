"""The same inputs on the CPU and on the NPU, and what a function makes of them in both places."""

from __future__ import annotations

from collections.abc import Callable

import torch

DEVICE = torch.device("npu:0")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def on_npu(value):
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().to(DEVICE).requires_grad_(value.requires_grad)


def assert_same(fused: Callable, plain: Callable, *inputs, dtype: torch.dtype = torch.float32) -> None:
    """Outputs and the gradients of all inputs that want one; `plain` runs on the CPU."""
    ours = [on_npu(value) for value in inputs]
    output, expected = fused(*ours), plain(*inputs)
    torch.testing.assert_close(output.cpu(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9)).to(expected.dtype)
    output.backward(grad.to(DEVICE))
    expected.backward(grad)
    for number, (found, wanted) in enumerate(zip(ours, inputs, strict=True)):
        if isinstance(wanted, torch.Tensor) and wanted.requires_grad:
            assert found.grad is not None, f"input {number} has no gradient"
            torch.testing.assert_close(
                found.grad.cpu(), wanted.grad, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * wanted.grad.abs().max()
            )
