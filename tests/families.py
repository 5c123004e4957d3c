"""Every family in tiny: configuration, transformers' class and ours, and the same weights in both.

Values are chosen so that each corner is alive: windows shorter than the rows, clamps that are hit, groups that mask,
head sizes that differ, a YaRN ramp that is fractional (GPT-OSS) or degenerate (Kimi K2), positions beyond the original
context.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from transformers import DeepseekV3Config, Glm4MoeConfig, GptOssConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config

from tests.tiny import build, dense_config, moe_config
from xtuner_hf.models.auto import causal_lm_class
from xtuner_hf.models.kimi_k2.configuration import KimiK2Config

VOCABULARY = 128
WINDOW = 5


def gpt_oss_config(**changes) -> GptOssConfig:
    yarn = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
        "swiglu_limit": 2.5,
        "initializer_range": 0.2,
        "max_position_embeddings": 512,
        "rope_parameters": yarn | {"rope_theta": 150000.0, "original_max_position_embeddings": 16},
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    return GptOssConfig(**(values | changes))


_MLA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_MLA_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 16,
}


def deepseek_config(**changes) -> DeepseekV3Config:
    values = _MLA | {
        "n_routed_experts": 16,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
        "rope_parameters": _MLA_YARN | {"beta_fast": 32.0, "rope_theta": 10000.0},
    }
    return DeepseekV3Config(**copy.deepcopy(values | changes))


def kimi_config(**changes) -> KimiK2Config:
    values = _MLA | {
        "n_routed_experts": 24,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.827,
        "num_nextn_predict_layers": 0,
        "rope_parameters": _MLA_YARN | {"beta_fast": 1.0, "rope_theta": 50000.0},
    }
    return KimiK2Config(**copy.deepcopy(values | changes))


def glm_config(**changes) -> Glm4MoeConfig:
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "attention_bias": True,
        "use_qk_norm": True,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 1.5,
        "num_nextn_predict_layers": 0,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    return Glm4MoeConfig(**(values | changes))


def qwen3_config(**changes) -> Qwen3Config:
    """Dense; the second of its layers has a window."""
    window = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    return dense_config(**(window | {"eos_token_id": 1, "pad_token_id": 0} | changes))


@dataclass(frozen=True)
class Family:
    """One family in tiny."""

    make_config: Callable[..., PreTrainedConfig]
    stock_class: type[PreTrainedModel]
    # transformers' eager softmax is fp32 in an fp64 model (not GPT-OSS's); to 1e-10 only the same rounding agrees.
    exact_attention: str | None = "eager"

    def ours(
        self,
        dtype=torch.float32,
        kernel: str = "xtuner_grouped_mm",
        attention: str | None = None,
        init: dict[str, Any] | None = None,
        **changes,
    ) -> PreTrainedModel:
        """Our model; `init` goes to its constructor, `changes` to its configuration."""
        config = self.make_config(**changes)
        config._experts_implementation, config._attn_implementation = kernel, attention
        return cast(build(partial(causal_lm_class(config), **(init or {})), config), dtype)

    def pair(
        self, dtype=torch.float64, kernel: str = "xtuner_reference", **changes
    ) -> tuple[PreTrainedModel, PreTrainedModel]:
        """transformers' model, eager throughout, and ours with its weights."""
        ours = self.ours(dtype, kernel, self.exact_attention, **changes)
        config = self.make_config(**changes)
        config._attn_implementation = config._experts_implementation = "eager"
        stock = cast(self.stock_class(config), dtype)
        stock.load_state_dict(ours.state_dict())
        return stock, ours


def cast(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    # Not `.to(dtype)`: it would take the correction bias along, which stays fp32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


FAMILIES = {
    "qwen3_moe": Family(moe_config, transformers.Qwen3MoeForCausalLM),
    "gpt_oss": Family(gpt_oss_config, transformers.GptOssForCausalLM, exact_attention=None),
    "deepseek_v3": Family(deepseek_config, transformers.DeepseekV3ForCausalLM),
    "kimi_k2": Family(kimi_config, transformers.DeepseekV3ForCausalLM),
    "glm4_moe": Family(glm_config, transformers.Glm4MoeForCausalLM),
}
"""Those with experts."""
ALL_FAMILIES = FAMILIES | {"qwen3": Family(qwen3_config, transformers.Qwen3ForCausalLM)}


def tokens(batch: int = 2, length: int = 24, seed: int = 5) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
