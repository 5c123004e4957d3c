"""`config.json` as the Hub's checkpoints spell it.

transformers 5 writes `rope_parameters`, `dtype` and `num_local_experts`; published checkpoints, vLLM, SGLang, LMDeploy
and MLX read `rope_theta` + `rope_scaling`, `torch_dtype` and `num_experts`. transformers reads both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Keys of transformers' own bookkeeping, in no published checkpoint.
_PRIVATE_KEYS = ("distributed_config", "_experts_implementation", "_attn_implementation")
# `num_experts` is what qwen checkpoints say; GPT-OSS and Mixtral do say `num_local_experts`.
_EXPERTS_KEY = {"qwen3_moe": "num_experts"}


def to_hub_dialect(config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration with the Hub's key names; nested configurations too."""
    config = {key: value for key, value in config.items() if key not in _PRIVATE_KEYS}
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, dict) and "model_type" in value:
            config[key] = to_hub_dialect(value)
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    experts_key = _EXPERTS_KEY.get(config.get("model_type", ""))
    if experts_key and "num_local_experts" in config:
        config[experts_key] = config.pop("num_local_experts")
    if "rope_parameters" in config:
        config |= _split_rope(config.pop("rope_parameters"))
    return dict(sorted(config.items()))


def _split_rope(rope: dict[str, Any]) -> dict[str, Any]:
    if any(isinstance(value, dict) for value in rope.values()):
        return {"rope_parameters": rope}  # one set per layer type: the old keys cannot say that
    rope = dict(rope)
    theta = rope.pop("rope_theta")
    scaling = None if rope.get("rope_type", "default") == "default" else rope
    return {"rope_theta": theta, "rope_scaling": scaling}


def write_hub_config(folder: Path) -> None:
    """Rewrite `folder/config.json` in the Hub's dialect. A folder without one (an adapter's) is left alone."""
    path = folder / "config.json"
    if not path.exists():
        return
    config = to_hub_dialect(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
