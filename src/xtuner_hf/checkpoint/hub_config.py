"""`config.json` as the Hub's checkpoints spell it.

transformers 5 writes `rope_parameters`, `dtype` and `num_local_experts`; published checkpoints, vLLM, SGLang, LMDeploy
and MLX read `rope_theta` + `rope_scaling`, `torch_dtype` and `num_experts`. transformers reads both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

# Keys of transformers' own bookkeeping, in no published checkpoint.
_PRIVATE_KEYS = ("distributed_config", "base_model_ep_plan", "_experts_implementation", "_attn_implementation")
# `num_experts` is what qwen checkpoints say; GPT-OSS and Mixtral do say `num_local_experts`.
_EXPERTS_KEY = {"qwen3_moe": "num_experts"}
# Families whose checkpoints leave `layer_types` to the two keys that it follows from.
_IMPLIED_LAYER_TYPES = ("qwen3",)
# Families whose remote code reads the kind of RoPE as `rope_scaling["type"]`, and gets a KeyError from "rope_type".
_REMOTE_CODE_OF_DEEPSEEK = ("deepseek_v3", "kimi_k2")


def to_hub_dialect(config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration with the Hub's key names; nested configurations too."""
    config = {key: value for key, value in config.items() if key not in _PRIVATE_KEYS}
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, dict) and "model_type" in value:
            config[key] = to_hub_dialect(value)
    family = config.get("model_type", "")
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    if family in _EXPERTS_KEY and "num_local_experts" in config:
        config[_EXPERTS_KEY[family]] = config.pop("num_local_experts")
    if family in _IMPLIED_LAYER_TYPES and _layer_types_are_implied(config):
        del config["layer_types"]
    if "rope_parameters" in config:
        config |= _split_rope(
            config.pop("rope_parameters"), "type" if family in _REMOTE_CODE_OF_DEEPSEEK else "rope_type"
        )
    added = _additions(config)
    config = {key: value for key, value in config.items() if key not in added or value != added[key]}
    if config.get("pad_token_id", 0) is None:
        del config["pad_token_id"]
    if "use_cache" in config:
        config["use_cache"] = True  # a trainer switches it off for its own run
    return dict(sorted(config.items()))


def _split_rope(rope: dict[str, Any], kind_key: str) -> dict[str, Any]:
    if any(isinstance(value, dict) for value in rope.values()):
        return {"rope_parameters": rope}  # one set per layer type: the old keys cannot say that
    rope = dict(rope)
    outside = {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    return outside | {"rope_scaling": None if kind == "default" else dict(sorted((rope | {kind_key: kind}).items()))}


def _additions(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers adds to a family's files, and takes for granted when it reads one without."""
    family = config.get("model_type", "")
    if family in _REMOTE_CODE_OF_DEEPSEEK and "qk_rope_head_dim" in config:
        rope, nope = config["qk_rope_head_dim"], config.get("qk_nope_head_dim", 0)
        return {"head_dim": rope, "qk_head_dim": nope + rope, "rope_interleave": True, "output_router_logits": False}
    if family == "gpt_oss":
        return {"bos_token_id": None, "swiglu_alpha": 1.702}
    return {"bos_token_id": None, "output_router_logits": False} if family == "glm4_moe" else {}


def _layer_types_are_implied(config: dict[str, Any]) -> bool:
    if "layer_types" not in config:
        return False
    num_layers = config["num_hidden_layers"]
    num_full = config["max_window_layers"] if config.get("sliding_window") else num_layers
    kinds = ["full_attention" if layer < num_full else "sliding_attention" for layer in range(num_layers)]
    return config["layer_types"] == kinds


def write_hub_config(folder: Path, dtype: torch.dtype | None = None) -> None:
    """Rewrite `folder/config.json` in the Hub's dialect. A folder without one (an adapter's) is left alone.

    Args:
        dtype: of the weights next to it; None leaves what the file says.
    """
    path = folder / "config.json"
    if not path.exists():
        return
    config = to_hub_dialect(json.loads(path.read_text(encoding="utf-8")))
    if dtype is not None:
        config["torch_dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
