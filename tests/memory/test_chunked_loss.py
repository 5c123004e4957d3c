"""The chunked cross entropy against fp64 over full logits, and a proof that it never holds them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xtuner_hf.device import kind_of
from xtuner_hf.memory.chunked_loss import chunked_cross_entropy

TOKENS, HIDDEN, VOCAB = 96, 32, 5000
LOGITS_AT_A_TIME = 32 * VOCAB  # 64 labels take two slices


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch):
    few = replace(kind_of("cpu"), logits_at_a_time=LOGITS_AT_A_TIME)
    monkeypatch.setattr("xtuner_hf.memory.logprobs.kind_of", lambda device: few)


def inputs(dtype: torch.dtype, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden_TH = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    weight_VH = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64) / 4
    labels_T = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    labels_T[::3] = -100
    return hidden_TH.to(dtype).requires_grad_(), weight_VH.to(dtype).requires_grad_(), labels_T


def full_logits_loss(hidden_TH, weight_VH, labels_T):
    return F.cross_entropy(F.linear(hidden_TH, weight_VH), labels_T, reduction="sum")


def loss_and_grads(loss_function, hidden_TH, weight_VH, labels_T):
    loss = loss_function(hidden_TH, weight_VH, labels_T)
    loss.backward()
    return loss.double(), hidden_TH.grad.double(), weight_VH.grad.double()


def chunked(hidden_TH, weight_VH, labels_T):
    return chunked_cross_entropy(hidden_TH, weight_VH, None, labels_T)


SEEDS = 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_as_near_to_fp64_as_those_over_full_logits(dtype):
    """The mean error over seeds is no larger."""
    errors = {"chunked": torch.zeros(3, dtype=torch.float64), "full": torch.zeros(3, dtype=torch.float64)}
    for seed in range(SEEDS):
        hidden, weight, labels = inputs(dtype, seed)
        exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
        expected = loss_and_grads(full_logits_loss, *exact, labels)
        for name, function in (("chunked", chunked), ("full", full_logits_loss)):
            found = loss_and_grads(function, *(t.detach().clone().requires_grad_() for t in (hidden, weight)), labels)
            relative = [(x - y).norm() / y.norm() for x, y in zip(found, expected, strict=True)]
            errors[name] += torch.stack(relative).detach() / SEEDS
    ratios = (errors["chunked"] / errors["full"]).tolist()
    print(f"{dtype}: error of chunked / full: loss {ratios[0]:.3f}, hidden {ratios[1]:.3f}, weight {ratios[2]:.3f}")
    assert max(ratios) < 1.01  # 0.99 at most on an AMD EPYC; matrix products of another CPU add up in another order


class Sizes(TorchDispatchMode):
    """Notes the largest number of elements that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.numel())
        return result


def test_no_tensor_is_as_large_as_the_logits():
    hidden, weight, labels = inputs(torch.float32)
    with Sizes() as full:
        full_logits_loss(hidden, weight, labels).backward()
    assert full.largest >= TOKENS * VOCAB
    with Sizes() as sizes:
        chunked(hidden, weight, labels).backward()
    assert sizes.largest <= max(weight.numel(), LOGITS_AT_A_TIME) < full.largest


def test_no_label_at_all_costs_nothing_and_has_zero_gradients():
    hidden, weight, _ = inputs(torch.float32)
    loss = chunked(hidden, weight, torch.full((TOKENS,), -100))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.abs().max() == 0
    assert weight.grad.abs().max() == 0
