"""Tiny models and rows that tests share."""

from __future__ import annotations

import torch
from transformers import Qwen3Config, Qwen3MoeConfig, set_seed


def moe_config(**changes) -> Qwen3MoeConfig:
    """Three layers, the middle one dense, 8 experts; wide initialisation so that routing is far from ties."""
    values = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "initializer_range": 0.2,
        "max_position_embeddings": 512,
        "rope_theta": 1e6,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    return Qwen3MoeConfig(**(values | changes))


def dense_config(**changes) -> Qwen3Config:
    values = moe_config().to_dict()
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    shared = {key: values[key] for key in keys}
    return Qwen3Config(**(shared | {"num_hidden_layers": 2, "initializer_range": 0.2} | changes))


def randomize_(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Move norms and all biases off the 1 and 0 that they start at, where mistakes cancel."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "norm" in name or name.endswith("bias"):
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator).to(tensor)
    return model


def build(cls, config, seed: int = 0, dtype=torch.float32):
    set_seed(seed)
    return randomize_(cls(config)).to(dtype)


def uneven_rows(num_rows: int = 16, vocab_size: int = 128, seed: int = 0) -> list[dict]:
    """Token rows of very different lengths and numbers of labels."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(num_rows):
        length = int(torch.randint(5, 40, (), generator=generator))
        tokens = torch.randint(2, vocab_size, (length,), generator=generator).tolist()
        masked = min(length - 2, (index * 7) % length)
        rows.append({"input_ids": tokens, "labels": [-100] * masked + tokens[masked:]})
    return rows
