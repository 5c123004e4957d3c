"""INT4 groups of Kimi-K2-Thinking: compressed-tensors' `pack-quantized`, read only.

`X.weight_packed` is int32 [R, C / 8], eight values a word from the lowest bits up, each the signed value plus 8;
`X.weight_scale` is bf16 [R, C / 32]; `X.weight_shape` holds (R, C). weight = value * scale.

Legend: R rows, C columns, W = C / 8 words, G = C / 32 groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .quantised_format import (
    NEVER_QUANTISED,
    CheckpointFormatError,
    QuantisedFormat,
    Region,
    TensorSpec,
    check_part,
    check_shape,
    covers,
    require,
)

BITS = 4
PER_WORD = 32 // BITS


def dequantise_int4(packed_RW: torch.Tensor, scale_RG: torch.Tensor) -> torch.Tensor:
    """fp32 [R, W * 8], exact; bf16 of it is what compressed-tensors computes from a bf16 scale."""
    shifts = torch.arange(0, 32, BITS, dtype=torch.int32, device=packed_RW.device)
    values_RC = ((packed_RW[..., None] >> shifts) & (2**BITS - 1)).flatten(1).float() - 2 ** (BITS - 1)
    group = values_RC.shape[1] // scale_RG.shape[1]
    return values_RC * scale_RG.float().repeat_interleave(group, dim=1)


class PackedInt4(QuantisedFormat):
    """`quant_method` compressed-tensors, `format` pack-quantized, symmetric 4-bit groups of weights alone."""

    suffixes = ("_packed", "_scale", "_shape")
    writable = False

    def __init__(self, config: Mapping[str, Any]):
        require(config, "quant_method", "compressed-tensors")
        require(config, "format", "pack-quantized")
        groups = list((config.get("config_groups") or {}).values())
        if len(groups) != 1 or groups[0].get("input_activations"):
            raise CheckpointFormatError(
                f"quantization_config has {len(groups)} config_groups or quantised activations; xtuner_hf reads "
                "compressed-tensors with one group that quantises weights. Load a bf16 version of this checkpoint."
            )
        weights = {"quant_method": "compressed-tensors", **groups[0]["weights"]}
        require(weights, "num_bits", BITS)
        require(weights, "type", "int")
        require(weights, "strategy", "group")
        require(weights, "symmetric", True)
        require(weights, "actorder", None)
        require(weights, "group_size", 32, 64, 128)
        self.group = weights["group_size"]
        self.not_converted = (*NEVER_QUANTISED, *(config.get("ignore") or ()))

    def part_of(self, stored: TensorSpec) -> tuple[str, str] | None:
        part = super().part_of(stored)
        return part if part and part[0].endswith(".weight") else None

    def quantises(self, plain: TensorSpec) -> bool:
        module, _, leaf = plain.name.rpartition(".")
        return leaf == "weight" and len(plain.shape) == 2 and not covers(module, self.not_converted)

    def parts(self, shape):
        rows, cols = shape
        if cols % self.group:
            raise CheckpointFormatError(f"INT4 shares scales by {self.group} columns; {cols} is not a multiple of it.")
        return {
            "_packed": (torch.int32, (rows, cols // PER_WORD)),
            "_scale": (torch.bfloat16, (rows, cols // self.group)),
            "_shape": (torch.int32, (2,)),
        }

    def plain_shape(self, parts: Mapping[str, TensorSpec]) -> tuple[int, ...]:
        packed, scale, shape = (parts[suffix] for suffix in self.suffixes)
        check_part(packed, (torch.int32,), 2)
        check_part(scale, (torch.bfloat16, torch.float16, torch.float32), 2)
        check_part(shape, (torch.int32, torch.int64), 1)
        rows, words = packed.shape
        check_shape(scale, (rows, words * PER_WORD // self.group), packed)
        return rows, words * PER_WORD

    def part_regions(self, region: Region) -> dict[str, Region]:
        rows, (start, stop) = region
        # Whole groups, so that words and scales begin together.
        first, last = start // self.group, -(-stop // self.group)
        per_group = self.group // PER_WORD
        return {"_packed": (rows, (first * per_group, last * per_group)), "_scale": (rows, (first, last))}

    def dequantise(self, parts: Mapping[str, torch.Tensor], region: Region) -> torch.Tensor:
        """fp32 [R, C]."""
        start, stop = region[1]
        first = start % self.group
        return dequantise_int4(parts["_packed"], parts["_scale"])[:, first : first + stop - start]

    def quantise(self, plain: torch.Tensor, source_scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        raise NotImplementedError("INT4 checkpoints are read, not written.")
