"""FP8 products: the recipe against one written out block by block, and layers made of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.kernels.layers import EXPERTS, HIDDEN, ROUTINGS, make_experts, step
from xtuner_hf.kernels import fp8, fp8_weights
from xtuner_hf.kernels.fp8_linear import Fp8Linear
from xtuner_hf.kernels.fp8_weights import GatheredWeight, cache_quantised, operand
from xtuner_hf.moe.experts import expert_weights


def by_hand(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Round trip of a matrix through e4m3 with a scale of 448ths of the largest value of each block."""
    result = torch.empty_like(x, dtype=torch.float32)
    for i in range(0, x.shape[0], height):
        for j in range(0, x.shape[1], width):
            block = x[i : i + height, j : j + width].float()
            scale = block.abs().max() / 448 if block.abs().max() > 0 else torch.tensor(1.0)
            result[i : i + height, j : j + width] = (block / scale).to(torch.float8_e4m3fn).float() * scale
    return result


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * torch.randn(*shape[:-1], 1, generator=generator).exp()
    x[..., : shape[-1] // 2] *= 1e-2
    return x


@pytest.mark.parametrize("shape", [(1, 1), (5, 300), (300, 130), (128, 256)])
def test_quantises_by_ragged_blocks(shape):
    x_RA = matrix(*shape)
    x_RA[0] = 0
    for quantised, block, expected in (
        (fp8.quantise_rows(x_RA), (1, 128), by_hand(x_RA, 1, 128)),
        (fp8.quantise_columns(x_RA), (1, 128), by_hand(x_RA.t(), 1, 128)),
        (fp8.quantise_blocks(x_RA), (128, 128), by_hand(x_RA, 128, 128)),
    ):
        assert quantised.scale.shape == tuple(
            math.ceil(size / edge) for size, edge in zip(quantised.values.shape, block, strict=True)
        )
        assert torch.equal(fp8.dequantise(quantised, block), expected)
        assert quantised.values.is_contiguous()
        assert quantised.scale.is_contiguous()


def test_nan_stays_nan():
    x_RA = matrix(4, 256)
    x_RA[2, 5] = torch.nan
    quantised = fp8.quantise_rows(x_RA)
    assert fp8.dequantise(quantised, (1, 128)).isnan().any(1).tolist() == [False, False, True, False]


def linear(rows: int, a: int, b: int, bias: bool = False) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    layer = nn.Linear(a, b, bias=bias)
    layer.weight.data = matrix(b, a, seed=1) / a**0.5
    layer.__class__ = Fp8Linear
    return layer, matrix(rows, a, seed=2).requires_grad_(), matrix(rows, b, seed=3)


@pytest.mark.parametrize("sizes", [(1, 40, 24), (150, 200, 72), (256, 128, 384)])
def test_linear_is_the_recipe(sizes):
    layer, x_TA, grad_TB = linear(*sizes, bias=True)
    y_TB = layer(x_TA)
    y_TB.backward(grad_TB)
    weight_BA, x, grad = layer.weight.detach(), x_TA.detach(), grad_TB
    expected_y = by_hand(x, 1, 128) @ by_hand(weight_BA, 128, 128).t() + layer.bias
    expected_x_grad = by_hand(grad, 1, 128) @ by_hand(weight_BA, 128, 128)
    expected_weight_grad = by_hand(grad.t(), 1, 128) @ by_hand(x.t(), 1, 128).t()
    torch.testing.assert_close(y_TB, expected_y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x_TA.grad, expected_x_grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad, expected_weight_grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, grad.sum(0), rtol=1e-5, atol=1e-5)


def test_linear_is_near_high_precision_and_keeps_its_input_in_fp8():
    layer, x_TA, grad_TB = linear(256, 256, 128)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y_TB = layer(x_TA)
    activations = sum(tensor.nbytes for tensor in kept if tensor is not layer.weight)
    assert activations == 256 * 256 + 4 * 256 * 2, "a byte a value, and the scales"
    y_TB.backward(grad_TB)
    exact = (x_TA.detach() @ layer.weight.t(), grad_TB @ layer.weight, grad_TB.t() @ x_TA.detach())
    for found, expected in zip((y_TB, x_TA.grad, layer.weight.grad), exact, strict=True):
        # Three bits of mantissa: a relative error of up to 2^-4 a value, which averages out over a sum.
        assert 1e-4 < (found - expected).norm() / expected.norm() < 0.05


def experts_by_fp8_linears(experts: nn.Module, ids_TK, hidden_TH, weights_TK) -> torch.Tensor:
    """Each expert as two Fp8Linear layers on its own tokens, the routing weight between them."""
    weights = expert_weights(experts)
    output_TH = torch.zeros_like(hidden_TH)
    for expert in range(EXPERTS):
        token, slot = (ids_TK == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        up, down = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        for layer, weight_EAB in ((up, weights.gate_up_EHF), (down, weights.down_EIH)):
            layer.__class__ = Fp8Linear
            del layer.weight
            layer.weight = weight_EAB[expert].t()
        pre = up(hidden_TH[token])
        if weights.gate_up_bias_EF is not None:
            pre = pre + weights.gate_up_bias_EF[expert]
        y = down(weights.gate(pre) * weights_TK[token, slot, None])
        if weights.down_bias_EH is not None:
            y = y + weights.down_bias_EH[expert] * weights_TK[token, slot, None]
        output_TH = output_TH.index_add(0, token, y)
    return output_TH


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("kind", ["swiglu", "gpt_oss"])
def test_experts_are_fp8_linears(kind, routing):
    experts, ids_TK = make_experts(kind, torch.float32), ROUTINGS[routing]
    ours = step("fp8", experts, ids_TK, torch.float32)
    generator = torch.Generator().manual_seed(3)
    hidden_TH = torch.randn(len(ids_TK), HIDDEN, generator=generator, dtype=torch.float64).float().requires_grad_()
    weights_TK = torch.rand(ids_TK.shape, generator=generator, dtype=torch.float64).float().requires_grad_()
    grad_TH = torch.randn(len(ids_TK), HIDDEN, generator=generator, dtype=torch.float64).float()
    experts.zero_grad()
    output_TH = experts_by_fp8_linears(experts, ids_TK, hidden_TH, weights_TK)
    output_TH.backward(grad_TH)
    expected = {"output": output_TH.detach(), "hidden": hidden_TH.grad, "weights": weights_TK.grad}
    expected |= {name: parameter.grad for name, parameter in experts.named_parameters()}
    for name, value in expected.items():
        # A value on the edge between two e4m3 ones may fall to either side in fp32: a step of one value in a sum.
        error = (ours[name] - value).norm() / value.norm()
        assert error < 2e-3, (name, error)


def test_weights_are_quantised_once_for_each_value(monkeypatch):
    layer, x_TA, grad_TB = linear(64, 256, 128)
    cache_quantised(layer.weight)
    calls, make = [], fp8.quantise_blocks

    def count(weight):
        calls.append(weight)
        return make(weight)

    monkeypatch.setattr(
        fp8_weights.fp8, "quantise_blocks", lambda w, make=fp8.quantise_blocks: calls.append(0) or make(w)
    )
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for steps in (1, 2):
        for _ in range(3):
            layer(x_TA).backward(grad_TB)
        assert len(calls) == steps
        optimizer.step()
    expected = fp8.quantise_blocks(layer.weight.detach())
    for found, value in zip(operand(layer.weight), expected, strict=True):
        assert torch.equal(found, value)
    for found, value in zip(operand(layer.weight.t()), expected, strict=True):
        assert torch.equal(found, value.t())


def test_a_gathered_weight_is_an_operand_and_nothing_else():
    weight_EBA = matrix(2, 128, 256)
    whole = GatheredWeight(*fp8.quantise_blocks(weight_EBA), torch.bfloat16)
    assert (whole.shape, whole.dtype) == ((2, 128, 256), torch.bfloat16)
    for view, plain in ((whole, weight_EBA), (whole.transpose(1, 2), weight_EBA.transpose(1, 2))):
        for found, value in zip(operand(view), operand(plain), strict=True):
            assert torch.equal(found, value)
    with pytest.raises(NotImplementedError, match="gathered in FP8"):
        whole + 1
