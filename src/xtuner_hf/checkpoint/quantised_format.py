"""What a quantised Hub format is: the tensors that it stores in place of a plain one.

A *plain* tensor has the name and shape of the bf16 checkpoint. A quantised format stores it as *parts*, named after
it: `q_proj.weight` in FP8 blocks is `q_proj.weight` (e4m3) and `q_proj.weight_scale_inv`.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch

# One (start, stop) per dimension: which part of a tensor is meant.
Region = tuple[tuple[int, int], ...]

# Modules with 2-D weights that no published checkpoint quantises (DeepSeek-V3 and Kimi K2 do not list them).
NEVER_QUANTISED = ("embed_tokens", "lm_head", "mlp.gate", "eh_proj", "shared_head")


class CheckpointFormatError(ValueError):
    """A checkpoint whose files, configuration and tensors do not belong together, or a format that we do not know."""


class TensorSpec(NamedTuple):
    """A tensor of a checkpoint without its values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class QuantisedFormat(ABC):
    """One `quantization_config` of the Hub, both ways."""

    suffixes: ClassVar[tuple[str, ...]]
    """What the names of the parts add to the plain name; the scale's is the second."""
    row_multiple: int = 1
    """Rows of the first dimension that must be quantised together."""
    writable: ClassVar[bool] = True
    """Whether `quantise` is there."""

    @abstractmethod
    def __init__(self, config: Mapping[str, Any]):
        """From the `quantization_config` of `config.json`.

        Raises:
            CheckpointFormatError: a variant of the format that this package does not read.
        """

    def part_of(self, stored: TensorSpec) -> tuple[str, str] | None:
        """(plain name, suffix) if this stored tensor is a part of a quantised one."""
        for suffix in filter(None, self.suffixes):
            if stored.name.endswith(suffix):
                return stored.name.removesuffix(suffix), suffix
        return None

    @abstractmethod
    def quantises(self, plain: TensorSpec) -> bool:
        """Whether a published checkpoint of this format stores that tensor quantised."""

    @abstractmethod
    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """suffix -> (dtype, shape) of what is stored for a plain tensor of this shape."""

    @abstractmethod
    def plain_shape(self, parts: Mapping[str, TensorSpec]) -> tuple[int, ...]:
        """The shape of the plain tensor, from the parts that are there.

        Raises:
            CheckpointFormatError: parts that do not fit together.
        """

    @abstractmethod
    def part_regions(self, region: Region) -> dict[str, Region]:
        """suffix -> what must be read of that part to dequantise a region of the plain tensor."""

    @abstractmethod
    def dequantise(self, parts: Mapping[str, torch.Tensor], region: Region) -> torch.Tensor:
        """The region's values, exact: rounding them to bf16 is the only rounding.

        Args:
            parts: what `part_regions(region)` names, by suffix.
        """

    @abstractmethod
    def quantise(self, plain: torch.Tensor, source_scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The parts of a plain tensor, by suffix.

        Args:
            source_scale: the scales that the tensor was read with. A block whose values lie exactly on their grid
                keeps its scale and so its bytes. Without them MXFP4 values come back exactly all the same, those of
                FP8 blocks within two roundings: the scale is made from a largest value that bf16 has rounded.
        """


def check_part(part: TensorSpec, dtypes: tuple[torch.dtype, ...], ndim: int) -> None:
    if part.dtype not in dtypes or len(part.shape) != ndim:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise CheckpointFormatError(
            f"{part.name} is {describe(part)}, expected {ndim} dimensions of {wanted}; the file is damaged or "
            "quantization_config in config.json is another checkpoint's."
        )


def check_shape(part: TensorSpec, wanted: tuple[int, ...], of: TensorSpec) -> None:
    if part.shape != wanted:
        raise CheckpointFormatError(
            f"{part.name} has shape {list(part.shape)}, expected {list(wanted)} for {of.name} of {list(of.shape)}; the "
            "file is damaged or quantization_config in config.json is another checkpoint's."
        )


def describe(spec: TensorSpec) -> str:
    return f"{str(spec.dtype).removeprefix('torch.')} {list(spec.shape)}"


def covers(module: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns of a `modules_to_not_convert` or `ignore` list means this module.

    A pattern names a module or one that contains it, from the start or from any dot; `*` stands for one part of a
    name, and `re:` begins a regular expression.
    """
    return any(_covers(module, pattern) for pattern in patterns)


def _covers(module: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    expression = re.escape(pattern).replace(r"\*", r"[^.]+")
    return re.search(rf"(^|\.){expression}(\.|$)", module) is not None


def require(config: Mapping[str, Any], key: str, *allowed: Any) -> None:
    """Raise unless `config[key]` is one of the allowed values; None stands for a key that is not there too."""
    if config.get(key) not in allowed:
        raise CheckpointFormatError(
            f"quantization_config has {key}={config.get(key)!r} with quant_method {config.get('quant_method')!r}; "
            f"xtuner_hf reads {' or '.join(map(repr, allowed))}. Load a bf16 version of this checkpoint."
        )
