"""FLOPs of training against counts written out, against torch's own counter, and under sharding."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3MoeConfig

from tests.families import deepseek_config, gpt_oss_config
from tests.ranks import run_on_ranks
from tests.tiny import build, dense_config, moe_config
from xtuner_hf import DeepseekV3ForCausalLM, GptOssForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM
from xtuner_hf.models.flops import TrainingFlops


@pytest.mark.parametrize(("length", "gflops"), [(4096, 23.01), (16384, 37.50), (65536, 95.48)])
def test_qwen3_30b_a3b_comes_to_its_published_figures(length, gflops):
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                vocab_size=151936,
                hidden_size=2048,
                num_hidden_layers=48,
                num_attention_heads=32,
                num_key_value_heads=4,
                head_dim=128,
                num_experts=128,
                num_experts_per_tok=8,
                moe_intermediate_size=768,
            )
        )
    flops = TrainingFlops.of_model(model)(length, length**2) / length
    assert flops / 1e9 == pytest.approx(gflops, abs=0.01)


def test_forward_of_a_dense_model_equals_torch_s_counter():
    model = build(Qwen3ForCausalLM, dense_config(attn_implementation="eager"))
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 16, dtype=torch.long), use_cache=False)
    flops = TrainingFlops.of_model(model)
    # Forward is a third; the counter sees the whole square of attention.
    attention = flops.per_squared_length * 2 * 16**2
    assert counter.get_total_flops() == pytest.approx((flops.per_token * 32 + 2 * attention) / 3, rel=1e-9)


def test_a_layer_with_a_window_is_linear_in_the_length_and_mla_has_two_head_sizes():
    config = gpt_oss_config(sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2)
    flops = TrainingFlops.of_model(build(GptOssForCausalLM, config))
    per_pair = 6 * config.num_attention_heads * 2 * config.head_dim
    assert flops.per_squared_length == 2 * per_pair / 2
    narrower = gpt_oss_config(sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 2)
    less = TrainingFlops.of_model(build(GptOssForCausalLM, narrower))
    assert flops.per_token - less.per_token == 2 * per_pair * 4
    config = deepseek_config()
    flops = TrainingFlops.of_model(build(DeepseekV3ForCausalLM, config))
    heads = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    assert flops.per_squared_length == config.num_hidden_layers * 6 * heads / 2


def test_frozen_weights_have_no_gradient_to_compute():
    model = build(Qwen3MoeForCausalLM, moe_config())
    full = TrainingFlops.of_model(model)
    model.requires_grad_(False)
    frozen = TrainingFlops.of_model(model)
    assert frozen.per_token == pytest.approx(full.per_token * 4 / 6)
    assert frozen.per_squared_length == full.per_squared_length


def flops_of_sharded_model(ep_size: int) -> tuple[float, float]:
    from xtuner_hf.parallel.layout import ParallelLayout
    from xtuner_hf.parallel.shard import shard_model

    torch.distributed.init_process_group("gloo")
    layout = ParallelLayout(world_size=2, ranks_per_node=2, ep_size=ep_size)
    model = shard_model(build(Qwen3MoeForCausalLM, moe_config()), layout.distributed_config())
    flops = TrainingFlops.of_model(model)
    return flops.per_token, flops.per_squared_length


def test_sharding_does_not_change_the_count():
    expected = TrainingFlops.of_model(build(Qwen3MoeForCausalLM, moe_config()))
    for found in run_on_ranks("tests.models.test_flops:flops_of_sharded_model", 2, ep_size=2):
        assert found == (expected.per_token, expected.per_squared_length)
