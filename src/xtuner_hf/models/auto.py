"""Our model class for a checkpoint, by its `model_type`."""

from __future__ import annotations

import importlib
import os
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from .interns1 import configuration as _interns1  # noqa: F401  lets AutoConfig read its config.json
from .kimi_k2 import configuration as _kimi_k2  # noqa: F401

# model_type -> (module of this package, class name), imported when first used.
CAUSAL_LM_CLASSES = {
    "deepseek_v3": ("deepseek_v3.modeling", "DeepseekV3ForCausalLM"),
    "glm4_moe": ("glm4_moe.modeling", "Glm4MoeForCausalLM"),
    "gpt_oss": ("gpt_oss.modeling", "GptOssForCausalLM"),
    "kimi_k2": ("kimi_k2.modeling", "DeepseekV3ForCausalLM"),
    "qwen3": ("qwen3.modeling", "Qwen3ForCausalLM"),
    "qwen3_moe": ("qwen3_moe.modeling", "Qwen3MoeForCausalLM"),
}
IMAGE_TEXT_CLASSES = {
    "interns1": ("interns1.modeling", "InternS1ForConditionalGeneration"),
    "internvl": ("internvl.modeling", "InternVLForConditionalGeneration"),
}

# What `from_pretrained` takes to find a checkpoint, and the configuration's own loader takes too.
HUB_ARGUMENTS = ("cache_dir", "revision", "token", "local_files_only", "force_download", "subfolder", "proxies")


class UnknownFamilyError(ValueError):
    """A `model_type` for which this package has no class."""


def causal_lm_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Our class for the configuration of a language model.

    Raises:
        UnknownFamilyError: names the families that there are.
    """
    return AutoModelForCausalLM.class_of(config)


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Our class for this configuration, of a language model or of one that reads images.

    Raises:
        UnknownFamilyError: names the families that there are.
    """
    reads_images = config.model_type in IMAGE_TEXT_CLASSES
    return (AutoModelForImageTextToText if reads_images else AutoModelForCausalLM).class_of(config)


def num_experts(config: PreTrainedConfig) -> int | None:
    """Experts of each MoE layer, None for a dense model."""
    text = config.get_text_config()
    names = ("num_experts", "n_routed_experts", "num_local_experts")
    return next((getattr(text, name) for name in names if getattr(text, name, None)), None)


class _AutoModel:
    """What the classes below share."""

    classes: ClassVar[dict[str, tuple[str, str]]]
    kind: ClassVar[str]

    def __init__(self):
        raise OSError(f"{type(self).__name__} is made with from_pretrained(name) or from_config(config).")

    @classmethod
    def class_of(cls, config: PreTrainedConfig) -> type[PreTrainedModel]:
        if config.model_type not in cls.classes:
            raise UnknownFamilyError(
                f"xtuner_hf has no {cls.kind} of model_type {config.model_type!r}; it has: "
                f"{', '.join(sorted(cls.classes))}. transformers' own {cls.__name__} may have one."
            )
        module, name = cls.classes[config.model_type]
        return getattr(importlib.import_module(f"{__package__}.{module}"), name)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """Load a checkpoint from a folder or the Hub; arguments as for transformers' `from_pretrained`."""
        config = kwargs.pop("config", None) or read_config(pretrained_model_name_or_path, kwargs)
        chosen = _taking(cls.class_of(config), config, kwargs)
        return chosen.from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
        """A model with random weights."""
        return _taking(cls.class_of(config), config, kwargs)._from_config(config, **kwargs)


class AutoModelForCausalLM(_AutoModel):
    """Like transformers' class of this name, with the classes of this package."""

    classes = CAUSAL_LM_CLASSES
    kind = "causal language model"


class AutoModelForImageTextToText(_AutoModel):
    """Like transformers' class of this name, with the classes of this package."""

    classes = IMAGE_TEXT_CLASSES
    kind = "model of images and text"


def load_model(name: Any, **kwargs: Any) -> PreTrainedModel:
    """A checkpoint of either kind; arguments as for `from_pretrained`."""
    config = read_config(name, kwargs)
    return _taking(model_class(config), config, kwargs).from_pretrained(name, config=config, **kwargs)


def read_config(name: Any, kwargs: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of a checkpoint, found with those of these arguments of `from_pretrained` that say where.

    Raises:
        UnknownFamilyError: for InternVL in the layout of its own code.
        FileNotFoundError: for a path that is none.
    """
    if str(name).startswith(("/", "./", "../", "~")) and not os.path.exists(name):
        raise FileNotFoundError(f"There is no folder {name}: check the path, or name a model of the Hub.")
    where = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
    found, _ = PreTrainedConfig.get_config_dict(name, **where)
    if found.get("model_type") == "internvl_chat":
        raise UnknownFamilyError(
            f"{name} is in the layout of InternVL's own code. Take the repository of the same name that ends with -HF, "
            f"or convert it: `xtuner-hf layout {name} OUT --to hf`."
        )
    return AutoConfig.from_pretrained(name, **where)


def _taking(chosen: Any, config: PreTrainedConfig, kwargs: dict[str, Any]) -> Any:
    """This class, if it takes the arguments that only some families have."""
    if "mtp_loss_coef" in kwargs:
        check_has_mtp(chosen, config, kwargs["mtp_loss_coef"])
    return chosen


def check_has_mtp(model_class: Any, config: PreTrainedConfig, coef: float | None) -> None:
    """Raise a ValueError for a coefficient that goes to a family without multi-token prediction layers."""
    if not model_class.supports_mtp:
        raise ValueError(
            f"mtp_loss_coef is {coef}, but {config.model_type} has no multi-token prediction layers: leave it out."
        )
