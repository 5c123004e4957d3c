"""The configuration of what is to be planned: a folder, a config.json, or a published model by its name."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ..models.auto import model_class
from .devices import PlanError


@cache
def known_models() -> dict[str, dict[str, Any]]:
    """What sets the configuration of each published model apart from its class's defaults, by name."""
    return json.loads((Path(__file__).parent / "known_models.json").read_text())


def model_names() -> list[str]:
    """Of published models that need no file."""
    return list(known_models())


def find_config(model: str | Path | PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of a model.

    Args:
        model: a folder with a config.json, such a file, or one of `model_names()`.

    Raises:
        PlanError: for anything else, and for a family that this package does not have.
    """
    config = model if isinstance(model, PreTrainedConfig) else _read(model)
    try:
        model_class(config)
    except ValueError as error:
        raise PlanError(str(error)) from None
    return config


def _read(model: str | Path) -> PreTrainedConfig:
    name = str(model).lower().rsplit("/", 1)[-1]
    path = Path(model)
    if not path.exists() and name in known_models():
        return AutoConfig.for_model(**known_models()[name])
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise PlanError(
            f"{model} is no folder with a config.json, no such file and no known model; known are: "
            f"{', '.join(model_names())}."
        )
    try:
        values = json.loads(file.read_text())
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except (ValueError, KeyError, TypeError) as error:
        reason = "it names no model_type" if isinstance(error, KeyError) else str(error).split("\n")[0]
        raise PlanError(f"{file} is no configuration of a model: {reason}.") from None
