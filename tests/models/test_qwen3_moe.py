"""Our Qwen3-MoE against transformers' own eager implementation."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from tests.tiny import build, moe_config
from xtuner_hf import Qwen3MoeForCausalLM


def pair(dtype, ours_kernel: str, stock_kernel: str, **changes):
    """The same weights in transformers' class and in ours."""
    config = moe_config(**changes)
    config._attn_implementation = "eager"
    stock_config, our_config = copy.deepcopy(config), copy.deepcopy(config)
    stock_config._experts_implementation, our_config._experts_implementation = stock_kernel, ours_kernel
    stock = build(transformers.Qwen3MoeForCausalLM, stock_config, dtype=dtype)
    ours = build(Qwen3MoeForCausalLM, our_config, dtype=dtype)
    ours.load_state_dict(stock.state_dict())
    assert ours.config._experts_implementation == ours_kernel
    return stock, ours


def tokens(batch: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(2, 128, (batch, length), generator=torch.Generator().manual_seed(5))


def logits_and_grads(model, input_ids):
    logits = model(input_ids, use_cache=False).logits
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def count_load(model) -> list[torch.Tensor]:
    """A list that gets the first layer's tokens per expert at each forward."""
    counts: list[torch.Tensor] = []
    model.model.layers[0].mlp.gate.register_forward_hook(
        lambda _, args, out: counts.append(out.topk_ids_TK.flatten().bincount(minlength=8))
    )
    return counts


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize(
    ("top_k", "input_ids", "is_hit"),
    [
        pytest.param(2, tokens(), lambda count: True, id="random"),
        pytest.param(2, tokens(1, 3), lambda count: count.min() == 0, id="an expert without tokens"),
        # Equal tokens have equal hidden states at every position, so they all go the same way.
        pytest.param(1, torch.full((2, 12), 7), lambda count: count.max() == 24, id="one expert takes all"),
        pytest.param(2, tokens(1, 1), lambda count: count.sum() == 2, id="one token"),
    ],
)
def test_fp64_logits_and_gradients_equal_stock_eager(norm_topk_prob, top_k, input_ids, is_hit):
    changes = {"norm_topk_prob": norm_topk_prob, "num_experts_per_tok": top_k}
    stock, ours = pair(torch.float64, "xtuner_reference", "eager", **changes)
    counts = count_load(ours)
    expected, expected_grads = logits_and_grads(stock, input_ids)
    found, found_grads = logits_and_grads(ours, input_ids)
    assert is_hit(counts[0]), f"the case is not what its name says: {counts[0]}"
    assert (found - expected).abs().max() < 1e-10
    for name, grad in expected_grads.items():
        assert (found_grads[name] - grad).abs().max() < 1e-10, name


def test_an_expert_without_tokens_gets_a_zero_gradient():
    _, ours = pair(torch.float64, "xtuner_reference", "eager")
    counts = count_load(ours)
    _, grads = logits_and_grads(ours, tokens(1, 3))
    empty = counts[0] == 0
    assert empty.any(), "the case needs an expert without tokens"
    grad = grads["model.layers.0.mlp.experts.gate_up_proj"]
    assert grad[empty].abs().max() == 0
    assert grad[~empty].abs().amax((1, 2)).min() > 0


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("shape", [(2, 24), (1, 1), (3, 7)])
def test_fp32_grouped_mm_forward_equals_stock_to_the_last_bit(norm_topk_prob, shape):
    stock, ours = pair(torch.float32, "xtuner_grouped_mm", "grouped_mm", norm_topk_prob=norm_topk_prob)
    with torch.no_grad():
        expected, found = stock(tokens(*shape)).logits, ours(tokens(*shape)).logits
    assert (found - expected).abs().max().item() == 0.0


def test_kernels_agree_in_gradient():
    """fp32 rounding only: sums of some hundred products of order 1."""
    _, reference = pair(torch.float32, "xtuner_reference", "eager")
    _, grouped = pair(torch.float32, "xtuner_grouped_mm", "eager")
    _, expected = logits_and_grads(reference, tokens())
    _, found = logits_and_grads(grouped, tokens())
    for name in expected:
        scale = expected[name].abs().max().clamp(min=1e-6)
        assert ((found[name] - expected[name]).abs().max() / scale) < 2e-5, name


def test_router_stays_in_fp32_under_bf16_and_autocast():
    """With bf16 logits the chosen experts of some tokens change."""
    _, ours = pair(torch.bfloat16, "xtuner_grouped_mm", "eager")
    gate = ours.model.layers[0].mlp.gate
    hidden = torch.randn(512, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = torch.nn.functional.linear(hidden.float(), gate.weight.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = gate(hidden)
    assert routing.logits_TE.dtype == routing.weights_TK.dtype == torch.float32
    assert torch.equal(routing.logits_TE, expected)


def test_bf16_block_keeps_the_dtype_of_its_input():
    _, ours = pair(torch.bfloat16, "xtuner_grouped_mm", "eager")
    output = ours.model.layers[0].mlp(torch.randn(2, 5, 64).bfloat16())
    assert output.dtype == torch.bfloat16


def test_our_kernels_are_the_default_and_stock_ones_can_be_chosen():
    ours = Qwen3MoeForCausalLM(moe_config())
    assert ours.config._experts_implementation == "xtuner_auto"
    before = ours(tokens()).logits
    ours.set_experts_implementation("batched_mm")
    assert ours.config._experts_implementation == "batched_mm"
    assert (ours(tokens()).logits - before).abs().max() < 1e-4


def test_router_logits_are_recorded_as_in_transformers():
    stock, ours = pair(torch.float32, "xtuner_grouped_mm", "grouped_mm")
    expected = stock(tokens(), labels=tokens(), output_router_logits=True)
    found = ours(tokens(), labels=tokens(), output_router_logits=True)
    assert len(found.router_logits) == 2
    assert torch.equal(found.aux_loss, expected.aux_loss)
    assert torch.equal(found.loss, expected.loss)


def test_chunked_loss_equals_the_loss_over_full_logits():
    _, ours = pair(torch.float32, "xtuner_grouped_mm", "eager")
    labels = tokens().clone()
    labels[0, :9] = -100
    expected = ours(tokens(), labels=labels, use_cache=False).loss
    expected.backward()
    expected_grads = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours.zero_grad()
    found = ours(tokens(), labels=labels, chunked_loss=True, use_cache=False)
    assert found.logits is None
    found.loss.backward()
    assert abs(found.loss - expected) < 1e-6
    for name, p in ours.named_parameters():
        assert (p.grad - expected_grads[name]).abs().max() < 1e-6 * max(1.0, expected_grads[name].abs().max().item()), (
            name
        )


def test_packed_documents_do_not_see_each_other():
    _, ours = pair(torch.float32, "xtuner_grouped_mm", "eager")
    first, second = tokens(1, 9), tokens(1, 14).flip(1)
    packed = torch.cat([first, second], 1)
    positions = torch.cat([torch.arange(9), torch.arange(14)])[None]
    found = ours(packed, position_ids=positions, use_cache=False).logits
    expected = torch.cat([ours(first).logits, ours(second).logits], 1)
    assert (found - expected).abs().max() < 1e-5
