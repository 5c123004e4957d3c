"""`config.json` of published checkpoints comes back as it was after transformers 5 has read and written it."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig
from transformers import __version__ as transformers_version

from tests.checkpoint.official import DEEPSEEK_YARN
from tests.checkpoint.test_saving import PUBLISHED_CONFIG
from xtuner_hf.checkpoint.hub_config import to_hub_dialect, write_hub_config

MOE_KEYS = (
    "decoder_sparse_step",
    "mlp_only_layers",
    "moe_intermediate_size",
    "norm_topk_prob",
    "num_experts",
    "num_experts_per_tok",
    "output_router_logits",
    "router_aux_loss_coef",
)
# config.json of Qwen/Qwen3-8B with other sizes: the same keys but for the experts'.
PUBLISHED_DENSE_CONFIG = {key: value for key, value in PUBLISHED_CONFIG.items() if key not in MOE_KEYS} | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
}
# Those of deepseek-ai/DeepSeek-V3 (without its quantization_config), moonshotai/Kimi-K2-Instruct, openai/gpt-oss-20b
# (likewise) and zai-org/GLM-4.5, with other sizes.
PUBLISHED_DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "kv_lora_rank": 32,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 32,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": DEEPSEEK_YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 12,
    "vocab_size": 128,
}
PUBLISHED_KIMI = PUBLISHED_DEEPSEEK | {
    "model_type": "kimi_k2",
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
    "rope_scaling": PUBLISHED_DEEPSEEK["rope_scaling"] | {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
}
PUBLISHED_GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 1,
    "experts_per_token": 4,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 32,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.55.0",
    "use_cache": True,
    "vocab_size": 128,
}
PUBLISHED_GLM = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": [1, 2, 3],
    "first_k_dense_replace": 1,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 131072,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 32,
    "n_group": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 0,
    # Not the 0.5 that is published, and that transformers takes where a file says nothing.
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0",
    "use_cache": True,
    "use_qk_norm": True,
    "vocab_size": 128,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    "published",
    [
        pytest.param(PUBLISHED_CONFIG, id="MoE"),
        pytest.param(PUBLISHED_CONFIG | {"rope_scaling": YARN}, id="yarn"),
        pytest.param(PUBLISHED_CONFIG | {"pad_token_id": 0}, id="pad token"),
        pytest.param(PUBLISHED_DENSE_CONFIG, id="dense"),
        pytest.param(PUBLISHED_DENSE_CONFIG | {"tie_word_embeddings": True}, id="tied"),
        pytest.param(
            PUBLISHED_DENSE_CONFIG | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
            id="sliding window",
        ),
        pytest.param(PUBLISHED_DEEPSEEK, id="DeepSeek V3"),
        pytest.param(PUBLISHED_KIMI, id="Kimi K2"),
        pytest.param(PUBLISHED_GPT_OSS, id="GPT-OSS"),
        pytest.param(PUBLISHED_GLM, id="GLM-4.5"),
    ],
)
def test_a_published_config_comes_back(published, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(published))
    config = AutoConfig.from_pretrained(tmp_path)
    config.use_cache = False  # as transformers' Trainer leaves it
    config.save_pretrained(tmp_path)
    write_hub_config(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    assert found == published | {"transformers_version": transformers_version}
    again = AutoConfig.from_pretrained(tmp_path)
    config.use_cache = True
    assert again.to_dict() == config.to_dict()


def test_layer_types_that_do_not_follow_from_the_other_keys_stay():
    config = {"model_type": "qwen3", "num_hidden_layers": 2, "max_window_layers": 2, "sliding_window": 64}
    kinds = ["sliding_attention", "full_attention"]
    assert to_hub_dialect(config | {"layer_types": kinds})["layer_types"] == kinds
    assert "layer_types" not in to_hub_dialect(config | {"layer_types": ["full_attention"] * 2})


def test_the_dtype_of_the_weights_can_be_given(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "dtype": "float32"}')
    write_hub_config(tmp_path, torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": "qwen3", "torch_dtype": "bfloat16"}
