"""What only DeepSeek V3 and its relatives have: MLA, their YaRN, the configuration's routing, eps from it."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

from tests.families import FAMILIES, deepseek_config, kimi_config, tokens
from tests.models.published import deepseek_v3, glm4_moe, kimi_k2
from xtuner_hf import AutoModelForCausalLM
from xtuner_hf.models.auto import causal_lm_class

DEEPSEEK_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}
KIMI_YARN = DEEPSEEK_YARN | {"rope_theta": 50000.0, "factor": 32.0, "beta_fast": 1.0}


def written_out_attention(attention, hidden, eps: float) -> torch.Tensor:
    """MLA of arXiv 2412.19437, section 2.1.1, position by position and head by head, in fp64; one document."""
    config, length = attention.config, hidden.shape[0]
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    yarn = config.rope_parameters
    inv_freq = DeepseekV3RotaryEmbedding(config).inv_freq.double()
    scale = (nope + rope) ** -0.5 * (0.1 * yarn["mscale_all_dim"] * math.log(yarn["factor"]) + 1) ** 2

    def norm(x, weight):
        return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()

    def rotate(x, position):
        angle = position * inv_freq
        pairs = torch.complex(x[0::2], x[1::2]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([pairs.real, pairs.imag])

    latent = hidden @ attention.kv_a_proj_with_mqa.weight.T
    compressed = norm(latent[:, : config.kv_lora_rank], attention.kv_a_layernorm.weight)
    keys_values = (compressed @ attention.kv_b_proj.weight.T).view(length, -1, nope + value)
    queries = norm(hidden @ attention.q_a_proj.weight.T, attention.q_a_layernorm.weight) @ attention.q_b_proj.weight.T
    queries = queries.view(length, -1, nope + rope)
    shared_keys = [rotate(latent[position, config.kv_lora_rank :], position) for position in range(length)]
    rows = []
    for i in range(length):
        heads = []
        for head in range(config.num_attention_heads):
            query = torch.cat([queries[i, head, :nope], rotate(queries[i, head, nope:], i)])
            keys = torch.stack([torch.cat([keys_values[j, head, :nope], shared_keys[j]]) for j in range(i + 1)])
            heads.append((keys @ query * scale).softmax(0) @ keys_values[: i + 1, head, nope:])
        rows.append(torch.cat(heads) @ attention.o_proj.weight.T)
    return torch.stack(rows)


@pytest.mark.parametrize("make_config", [deepseek_config, kimi_config])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_mla_is_the_definition(make_config, eps):
    """Value heads (12) and query heads (24) differ; eps is the configuration's, which transformers does not read."""
    config = make_config(rms_norm_eps=eps)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double()
    hidden = 0.3 * torch.randn(1, 20, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotary = DeepseekV3RotaryEmbedding(config)
    position = rotary(hidden, torch.arange(20)[None])
    found, _ = model.model.layers[0].self_attn(hidden, position, None)
    expected = written_out_attention(model.model.layers[0].self_attn, hidden[0], eps)
    # The norms and the angles are computed in fp32.
    assert (found[0] - expected).abs().max() < 2e-6 * expected.abs().max()


def test_published_yarn():
    config = deepseek_v3()
    config.rope_parameters = dict(DEEPSEEK_YARN)
    rotary = DeepseekV3RotaryEmbedding(config)
    assert rotary.attention_scaling == 1.0  # mscale / mscale_all_dim
    with torch.device("meta"):
        attention = causal_lm_class(config).model_class.layer_class(config, 0).self_attn
    assert attention.scaling == pytest.approx(0.13523, abs=1e-5)


def test_kimi_s_ramp_has_no_length_and_divides_by_no_zero():
    """beta_fast == beta_slow: dimensions below the boundary turn on, those above are interpolated, none is NaN."""
    config = kimi_k2()
    config.rope_parameters = dict(KIMI_YARN)
    inv_freq = DeepseekV3RotaryEmbedding(config).inv_freq
    plain = 50000.0 ** (-torch.arange(0, 64, 2) / 64)
    ratio = inv_freq / plain
    boundary = 64 * math.log(4096 / (2 * math.pi)) / (2 * math.log(50000.0))
    low = math.floor(boundary)
    assert (ratio[: low + 1] - 1).abs().max() < 1e-5
    assert (ratio[math.ceil(boundary) + 1 :] - 1 / 32).abs().max() < 1e-5


@pytest.mark.parametrize("make_config", [deepseek_config, kimi_config])
@pytest.mark.parametrize(("name", "value"), [("topk_method", None), ("topk_method", "greedy"), ("scoring_func", None)])
def test_a_configuration_of_another_routing_is_refused(make_config, name, value):
    config = make_config()
    if value is None:
        delattr(config, name)
    else:
        setattr(config, name, value)
    with pytest.raises(ValueError, match=rf"config\.{name} of this {config.model_type} is {value!r}, expected '"):
        AutoModelForCausalLM.from_config(config)


def test_fp32_forward_equals_stock_to_the_last_bit():
    ours = FAMILIES["deepseek_v3"].ours(attention="eager")
    config = deepseek_config()
    config._attn_implementation, config._experts_implementation = "eager", "grouped_mm"
    stock = FAMILIES["deepseek_v3"].stock_class(config)
    stock.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert torch.equal(ours(tokens()).logits, stock(tokens()).logits)


@pytest.mark.parametrize("config", [deepseek_v3(), kimi_k2(), glm4_moe()])
def test_published_balance_is_what_none_means(config):
    defaults = causal_lm_class(config).balance_defaults
    assert (defaults.aux_loss_coef, defaults.sequence_loss_coef, defaults.bias_update_rate) == (0.0, 1e-4, 1e-3)
