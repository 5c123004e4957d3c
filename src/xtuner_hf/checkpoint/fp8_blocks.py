"""FP8 blocks: e4m3 weights with one scale per block, as DeepSeek-V3, Kimi K2 and Qwen3-FP8 publish them.

`X.weight` is float8_e4m3fn [R, C]; `X.weight_scale_inv` is fp32 or bf16 [ceil(R/128), ceil(C/128)] and, in spite of
its name, a multiplier: weight = e4m3 * scale (`weight_dequant` in DeepSeek-V3's inference/kernel.py). The last block
of a row or column may be ragged. "DeepSeek-V3 Technical Report", arXiv:2412.19437, section 3.3.2.

Legend: R rows, C columns, Rb and Cb blocks of them.
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

FP8_MAX = 448.0  # the largest e4m3 value


def dequantise_blocks(
    weight_RC: torch.Tensor, scale_RbCb: torch.Tensor, block: tuple[int, int], first: tuple[int, int] = (0, 0)
) -> torch.Tensor:
    """fp32 [R, C]; bf16 of it is what the official kernel gives.

    Args:
        first: row and column of the first element inside the first block, where `weight_RC` begins within one.
    """
    rows, cols = (
        torch.div(torch.arange(size, device=weight_RC.device) + offset, edge, rounding_mode="floor")
        for size, offset, edge in zip(weight_RC.shape, first, block, strict=True)
    )
    return weight_RC.float().mul_(scale_RbCb.float()[:, cols][rows])


def quantise_blocks(
    weight_RC: torch.Tensor,
    block: tuple[int, int],
    *,
    power_of_two: bool = False,
    scale_dtype: torch.dtype = torch.float32,
    source_scale_RbCb: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 [R, C], scale [Rb, Cb]) by the published rule: scale = amax / 448, weight / scale rounded to nearest even.

    Args:
        power_of_two: round scales up to powers of two (`scale_fmt` ue8m0).
        source_scale_RbCb: scales to keep where they represent every value of the block exactly.

    Raises:
        ValueError: the weight holds NaN or infinity.
    """
    blocks = _to_blocks(weight_RC.float(), block)
    amax_RbCb = blocks.abs().amax(dim=(1, 3))
    if not amax_RbCb.isfinite().all():
        raise ValueError("the weight holds NaN or infinity")
    scale = amax_RbCb / FP8_MAX
    scale = _ceil_power_of_two(scale) if power_of_two else scale
    scale = scale.to(scale_dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if source_scale_RbCb is not None:
        scale = torch.where(
            _represents(weight_RC, blocks, source_scale_RbCb, block), source_scale_RbCb.to(scale), scale
        )
    return _from_blocks(_encode(blocks, scale), weight_RC.shape), scale


def _represents(weight_RC: torch.Tensor, blocks: torch.Tensor, scale_RbCb: torch.Tensor, block) -> torch.Tensor:
    """bool [Rb, Cb]: whether quantising with this scale and dequantising gives the block's values back."""
    scale_RbCb = scale_RbCb.float()
    again = _encode(blocks, scale_RbCb).float() * scale_RbCb[:, None, :, None]
    # In the weight's own precision: bf16 weights were rounded to it when they were read.
    return (again.to(weight_RC.dtype) == blocks.to(weight_RC.dtype)).all(dim=3).all(dim=1)


def _encode(blocks: torch.Tensor, scale_RbCb: torch.Tensor) -> torch.Tensor:
    scaled = blocks / scale_RbCb.float()[:, None, :, None]
    # NaN is 0 / 0 here: a block of zeros that was published with scale 0.
    return scaled.nan_to_num_(nan=0.0).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _to_blocks(weight_RC: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """[Rb, block rows, Cb, block columns], zeros where a block is ragged."""
    (rows, cols), (height, width) = weight_RC.shape, block
    padded = torch.nn.functional.pad(weight_RC, (0, -cols % width, 0, -rows % height))
    return padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))


def _from_blocks(blocks: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return blocks.flatten(2, 3).flatten(0, 1)[: shape[0], : shape[1]].contiguous()


def _ceil_power_of_two(value: torch.Tensor) -> torch.Tensor:
    mantissa, exponent = torch.frexp(value)  # value = mantissa * 2^exponent, mantissa in [0.5, 1)
    power = torch.ldexp(torch.ones_like(value), torch.where(mantissa == 0.5, exponent - 1, exponent))
    return torch.where(value > 0, power, value)


def _block_size(config: Mapping[str, Any]) -> tuple[int, int]:
    size = config.get("weight_block_size")
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        raise CheckpointFormatError(
            f"quantization_config has quant_method 'fp8' and weight_block_size={size!r}; xtuner_hf reads FP8 with one "
            "scale per block ([128, 128] in DeepSeek-V3). Load a bf16 version of this checkpoint."
        )
    return int(size[0]), int(size[1])


class Fp8Blocks(QuantisedFormat):
    """`quant_method` fp8 with `weight_block_size`."""

    suffixes = ("", "_scale_inv")

    def __init__(self, config: Mapping[str, Any]):
        require(config, "quant_method", "fp8")
        require(config, "fmt", "e4m3", None)
        require(config, "activation_scheme", "dynamic", None)
        require(config, "scale_fmt", None, "float", "ue8m0")
        self.block = _block_size(config)
        self.row_multiple = self.block[0]
        self.power_of_two = config.get("scale_fmt") == "ue8m0"
        self.not_converted = (*NEVER_QUANTISED, *(config.get("modules_to_not_convert") or ()))

    def part_of(self, stored: TensorSpec) -> tuple[str, str] | None:
        if stored.dtype == torch.float8_e4m3fn:
            return stored.name, ""
        return super().part_of(stored)

    def quantises(self, plain: TensorSpec) -> bool:
        module, _, leaf = plain.name.rpartition(".")
        return leaf == "weight" and len(plain.shape) == 2 and not covers(module, self.not_converted)

    def parts(self, shape):
        return {
            "": (torch.float8_e4m3fn, shape),
            "_scale_inv": (torch.float32, self._grid(shape)),
        }

    def plain_shape(self, parts: Mapping[str, TensorSpec]) -> tuple[int, ...]:
        weight, scale = (parts[suffix] for suffix in self.suffixes)
        check_part(weight, (torch.float8_e4m3fn,), 2)
        check_part(scale, (torch.float32, torch.bfloat16), 2)
        check_shape(scale, self._grid(weight.shape), weight)
        return weight.shape

    def part_regions(self, region: Region) -> dict[str, Region]:
        grid = tuple((start // edge, -(-stop // edge)) for (start, stop), edge in zip(region, self.block, strict=True))
        return {"": region, "_scale_inv": grid}

    def dequantise(self, parts: Mapping[str, torch.Tensor], region: Region) -> torch.Tensor:
        """fp32 [R, C]."""
        row, col = (start % edge for (start, _), edge in zip(region, self.block, strict=True))
        return dequantise_blocks(parts[""], parts["_scale_inv"], self.block, (row, col))

    def quantise(self, plain: torch.Tensor, source_scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        weight, scale = quantise_blocks(
            plain,
            self.block,
            power_of_two=self.power_of_two,
            scale_dtype=torch.float32 if source_scale is None else source_scale.dtype,
            source_scale_RbCb=source_scale,
        )
        return {"": weight, "_scale_inv": scale}

    def _grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(-(-size // edge) for size, edge in zip(shape, self.block, strict=True))
