"""The quantised formats by `quant_method`, and what a checkpoint of each holds, from names and shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .fp8_blocks import Fp8Blocks
from .int4 import PackedInt4
from .mxfp4 import Mxfp4
from .quantised_format import CheckpointFormatError, QuantisedFormat, TensorSpec

FORMATS: dict[str, type[QuantisedFormat]] = {
    "fp8": Fp8Blocks,
    "mxfp4": Mxfp4,
    "compressed-tensors": PackedInt4,
}


def quantised_format(quantization_config: Mapping[str, Any]) -> QuantisedFormat:
    """The format that a `quantization_config` of `config.json` describes.

    Raises:
        CheckpointFormatError: a `quant_method`, or a variant of one, that this package does not read.
    """
    method = quantization_config.get("quant_method")
    if method not in FORMATS:
        raise CheckpointFormatError(
            f"the checkpoint's quantization_config has quant_method {method!r}; xtuner_hf reads "
            f"{', '.join(FORMATS)}. Load a version of this model in bf16 or in one of these formats."
        )
    return FORMATS[method](quantization_config)


def quantised_manifest(plain: Iterable[TensorSpec], quantization_config: Mapping[str, Any]) -> list[TensorSpec]:
    """What the published checkpoint of a format stores for the tensors of the bf16 checkpoint.

    Args:
        plain: every tensor of the bf16 checkpoint under its Hub name.
    """
    fmt = quantised_format(quantization_config)
    stored = []
    for spec in plain:
        stored += part_specs(fmt, spec) if fmt.quantises(spec) else [spec]
    return stored


def part_specs(fmt: QuantisedFormat, plain: TensorSpec) -> list[TensorSpec]:
    """The tensors that the format stores for one that it quantises."""
    return [TensorSpec(plain.name + suffix, dtype, shape) for suffix, (dtype, shape) in fmt.parts(plain.shape).items()]
