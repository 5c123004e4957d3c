"""kernels/npu/grouped_mm.py against a product for each expert, and the traps around the operator."""

from __future__ import annotations

import pytest
import torch

from tests.npu.kernels.pairs import DEVICE, assert_same, tensor
from xtuner_hf.kernels.npu import grouped_mm


def plain(x, weight, ends):
    starts = [0, *ends.tolist()]
    return torch.cat([x[a:b] @ w for a, b, w in zip(starts, starts[1:], weight, strict=False)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", [[2, 1, 3], [0, 6, 0], [0, 0, 6]])
@pytest.mark.parametrize("stored_transposed", [False, True])
def test_product_and_gradients(dtype, counts, stored_transposed, calls):
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    weight = tensor(3, 4, 8, dtype=dtype, seed=1) if stored_transposed else tensor(3, 8, 4, dtype=dtype, seed=1)

    def fused(x, weight, ends):
        return grouped_mm(x, weight.transpose(1, 2) if stored_transposed else weight, ends)

    def reference(x, weight, ends):
        return plain(x, weight.transpose(1, 2) if stored_transposed else weight, ends)

    assert_same(fused, reference, tensor(6, 8, dtype=dtype), weight, ends, dtype=dtype)
    assert calls["npu_grouped_matmul"] == 3


def test_the_operator_itself_drops_the_gradient_in_silence():
    """Why there is an autograd.Function: this fails when torch_npu has a formula of its own."""
    x, weight = (
        tensor(4, 8).to(DEVICE).detach().requires_grad_(),
        tensor(2, 8, 4).to(DEVICE).detach().requires_grad_(),
    )
    counts = torch.tensor([1, 3], device=DEVICE)
    (y,) = torch.ops.npu.npu_grouped_matmul(
        [x], [weight], group_list=counts, group_list_type=1, group_type=0, split_item=2
    )
    y.sum().backward()
    assert x.grad is None
    assert weight.grad is None


def test_one_local_expert_is_a_plain_product(calls):
    ends = torch.tensor([5], dtype=torch.int32)
    assert_same(grouped_mm, plain, tensor(5, 8), tensor(1, 8, 4, seed=1), ends)
    assert not calls


def test_an_empty_rank_has_gradients_of_zero(calls):
    x, weight = tensor(0, 8).to(DEVICE), tensor(3, 8, 4).detach().to(DEVICE).requires_grad_()
    y = grouped_mm(x, weight, torch.zeros(3, dtype=torch.int32, device=DEVICE))
    y.sum().backward()
    assert y.shape == (0, 4)
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert not calls


def test_a_gradient_that_is_a_broadcast_number(calls):
    ends = torch.tensor([2, 6], dtype=torch.int32)
    assert_same(
        lambda *a: grouped_mm(*a).sum(), lambda *a: plain(*a).sum(), tensor(6, 8), tensor(2, 8, 4, seed=1), ends
    )
    assert calls["npu_grouped_matmul"] == 3


def test_autocast_computes_in_its_dtype():
    ends = torch.tensor([2, 6], dtype=torch.int32, device=DEVICE)
    with torch.autocast("npu", dtype=torch.bfloat16):
        assert grouped_mm(tensor(6, 8).to(DEVICE), tensor(2, 8, 4).to(DEVICE), ends).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("counts", "message"), [([4], "one group"), ([1, 1], "covers 2 rows of 4"), ([5, -1], "must not fall")]
)
def test_calls_that_an_npu_refuses_are_refused(counts, message):
    weight = tensor(len(counts), 8, 4).to(DEVICE)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.npu.npu_grouped_matmul(
            [tensor(4, 8).to(DEVICE)],
            [weight],
            group_list=torch.tensor(counts, device=DEVICE),
            group_list_type=1,
            group_type=0,
            split_item=2,
        )
