"""FLOPs of training against counts written out and torch's own counter; test_families_sharded.py has sharded models."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3MoeConfig

from tests import vision
from tests.families import deepseek_config, gpt_oss_config
from tests.models import published
from tests.tiny import build, dense_config, moe_config
from xtuner_hf import (
    AutoModelForCausalLM,
    DeepseekV3ForCausalLM,
    GptOssForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)
from xtuner_hf.models.flops import TrainingFlops
from xtuner_hf.models.manifest import meta_model


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


def test_forward_of_a_tile_equals_torch_s_counter():
    model = vision.ours("internvl_moe", attention="eager").eval()
    flops = TrainingFlops.of_model(model)
    with FlopCounterMode(display=False) as counter:
        model.model.get_image_features(pixel_values=vision.tiles(3))
    # The patches' own gradient is one of two in backward: nothing trains below them.
    patches, weight = 16, model.model.vision_tower.embeddings.patch_embeddings.projection.weight
    forward = (flops.per_tile + 2 * patches * weight.numel()) / 3
    assert counter.get_total_flops() == pytest.approx(3 * forward, rel=1e-9)
    assert flops(100, 2000, 3) == 100 * flops.per_token + 2000 * flops.per_squared_length + 3 * flops.per_tile


def test_a_tower_that_does_not_train_has_no_gradient_to_compute():
    model = vision.ours("internvl_moe", attention="eager").eval()
    full = TrainingFlops.of_model(model)
    model.model.vision_tower.requires_grad_(False)
    first, second = (getattr(model.model.multi_modal_projector, name).weight for name in ("linear_1", "linear_2"))
    backward = 2 * vision.TOKENS_PER_TILE * (first.numel() + 2 * second.numel())
    expected = _forward_per_tile(model) + backward
    assert TrainingFlops.of_model(model).per_tile == pytest.approx(expected)
    model.requires_grad_(False)
    assert TrainingFlops.of_model(model).per_tile == pytest.approx(_forward_per_tile(model))
    assert TrainingFlops.of_model(model).per_squared_length == full.per_squared_length


def _forward_per_tile(model) -> float:
    with FlopCounterMode(display=False) as counter:
        model.model.get_image_features(pixel_values=vision.tiles(1))
    return counter.get_total_flops()


def test_the_text_of_a_model_that_reads_images_counts_as_alone():
    model = vision.ours("internvl_moe")
    alone = build(Qwen3MoeForCausalLM, moe_config())
    together = TrainingFlops.of_model(model)
    assert (together.per_token, together.per_squared_length) == (
        TrainingFlops.of_model(alone).per_token,
        TrainingFlops.of_model(alone).per_squared_length,
    )


def test_frozen_weights_have_no_gradient_to_compute():
    model = build(Qwen3MoeForCausalLM, moe_config())
    full = TrainingFlops.of_model(model)
    model.requires_grad_(False)
    frozen = TrainingFlops.of_model(model)
    assert frozen.per_token == pytest.approx(full.per_token * 4 / 6)
    assert frozen.per_squared_length == full.per_squared_length


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        # Active parameters without embedding, norms, routers, biases and sinks.
        (published.gpt_oss(24, 32), 24 * (2880 * 9216 + 4 * 3 * 2880**2) + 2880 * 201088),
        (published.glm4_moe(), 45 * 9 * 3 * 4096 * 1408 + 3 * 4096 * 10944 + 46 * 2 * 4096 * 104 * 128 + 4096 * 151552),
    ],
)
def test_experts_of_every_layout_are_counted(config, parameters):
    """GPT-OSS's are transformers' own module, stored transposed."""
    flops = TrainingFlops.of_model(meta_model(config))
    windowed = 12 * 6 * 64 * 128 * 128 if config.model_type == "gpt_oss" else 0
    assert flops.per_token == 6 * parameters + windowed


def test_multi_token_prediction_counts_where_it_is_trained():
    config = deepseek_config(num_nextn_predict_layers=1)
    without, kept, trained = (
        TrainingFlops.of_model(AutoModelForCausalLM.from_config(config, mtp_loss_coef=coef)) for coef in (None, 0, 0.3)
    )
    assert kept == without
    deeper = TrainingFlops.of_model(AutoModelForCausalLM.from_config(deepseek_config(num_hidden_layers=4)))
    joined_and_head = 6 * (2 * 64 * 64 + 64 * 128)
    assert trained.per_token == deeper.per_token + joined_and_head
    assert trained.per_squared_length == deeper.per_squared_length
