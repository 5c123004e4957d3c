"""Dispatch and combine on the NPU against the same on the CPU."""

from __future__ import annotations

import pytest
import torch

from tests.npu.kernels.pairs import DEVICE, assert_same, tensor
from xtuner_hf.kernels.device_operators import FusedOperators
from xtuner_hf.moe import combine as combine_room
from xtuner_hf.moe.combine import combine
from xtuner_hf.moe.dispatcher import count_tokens, dispatch

IDS = torch.stack([torch.randperm(5, generator=torch.Generator().manual_seed(i))[:2] for i in range(7)])


def round_trip(hidden, weights, ids):
    rows = dispatch(hidden, ids, 5)
    return combine(rows.x_RH * 2, weights, rows.row_of_slot_R)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_there_and_back(dtype, calls):
    assert_same(round_trip, round_trip, tensor(7, 6, dtype=dtype), tensor(7, 2, seed=1), IDS, dtype=dtype)
    operators = ("npu_moe_token_permute", "npu_moe_token_permute_grad_v2")
    operators += ("_npu_moe_token_unpermute", "npu_moe_token_unpermute_grad_v2")
    assert [calls[name] for name in operators] == [1] * 4


def test_rows_stand_by_expert_and_are_found_again():
    rows = dispatch(tensor(7, 6).to(DEVICE), IDS.to(DEVICE), 5)
    assert torch.equal(rows.offsets_E.cpu().long(), IDS.reshape(-1).bincount(minlength=5).cumsum(0))
    token_of_slot = torch.arange(7).repeat_interleave(2)
    assert torch.equal(rows.x_RH.cpu()[rows.row_of_slot_R.cpu()], tensor(7, 6)[token_of_slot])


def test_weights_in_fp32_beside_rows_in_bf16_are_not_rounded(monkeypatch):
    """What the plain combine computes on the NPU, in fp32, is what the operator gives."""
    y, weights = tensor(14, 6, dtype=torch.bfloat16).to(DEVICE), tensor(7, 2).to(DEVICE)
    rows = torch.randperm(14).int().to(DEVICE)
    fused = combine(y, weights, rows)
    monkeypatch.setattr(combine_room, "fused_on", lambda device: FusedOperators())
    assert torch.equal(fused, combine(y, weights, rows.long()))


def test_a_rank_without_tokens(calls):
    hidden = tensor(0, 6).detach().to(DEVICE).requires_grad_()
    weights = torch.ones(0, 2, device=DEVICE, requires_grad=True)
    output = round_trip(hidden, weights, torch.zeros(0, 2, dtype=torch.int64, device=DEVICE))
    assert output.shape == (0, 6)
    output.sum().backward()
    assert hidden.grad is not None
    assert weights.grad is not None
    assert not calls


def test_tokens_are_counted_without_histc():
    """histc takes no integers on an NPU, and counts what lies on an edge on either side of it."""
    with pytest.raises(RuntimeError, match="NPU restriction: histc"):
        torch.histc(IDS.to(DEVICE), bins=5, min=0, max=4)
    assert torch.equal(count_tokens(IDS.to(DEVICE), 5).cpu(), IDS.reshape(-1).bincount(minlength=5))
