"""Our model class for a checkpoint, by its `model_type`."""

from __future__ import annotations

import importlib
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from .kimi_k2 import configuration as _kimi_k2  # noqa: F401  lets AutoConfig read its config.json

# model_type -> (module of this package, class name), imported when first used.
CAUSAL_LM_CLASSES = {
    "deepseek_v3": ("deepseek_v3.modeling", "DeepseekV3ForCausalLM"),
    "glm4_moe": ("glm4_moe.modeling", "Glm4MoeForCausalLM"),
    "gpt_oss": ("gpt_oss.modeling", "GptOssForCausalLM"),
    "kimi_k2": ("kimi_k2.modeling", "DeepseekV3ForCausalLM"),
    "qwen3": ("qwen3.modeling", "Qwen3ForCausalLM"),
    "qwen3_moe": ("qwen3_moe.modeling", "Qwen3MoeForCausalLM"),
}

# What `from_pretrained` takes to find a checkpoint, and the configuration's own loader takes too.
HUB_ARGUMENTS = ("cache_dir", "revision", "token", "local_files_only", "force_download", "subfolder", "proxies")


class UnknownFamilyError(ValueError):
    """A `model_type` for which this package has no class."""


def causal_lm_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Our class for this configuration.

    Raises:
        UnknownFamilyError: names the families that there are.
    """
    if config.model_type not in CAUSAL_LM_CLASSES:
        raise UnknownFamilyError(
            f"xtuner_hf has no causal language model of model_type {config.model_type!r}; it has: "
            f"{', '.join(sorted(CAUSAL_LM_CLASSES))}. transformers' own AutoModelForCausalLM may have one."
        )
    module, name = CAUSAL_LM_CLASSES[config.model_type]
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)


class AutoModelForCausalLM:
    """Like transformers' class of this name, with the classes of this package."""

    def __init__(self):
        raise OSError("AutoModelForCausalLM is made with from_pretrained(name) or from_config(config).")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """Load a checkpoint from a folder or the Hub; arguments as for transformers' `from_pretrained`."""
        config = kwargs.pop("config", None)
        if config is None:
            hub_kwargs = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
            config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
        model_class = _model_class(config, kwargs)
        return model_class.from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
        """A model with random weights."""
        return _model_class(config, kwargs)._from_config(config, **kwargs)


def _model_class(config: PreTrainedConfig, kwargs: dict[str, Any]) -> Any:
    """Our class for this configuration, if it takes the arguments that only some families have."""
    model_class: Any = causal_lm_class(config)
    if "mtp_loss_coef" in kwargs:
        check_has_mtp(model_class, config, kwargs["mtp_loss_coef"])
    return model_class


def check_has_mtp(model_class: Any, config: PreTrainedConfig, coef: float | None) -> None:
    """Raise a ValueError for a coefficient that goes to a family without multi-token prediction layers."""
    if not model_class.supports_mtp:
        raise ValueError(
            f"mtp_loss_coef is {coef}, but {config.model_type} has no multi-token prediction layers: leave it out."
        )
