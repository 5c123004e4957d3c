"""Chunked log-probabilities and entropies against fp64 over full logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from xtuner_hf.device import kind_of
from xtuner_hf.memory.logprobs import chunked_log_probs

TOKENS, HIDDEN, VOCAB = 64, 32, 3000


# TRL's kernel, without Triton the same tiles in torch; and whole rows in two slices.
@pytest.fixture(autouse=True, params=["tiles", "rows"])
def way(request, monkeypatch) -> str:
    kind = replace(kind_of("cpu"), triton=request.param == "tiles", logits_at_a_time=0)
    monkeypatch.setattr("xtuner_hf.memory.logprobs.kind_of", lambda device: kind)
    return request.param


def inputs(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64) / 4
    bias = torch.randn(VOCAB, generator=generator, dtype=torch.float64) / 4
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    targets[::5] = -100
    return [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)], targets


def over_full_logits(hidden, weight, bias, targets, temperature=1.0):
    log_p = torch.log_softmax(torch.nn.functional.linear(hidden, weight, bias) / temperature, dim=-1)
    has_target = targets != -100
    log_probs = log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0] * has_target
    return log_probs, -(log_p.exp() * log_p).sum(-1) * has_target


def chunked(hidden, weight, bias, targets, temperature=1.0):
    return chunked_log_probs(hidden, weight, bias, targets, temperature=temperature, with_entropy=True)


def results(function, tensors, targets, temperature):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    log_probs, entropy = function(*tensors, targets, temperature)
    # Like a policy-gradient loss: every token weighs differently, and entropy counts.
    weight = torch.linspace(-1, 1, TOKENS, dtype=log_probs.dtype)
    ((log_probs * weight).sum() + 0.1 * entropy.sum()).backward()
    return [x.detach().double() for x in (log_probs, entropy, *(t.grad for t in tensors))]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_as_near_to_fp64_as_those_over_full_logits(dtype, temperature):
    tensors, targets = inputs(dtype)
    expected = results(over_full_logits, [t.detach().double() for t in tensors], targets, temperature)
    plain = results(over_full_logits, tensors, targets, temperature)
    found = results(chunked, tensors, targets, temperature)
    names = ("log_probs", "entropy", "hidden", "weight", "bias")
    for name, a, b, reference in zip(names, found, plain, expected, strict=True):
        error, plain_error = ((x - reference).norm() / reference.norm() for x in (a, b))
        # A quarter more for another order of the same sums; the dtype's own step is as near as a result can be.
        assert error < max(1.25 * plain_error, torch.finfo(dtype).eps), f"{name}: {error} against {plain_error}"


def test_autocast_computes_in_bf16_and_keeps_the_parameters_dtype(way):
    tensors, targets = inputs(torch.float32)
    expected = results(over_full_logits, [t.detach().double() for t in tensors], targets, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        log_probs, _ = chunked(*tensors, targets)
    log_probs.sum().backward()
    assert log_probs.dtype == torch.float32
    assert all(tensor.grad.dtype == torch.float32 for tensor in tensors)
    error = (log_probs - expected[0]).norm() / expected[0].norm()
    assert torch.finfo(torch.float32).eps < error < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("way", ["rows"], indirect=True)  # TRL's kernel computes in fp32
def test_rows_of_fp64_are_fp64(way):
    tensors, targets = inputs(torch.float64)
    for found, expected in zip(
        results(chunked, tensors, targets, 0.7), results(over_full_logits, tensors, targets, 0.7), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_tokens_without_target_are_zero_and_get_no_gradient():
    (hidden, weight, _), targets = inputs(torch.float32)
    log_probs, entropy = chunked_log_probs(hidden, weight, None, targets, with_entropy=True)
    assert log_probs.shape == entropy.shape == (TOKENS,)
    assert log_probs.dtype == torch.float32
    without = targets == -100
    assert log_probs[without].abs().max() == entropy[without].abs().max() == 0
    (log_probs.sum() + entropy.sum()).backward()
    assert hidden.grad[without].abs().max() == 0
    assert hidden.grad[~without].abs().min(dim=1).values.max() > 0


def test_entropy_is_only_computed_when_asked_for():
    (hidden, weight, _), targets = inputs(torch.float32)
    assert chunked_log_probs(hidden, weight, None, targets).entropy_T is None


def test_a_temperature_of_zero_is_refused():
    (hidden, weight, _), targets = inputs(torch.float32)
    with pytest.raises(ValueError, match=r"temperature is 0\.0"):
        chunked_log_probs(hidden, weight, None, targets, temperature=0.0)
