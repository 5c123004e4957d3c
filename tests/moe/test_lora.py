"""Adapters on fused experts: what our forward computes, against PEFT's own, which adds them to the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.families import FAMILIES, tokens
from xtuner_hf.models.flops import TrainingFlops
from xtuner_hf.moe.lora import ExpertsLora, adopt_wrappers

TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def adapted(
    family: str, kernel: str = "xtuner_grouped_mm", dtype=torch.float64, targets=TARGETS, adapters=("default",)
):
    """A model whose adapters are random: PEFT's, and a copy with our forward."""
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=[], target_parameters=list(targets), init_lora_weights=False)
    # The reference kernel takes any dtype; grouped_mm is compared in fp32.
    theirs = get_peft_model(FAMILIES[family].ours(dtype, kernel), config)
    for name in adapters[1:]:
        theirs.add_adapter(name, config)
    theirs.base_model.set_adapter(list(adapters))
    ours = copy.deepcopy(theirs)
    wrappers = adopt_wrappers(ours)
    assert wrappers
    assert all(isinstance(wrapper, ExpertsLora) for wrapper in wrappers)
    return theirs, ours


def loss_and_grads(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = tokens()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(theirs, ours, tolerance: float) -> None:
    (expected_loss, expected), (loss, grads) = loss_and_grads(theirs), loss_and_grads(ours)
    assert abs(loss - expected_loss) < tolerance * expected_loss
    assert grads.keys() == expected.keys()
    assert any("lora_B" in name for name in grads)
    for name, grad in expected.items():
        assert (grads[name] - grad).abs().max() < tolerance * grad.abs().max(), name


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("targets", [TARGETS, TARGETS[:1], TARGETS[1:]], ids=["both", "gate_up", "down"])
def test_equals_peft(family, targets):
    # The softmax of the head stays fp32.
    assert_same(*adapted(family, "xtuner_reference", targets=targets), tolerance=1e-6)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_grouped_matrix_products(family):
    """A rank of 3 is filled up to 16 bytes."""
    assert_same(*adapted(family, dtype=torch.float32), tolerance=2e-5)


def test_two_adapters_at_once_and_none():
    theirs, ours = adapted("qwen3_moe", "xtuner_reference", adapters=("default", "second"))
    assert_same(theirs, ours, tolerance=1e-6)
    logits = ours(tokens()).logits
    with ours.disable_adapter():
        without = ours(tokens()).logits
    base = FAMILIES["qwen3_moe"].ours(torch.float64, "xtuner_reference")
    assert torch.equal(without, base(tokens()).logits)
    assert (logits - without).abs().max() > 0.1


def test_flops_count_the_factors_of_the_experts_that_a_token_meets():
    _, model = adapted("qwen3_moe", dtype=torch.float32)
    frozen = FAMILIES["qwen3_moe"].ours(torch.float32).requires_grad_(False)
    factors = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    found = TrainingFlops.of_model(model).per_token - TrainingFlops.of_model(frozen).per_token
    assert found == pytest.approx(6 * factors * 2 / 8)  # top-2 of 8 experts
