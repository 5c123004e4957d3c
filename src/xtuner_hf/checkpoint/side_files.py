"""What lies beside the weights: `config.json`, generation config, tokenizer and remote code, out as they came in."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

from .folder import MARKER
from .hub_config import to_hub_dialect, write_hub_config
from .unknown_tensors import copy_unknown_tensors

# Weights, and what says things of the source that are not true of a trained model.
NOT_CARRIED_SUFFIXES = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx")
_NOT_CARRIED = (
    *("config.json", "generation_config.json", "README.md"),
    *("trainer_state.json", "history.jsonl", "training.png", MARKER),  # of the run that made the source
)
# Where transformers saves further chat templates of a tokenizer.
_TEMPLATES = "additional_chat_templates"
# Entries that loading and training set for themselves; they say nothing about the model.
_RUN_TIME_KEYS = (
    "_attn_implementation",
    "_experts_implementation",
    "_name_or_path",
    "architectures",
    "distributed_config",
    "dtype",
    "output_router_logits",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)


def write_side_files(model: Any, target: Path, *, quantised: bool = False, dtype: torch.dtype | None = None) -> None:
    """Write all of it for a model that was loaded from a folder; without one `config.json` in the Hub's dialect.

    Args:
        model: its `source_folder` says where it came from.
        quantised: the weights are in the source's quantised format again.
        dtype: what weights that are not were written in; None stands for the model's `config.dtype`.
    """
    for path in getattr(model, "remote_code", ()):  # before the source's, which may be older than transformers 5
        shutil.copyfile(path, target / path.name)
    source = getattr(model, "source_folder", None)  # transformers' own models have none
    if source is None or not (source / "config.json").exists():
        write_hub_config(target, dtype)
        return
    if getattr(model, "unknown_tensors", ()):
        copy_unknown_tensors(model, source, target)
    write_config_like(source, target, model.config, quantised=quantised, dtype=dtype)
    write_generation_config_like(source, target, getattr(model, "generation_config", None))
    copy_side_files(source, target)


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, processor, templates, remote code and licence; returns the names.

    Files that `target` has already are left: a tokenizer that the training changed has been written there. The model
    card is not carried over, it describes another model.
    """
    copied = []
    for path in sorted(source.iterdir()):
        is_carried = path.is_file() and path.name not in _NOT_CARRIED and not path.name.startswith(".")
        if is_carried and not path.name.endswith(NOT_CARRIED_SUFFIXES) and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)  # follows the links of the Hub's cache
            copied.append(path.name)
    if (source / _TEMPLATES).is_dir() and not (target / _TEMPLATES).exists():
        shutil.copytree(source / _TEMPLATES, target / _TEMPLATES)
        copied.append(_TEMPLATES)
    return copied


def write_config_like(
    source: Path, target: Path, config: PreTrainedConfig, *, quantised: bool, dtype: torch.dtype | None = None
) -> None:
    """Write `target/config.json`: the source's, in its words and order, with what differs in `config`.

    A source that transformers 5 wrote in words of its own is put in the Hub's first.

    Args:
        config: of the model as it is now.
        quantised: keep `quantization_config`, because the weights are written in that format again.
        dtype: of weights that are not; None stands for the configuration's.
    """
    text = (source / "config.json").read_text(encoding="utf-8")
    published = json.loads(text)
    before = type(config).from_dict(copy.deepcopy(published))
    is_of_transformers_5 = "rope_parameters" in published or "dtype" in published
    wanted = to_hub_dialect(published) if is_of_transformers_5 else published
    changed = with_changes(wanted, to_hub_dialect(_plain_dict(before)), to_hub_dialect(_plain_dict(config)))
    if not quantised:
        changed = without_quantisation(changed)
        written = dtype or config.dtype
        dtype_name = str(written).removeprefix("torch.")
        if written is not None and dtype_name != changed.get("torch_dtype", "bfloat16"):
            changed["torch_dtype"] = dtype_name
    _write(target / "config.json", text, published, changed)


def write_generation_config_like(source: Path, target: Path, generation_config: GenerationConfig | None) -> None:
    """Write `target/generation_config.json` likewise; what stands there already stays if the source has none."""
    path = source / "generation_config.json"
    if generation_config is None or not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    published = json.loads(text)
    before = GenerationConfig.from_dict(copy.deepcopy(published)).to_dict()
    _write(target / path.name, text, published, with_changes(published, before, generation_config.to_dict()))


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` without its `quantization_config`, in nested configurations too."""
    return {
        key: without_quantisation(value) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in config.items()
        if key != "quantization_config"
    }


def with_changes(wanted: Mapping[str, Any], before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """`wanted` with the entries that differ between `before` and `now`, in its own order, new ones last."""
    result = dict(wanted)
    for key in (*before, *(key for key in now if key not in before)):
        old, new = before.get(key), now.get(key)
        if key in _RUN_TIME_KEYS or old == new:
            continue
        if key not in now:
            result.pop(key, None)
        elif isinstance(old, dict) and isinstance(new, dict) and isinstance(wanted.get(key), dict):
            result[key] = with_changes(wanted[key], old, new)
        else:
            result[key] = new
    return result


def _plain_dict(config: PreTrainedConfig) -> dict[str, Any]:
    return json.loads(config.to_json_string(use_diff=False))


def _write(path: Path, text: str, published: dict[str, Any], changed: dict[str, Any]) -> None:
    # An unchanged file keeps its bytes.
    new = text if changed == published else json.dumps(changed, indent=2, ensure_ascii=False) + "\n"
    path.write_text(new, encoding="utf-8")
