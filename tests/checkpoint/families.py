"""Tiny models of the quantised families, and the plain tensors of their checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from transformers import DeepseekV3Config, GptOssConfig, set_seed

from tests.checkpoint.official import FP8_CONFIG, MXFP4_CONFIG, write_official
from tests.tiny import moe_config, randomize_
from xtuner_hf import DeepseekV3ForCausalLM, GptOssForCausalLM, Qwen3MoeForCausalLM
from xtuner_hf._compat import revert_weight_conversion
from xtuner_hf.checkpoint.hub_config import to_hub_dialect
from xtuner_hf.models.kimi_k2.configuration import KimiK2Config
from xtuner_hf.models.kimi_k2.modeling import DeepseekV3ForCausalLM as KimiK2ForCausalLM

STOCK = {
    DeepseekV3ForCausalLM: transformers.DeepseekV3ForCausalLM,
    GptOssForCausalLM: transformers.GptOssForCausalLM,
}


def deepseek_config(**changes) -> DeepseekV3Config:
    """Every FP8 dimension that has more than one block is a multiple of 128: what stock transformers can read."""
    values = {
        "vocab_size": 64,
        "hidden_size": 256,
        "intermediate_size": 384,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 128,
        "kv_lora_rank": 96,
        "qk_nope_head_dim": 96,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": 64,
    }
    return DeepseekV3Config(**(values | changes))


def kimi_config() -> KimiK2Config:
    entries = deepseek_config(n_group=1, topk_group=1, n_routed_experts=6).to_dict()
    return KimiK2Config(**{key: value for key, value in entries.items() if key != "model_type"})


def gpt_oss_config() -> GptOssConfig:
    return GptOssConfig(
        vocab_size=64,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        sliding_window=8,
    )


def plain_checkpoint(model_class, config) -> dict[str, torch.Tensor]:
    """Random weights under Hub names, bf16 but for what is fp32 in published checkpoints."""
    set_seed(0)
    model = randomize_(model_class(config))
    return {
        name: tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16()
        for name, tensor in hub_state(model).items()
    }


def hub_state(model) -> dict[str, torch.Tensor]:
    """A model's tensors under their Hub names."""
    return revert_weight_conversion(model, model.state_dict())


def config_json(config, quantization_config: dict) -> dict:
    entries = to_hub_dialect(json.loads(config.to_json_string(use_diff=False)))
    return entries | {"torch_dtype": "bfloat16", "quantization_config": quantization_config}


CASES = {
    "deepseek_v3": (DeepseekV3ForCausalLM, deepseek_config, FP8_CONFIG),
    "gpt_oss": (GptOssForCausalLM, gpt_oss_config, MXFP4_CONFIG),
    # 144 rows of kv_a_proj, 72 of an expert: ragged blocks, which stock transformers misreads or refuses.
    "deepseek_v3_ragged": (
        DeepseekV3ForCausalLM,
        lambda: deepseek_config(kv_lora_rank=128, qk_rope_head_dim=16, moe_intermediate_size=200),
        FP8_CONFIG,
    ),
    "kimi_k2": (KimiK2ForCausalLM, kimi_config, FP8_CONFIG),
    "qwen3_moe": (Qwen3MoeForCausalLM, lambda: moe_config(hidden_size=192, moe_intermediate_size=144), FP8_CONFIG),
}


def write_case(folder: Path, case: str):
    """(model class, values of the plain tensors) of a checkpoint in the official format."""
    model_class, make_config, quantization_config = CASES[case]
    config = make_config()
    entries = config_json(config, quantization_config) | {"architectures": [model_class.__name__]}
    return model_class, write_official(folder, plain_checkpoint(model_class, config), entries)
