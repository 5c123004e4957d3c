"""kernels/npu/layers.py against what transformers' modules compute, and their gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.models.glm4_moe.modeling_glm4_moe import apply_rotary_pos_emb
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, GptOssRMSNorm

from tests.npu.kernels.pairs import DEVICE, assert_same, tensor
from xtuner_hf.kernels.npu import clamped_swiglu, rms_norm, rotary, swiglu

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm(dtype, weight_dtype, calls):
    def plain(x, weight):
        norm = GptOssRMSNorm(16, eps=1e-5)
        del norm.weight
        norm.weight = weight
        return norm(x)

    inputs = tensor(3, 5, 16, dtype=dtype), tensor(16, dtype=weight_dtype, seed=1)
    looser = torch.bfloat16 if torch.bfloat16 in (dtype, weight_dtype) else dtype
    assert_same(lambda x, weight: rms_norm(x, weight, 1e-5), plain, *inputs, dtype=looser)
    assert calls["npu_rms_norm"] == calls["npu_rms_norm_backward"] == 1


@DTYPES
@pytest.mark.parametrize("rotated", [8, 16])
def test_rotary_of_all_or_a_part_of_a_head(dtype, rotated, calls):
    angles = torch.rand(2, 5, rotated // 2, generator=torch.Generator().manual_seed(1)).repeat(1, 1, 2) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def plain(x, cos, sin):
        return apply_rotary_pos_emb(x, x, cos, sin)[0]

    assert_same(rotary, plain, tensor(2, 3, 5, 16, dtype=dtype), cos, sin, dtype=dtype)
    assert calls["npu_rotary_mul"] == 1


@DTYPES
def test_swiglu_of_a_view(dtype, calls):
    def plain(x):
        gate, up = x.float()[:, 2:].chunk(2, dim=-1)
        return (F.silu(gate) * up).to(x.dtype)

    assert_same(lambda x: swiglu(x[:, 2:]), plain, tensor(5, 14, dtype=dtype), dtype=dtype)
    assert calls["npu_swiglu"] == calls["npu_swiglu_backward"] == 1


@DTYPES
def test_clamped_swiglu_is_gpt_oss_s(dtype, calls):
    class Limits:
        alpha, limit = 1.702, 0.7  # a limit that half of the numbers pass

    def plain(x):
        return GptOssExperts._apply_gate(Limits, x.float()).to(x.dtype)

    assert_same(lambda x: clamped_swiglu(x, 1.702, 0.7), plain, tensor(50, 12, dtype=dtype), dtype=dtype)
    assert calls["npu_clipped_swiglu"] == 1


@pytest.mark.parametrize("gate", [swiglu, lambda x: clamped_swiglu(x, 1.0, 1.0)])
def test_an_empty_rank_gates_nothing_and_stays_in_the_graph(gate, calls):
    x = torch.ones(3, 8, device=DEVICE, requires_grad=True)
    output = gate(x[:0])
    assert output.shape == (0, 4)
    output.sum().backward()
    assert not x.grad.any()
    assert not calls
