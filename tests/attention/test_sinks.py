"""Sinks: the fused path and its backward against the reference, and that one against the definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from xtuner_hf.attention.sinks import CPU_KERNEL, SinkAttention, reference_sink_attention, sink_attention_forward

HEADS, LENGTH, SIZE, SCALING = 4, 7, 8, 0.3


def causal_mask(window: int | None = None, dtype=torch.float64) -> torch.Tensor:
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)[None]
    visible = (distance >= 0) & (distance < (window or LENGTH))
    return torch.zeros(1, 1, LENGTH, LENGTH, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def inputs(dtype=torch.float64, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, HEADS, LENGTH, SIZE)] * 3 + [(HEADS,)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("window", [None, 3])
def test_reference_is_the_definition(window):
    q, k, v, sinks = inputs()
    found = reference_sink_attention(q, k, v, sinks, causal_mask(window), SCALING)
    for head in range(HEADS):
        for position in range(LENGTH):
            first = 0 if window is None else max(0, position - window + 1)
            weights = (k[1, head, first : position + 1] @ q[1, head, position] * SCALING).exp()
            expected = weights @ v[1, head, first : position + 1] / (weights.sum() + sinks[head].exp())
            assert (found[1, head, position] - expected).abs().max() < 1e-12


def fused(q, k, v, sinks, mask):
    return SinkAttention.apply(q, k, v, sinks, mask, SCALING, CPU_KERNEL)


def reference(q, k, v, sinks, mask):
    return reference_sink_attention(q, k, v, sinks, mask, SCALING)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("attention", [fused, reference])
def test_gradcheck(attention, window):
    tensors = [tensor.requires_grad_() for tensor in inputs(batch=1)]
    torch.autograd.gradcheck(lambda *tensors: attention(*tensors, causal_mask(window)), tensors, atol=1e-8)


@pytest.mark.parametrize("window", [None, 3])
def test_fused_equals_reference_in_fp64(window):
    results = []
    for attention in (fused, reference):
        tensors = [tensor.requires_grad_() for tensor in inputs()]
        output = attention(*tensors, causal_mask(window))
        output.square().sum().backward()
        results.append([output, *(tensor.grad for tensor in tensors)])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).abs().max() < 1e-13


def test_without_weight_on_the_sink_it_is_plain_attention():
    q, k, v, sinks = inputs()
    found = fused(q, k, v, sinks.fill_(-1e30), causal_mask())
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALING)
    assert (found - expected).abs().max() < 1e-14


def test_a_query_that_sees_nothing_gives_all_its_weight_to_the_sink():
    q, k, v, sinks = [tensor.requires_grad_() for tensor in inputs()]
    mask = causal_mask().repeat(2, 1, 1, 1)
    mask[0, 0, 2] = torch.finfo(torch.float64).min
    output = fused(q, k, v, sinks, mask)
    assert output[0, :, 2].abs().max() == 0
    output.sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (q, k, v, sinks))


def test_bf16_keeps_its_dtype_and_the_sum_of_probabilities_in_fp32():
    q, k, v, sinks = inputs(torch.bfloat16)
    exact = reference_sink_attention(*(t.double() for t in (q, k, v, sinks)), causal_mask(), SCALING)
    mask = causal_mask(dtype=torch.float32)
    output, _ = sink_attention_forward(torch.nn.Module(), q, k, v, mask, SCALING, s_aux=sinks)
    assert output.dtype == torch.bfloat16
    # One rounding of the output, one of each probability: both half a unit in the eighth bit.
    assert (output.transpose(1, 2).double() - exact).abs().max() < 2 * 2**-8 * exact.abs().max()


def test_fewer_key_and_value_heads():
    q, k, v, sinks = inputs()
    found, _ = sink_attention_forward(torch.nn.Module(), q, k[:, :2], v[:, :2], causal_mask(), SCALING, s_aux=sinks)
    repeated = [tensor[:, [0, 0, 1, 1]] for tensor in (k, v)]
    expected = reference_sink_attention(q, *repeated, sinks, causal_mask(), SCALING)
    assert (found.transpose(1, 2) - expected).abs().max() < 1e-13


def test_attention_without_sinks_is_refused():
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match="has no sinks: choose another attn_implementation"):
        sink_attention_forward(torch.nn.Module(), q, k, v, causal_mask(), SCALING)
