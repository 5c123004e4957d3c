"""Loading a quantised Hub checkpoint into a bf16 or fp32 model through transformers' own loader.

transformers 5.23 can dequantise too, with ops that it puts before a family's conversions. It slices scales like
weights, which is wrong for a rank's shard and for ragged blocks, and keeps the ops for saving: FP8 saves raise and
MXFP4 saves hold bf16 data under quantised names. Here the loader gets plain tensors and never knows.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from .hub_source import HubSource
from .quantised_format import CheckpointFormatError
from .side_files import NOT_CARRIED_SUFFIXES

logger = logging.getLogger(__name__)

# Arguments of `from_pretrained` that say where a checkpoint is, and that `snapshot_download` takes.
_DOWNLOAD_ARGUMENTS = ("cache_dir", "revision", "token", "local_files_only", "force_download")
_WHERE_ARGUMENTS = (*_DOWNLOAD_ARGUMENTS, "subfolder", "proxies")
# Entries of a configuration that `from_pretrained` has an argument of its own for.
_LOADER_ARGUMENTS = ("dtype", "torch_dtype", "distributed_config", "quantization_config")


def dequantising_arguments(
    model_class: type[PreTrainedModel], name: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any], Path | None]:
    """(name, kwargs, source folder) for transformers' `from_pretrained`.

    Name and arguments come back as they are for a checkpoint that is not quantised, without a folder; otherwise they
    hand transformers the dequantised tensors.

    Raises:
        CheckpointFormatError: see `HubSource`.
    """
    if name is None or kwargs.get("state_dict") is not None or kwargs.get("gguf_file"):
        return name, kwargs, None
    kwargs = dict(kwargs)
    config = _own_config(model_class, name, kwargs)
    if config is None or _quantization_config(config) is None:
        return name, kwargs, None
    _refuse_quantised_model(kwargs.pop("quantization_config", None))
    folder = checkpoint_folder(name, **{key: kwargs[key] for key in _WHERE_ARGUMENTS if key in kwargs})
    source = HubSource(folder)
    kwargs |= {"config": _plain_config(config), "state_dict": source.lazy_tensors()}
    kwargs["dtype"] = _dtype(kwargs.pop("torch_dtype", None) or kwargs.get("dtype"), config)
    if "generation_config" not in kwargs and (folder / "generation_config.json").exists():
        kwargs["generation_config"] = GenerationConfig.from_pretrained(folder)
    return None, kwargs, folder


def side_folder(name: Any, arguments: dict[str, Any]) -> Path | None:
    """The folder with what lies beside the weights of a plain checkpoint; from the Hub, those files are downloaded.

    They are a few megabytes, and only rank 0, which writes them again, asks for them.

    Args:
        arguments: of `from_pretrained`, for a checkpoint that has just been loaded.

    Returns:
        None for weights that came from elsewhere, on other ranks, and, with a line in the log, where the files cannot
        be had.
    """
    if name is None or arguments.get("state_dict") is not None or arguments.get("gguf_file"):
        return None
    local = Path(name) / arguments.get("subfolder", "")
    if local.is_dir():
        return local if (local / "config.json").exists() else None
    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        return None
    where = {key: arguments[key] for key in _WHERE_ARGUMENTS if key in arguments}
    try:
        return checkpoint_folder(name, without_weights=True, **where)
    except OSError as error:  # of the client and of the network alike
        logger.warning(
            "The files beside the weights of %s could not be read (%s): a model saved from it will have no tokenizer "
            "and a config.json that is written anew.",
            name,
            error,
        )
        return None


def record_source(model: Any, name: Any, folder: Path) -> None:
    """Note on the model where it came from: `name_or_path` as transformers does, and the folder for its export."""
    model.config.name_or_path = model.name_or_path = str(name)
    model.source_folder = folder.absolute()


def refuse_ignored_scales(name: Any, unexpected: Iterable[str]) -> None:
    """An error for a checkpoint that turned out to hold scales which `config.json` does not announce."""
    scales = [key for key in unexpected if key.endswith(("weight_scale_inv", "weight_scale"))]
    if scales:
        raise CheckpointFormatError(
            f"{name} holds {len(scales)} scales of quantised weights ({scales[0]}), but its config.json has no "
            "quantization_config, so they were left out; take config.json from the repository of these weights."
        )


def checkpoint_folder(
    name: Any, subfolder: str = "", proxies: Any = None, without_weights: bool = False, **download: Any
) -> Path:
    """The local folder of a checkpoint, downloaded from the Hub if `name` is no folder here."""
    folder = Path(name)
    if not folder.is_dir():
        # Copies in other layouts lie in folders of their own, `original/` in GPT-OSS.
        pattern = f"{subfolder}/*" if subfolder else "*"
        weights = [f"*{suffix}" for suffix in NOT_CARRIED_SUFFIXES] if without_weights else ["*.bin", "*.pth", "*.gguf"]
        ignored = [*weights, *([] if subfolder else ["*/*"])]
        folder = Path(snapshot_download(str(name), allow_patterns=pattern, ignore_patterns=ignored, **download))
    return folder / subfolder


def _own_config(model_class: type[PreTrainedModel], name: Any, kwargs: dict[str, Any]) -> PreTrainedConfig | None:
    """The configuration of the checkpoint; entries of it among the arguments move there, as in transformers."""
    config = kwargs.get("config")
    if isinstance(config, PreTrainedConfig):
        return config
    config_class: Any = model_class.config_class
    where = {key: kwargs[key] for key in _WHERE_ARGUMENTS if key in kwargs}
    try:
        config = config_class.from_pretrained(config or name, **where)
    except OSError:
        return None  # transformers' loader will find the same and say what is wrong
    if _quantization_config(config) is not None:
        for key in [key for key in kwargs if key in config.to_dict() and key not in _LOADER_ARGUMENTS]:
            setattr(config, key, kwargs.pop(key))
    return config


def _quantization_config(config: PreTrainedConfig) -> Any:
    text_config = config.get_text_config(decoder=True)
    return getattr(config, "quantization_config", None) or getattr(text_config, "quantization_config", None)


def _plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def _refuse_quantised_model(requested: Any) -> None:
    if requested is not None and not getattr(requested, "dequantize", False):
        raise CheckpointFormatError(
            f"quantization_config={type(requested).__name__} was passed for a checkpoint that is quantised; xtuner_hf "
            "trains in bf16 or fp32 and dequantises while it loads: leave the argument out."
        )


def _dtype(requested: Any, config: PreTrainedConfig) -> Any:
    if requested not in (None, "auto"):
        return requested
    return config.dtype or torch.bfloat16
