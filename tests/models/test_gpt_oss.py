"""What only GPT-OSS has: clamped interleaved experts with biases, sinks, alternating windows, a fractional ramp."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

from tests.families import FAMILIES, WINDOW, gpt_oss_config, tokens
from tests.models.published import gpt_oss
from xtuner_hf import AutoModelForCausalLM
from xtuner_hf.attention.varlen import VARLEN_ATTENTION
from xtuner_hf.moe.experts import expert_weights

FAMILY = FAMILIES["gpt_oss"]


def test_experts_are_the_definition():
    """One token at a time: interleaved gate and up, both clamped, sigmoid gain 1.702, up + 1, biases weighted too."""
    block = FAMILY.ours(torch.float64, "xtuner_reference").model.layers[1].mlp
    hidden = 2 * torch.randn(1, 20, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = block(hidden)
    routing = block.router(hidden[0])
    experts, limit = block.experts, 2.5
    clamped = 0
    for token in range(20):
        expected = torch.zeros(48, dtype=torch.float64)
        for expert, weight in zip(routing.topk_ids_TK[token], routing.weights_TK[token], strict=True):
            both = hidden[0, token] @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
            gate, up = both[0::2], both[1::2]
            clamped += ((gate > limit) | (up.abs() > limit)).sum()
            gate, up = torch.minimum(gate, torch.tensor(limit)), up.clamp(-limit, limit)
            activated = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            expected += weight * (activated @ experts.down_proj[expert] + experts.down_proj_bias[expert])
        assert (found[0, token] - expected).abs().max() < 1e-12
    assert clamped > 20, "the case must hit the clamps"


def test_kernels_get_transposed_weights_as_they_are_stored():
    experts = FAMILY.ours().model.layers[0].mlp.experts
    weights = expert_weights(experts)
    assert weights.gate_up_EHF is experts.gate_up_proj
    assert weights.gate_up_bias_EF is experts.gate_up_proj_bias


def test_an_expert_without_tokens_gets_a_zero_gradient_also_in_its_bias():
    ours = FAMILY.ours(torch.float32)
    counts = torch.zeros(8, dtype=torch.int64)

    def count(module, args, routing):
        counts.add_(routing.topk_ids_TK.flatten().bincount(minlength=8))

    ours.model.layers[3].mlp.router.register_forward_hook(count)
    ours(tokens(1, 2)).logits.sum().backward()
    empty = counts == 0
    assert empty.any()
    for name, parameter in ours.model.layers[3].mlp.experts.named_parameters():
        grads = parameter.grad.flatten(1).abs().amax(1)
        assert grads[empty].max() == 0, name
        assert grads[~empty].min() > 0, name


def test_layers_alternate_and_a_window_hides_what_lies_before_it():
    """A token outside the window of the last, sliding, layer reaches a position only through full layers."""
    config = gpt_oss_config(num_hidden_layers=1)
    assert config.layer_types == ["sliding_attention"]
    model = AutoModelForCausalLM.from_config(config, experts_implementation="xtuner_reference").double().eval()
    rows = tokens(2, 12)
    rows[1] = rows[0]
    rows[1, 3] = (rows[0, 3] + 1) % 128
    difference = (model(rows).logits[0] - model(rows).logits[1]).abs().amax(-1)
    changed = range(3, 3 + WINDOW)
    assert all((difference[position] > 1e-6) == (position in changed) for position in range(12))


def test_our_attention_is_the_default_and_transformers_own_can_be_chosen():
    ours = FAMILY.ours()
    assert ours.config._attn_implementation == VARLEN_ATTENTION
    expected = ours(tokens()).logits
    ours.set_attn_implementation("eager")
    assert (ours(tokens()).logits - expected).abs().max() < 1e-4


def test_bf16_attention_is_closer_to_fp32_than_transformers_own():
    """Their softmax runs in bf16."""
    errors = {}
    exact = FAMILY.ours()
    for implementation in (VARLEN_ATTENTION, "eager"):
        attention = FAMILY.ours(torch.bfloat16, attention=implementation).model.layers[0].self_attn
        reference = exact.model.layers[0].self_attn
        hidden = torch.randn(1, 40, 48, generator=torch.Generator().manual_seed(0))
        position = exact.model.rotary_emb(hidden, torch.arange(40)[None])
        mask = torch.zeros(1, 1, 40, 40).masked_fill(~torch.ones(40, 40).tril().bool(), torch.finfo().min)
        with torch.no_grad():
            expected, _ = reference(hidden, position, mask)
            bf16 = torch.bfloat16
            found, _ = attention(hidden.to(bf16), tuple(part.to(bf16) for part in position), mask.to(bf16))
        errors[implementation] = (found.float() - expected).square().mean().sqrt().item()
    assert errors[VARLEN_ATTENTION] < errors["eager"], errors


def test_published_yarn():
    """truncate false: the ramp begins and ends between two dimensions; cos and sin carry 0.1 ln 32 + 1."""
    config = gpt_oss(24, 32)
    rotary = GptOssRotaryEmbedding(config)
    assert rotary.attention_scaling == pytest.approx(0.1 * math.log(32) + 1)
    assert rotary.attention_scaling == pytest.approx(1.34657, abs=1e-5)
    half, theta, original, factor = 32, 150000.0, 4096, 32.0
    boundary = [half * math.log(original / (turns * 2 * math.pi)) / math.log(theta) for turns in (32.0, 1.0)]
    for index in range(half):
        ramp = min(max((index - boundary[0]) / (boundary[1] - boundary[0]), 0.0), 1.0)
        expected = theta ** (-index / half) * ((1 - ramp) + ramp / factor)
        assert rotary.inv_freq[index].item() == pytest.approx(expected, rel=1e-5)


def test_the_placeholder_coefficient_of_the_hub_is_not_taken():
    ours = AutoModelForCausalLM.from_config(gpt_oss_config(router_aux_loss_coef=0.9))
    assert ours.balance_defaults.aux_loss_coef == 0
