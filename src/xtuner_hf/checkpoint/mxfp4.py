"""MXFP4 as GPT-OSS publishes its experts: e2m1 values in blocks of 32 that share a power of two.

A plain tensor `P` (`...experts.gate_up_proj` [E, I, O], applied as `x @ P`) is stored transposed: `P_blocks` uint8
[E, O, I / 32, 16], two values a byte with the even one in the low nibble, and `P_scales` uint8 [E, O, I / 32], the
exponent plus 127. "OCP Microscaling Formats (MX) Specification v1.0", sections 5.3.3, 5.4.1 and 6.3.

Legend: E experts, I inputs, O outputs, G = I / 32 groups, T any number of leading dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch

from .quantised_format import (
    CheckpointFormatError,
    QuantisedFormat,
    Region,
    TensorSpec,
    check_part,
    check_shape,
    covers,
    require,
)

GROUP = 32
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the codes 0-7; bit 3 is the sign
_E2M1_MAX_EXPONENT = 2  # 4 = 2^2 is its largest power of two
_SCALE_BIAS = 127


def dequantise_mxfp4(blocks_TG16: torch.Tensor, scales_TG: torch.Tensor) -> torch.Tensor:
    """bf16 [T, G * 32], exact: an e2m1 value times a power of two has two significant bits."""
    nibbles = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)], dtype=torch.bfloat16)
    byte = torch.arange(256)
    pairs = torch.stack([nibbles[byte % 16], nibbles[byte // 16]], dim=1).to(blocks_TG16.device)
    values = pairs.index_select(0, blocks_TG16.flatten().int()).view(*scales_TG.shape, GROUP)
    return values.mul_(_power(scales_TG)[..., None]).flatten(-2)


def quantise_mxfp4(
    plain_TI: torch.Tensor, source_scales_TG: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(blocks [T, G, 16], scales [T, G]), both uint8, from [T, G * 32] by the rule of the specification.

    The shared exponent is floor(log2(amax)) - 2; values round to nearest even and saturate at 6 times the scale.

    Args:
        source_scales_TG: scales to keep where they represent every value of the group exactly.

    Raises:
        ValueError: the weight holds NaN or infinity.
    """
    groups = plain_TI.float().unflatten(-1, (-1, GROUP))
    amax_TG = groups.abs().amax(dim=-1)
    if not amax_TG.isfinite().all():
        raise ValueError("the weight holds NaN or infinity")
    _, exponent = torch.frexp(amax_TG)  # 2^(exponent - 1) <= amax < 2^exponent
    exponent = (exponent - 1 - _E2M1_MAX_EXPONENT + _SCALE_BIAS).clamp(0, 254)
    scales_TG = torch.where(amax_TG > 0, exponent, 0).to(torch.uint8)
    if source_scales_TG is not None:
        codes = _encode(groups, source_scales_TG)
        exact = (_decode(codes, source_scales_TG) == groups).all(dim=-1)
        scales_TG = torch.where(exact, source_scales_TG, scales_TG)
    codes = _encode(groups, scales_TG)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), scales_TG


def _power(scales_TG: torch.Tensor) -> torch.Tensor:
    """bf16 2^(scale - 127), exact; NaN for 255, as the specification says."""
    return scales_TG.view(torch.float8_e8m0fnu).to(torch.bfloat16)


def _encode(groups: torch.Tensor, scales_TG: torch.Tensor) -> torch.Tensor:
    """uint8 codes 0-15 of fp32 values."""
    scaled = groups / _power(scales_TG).float()[..., None]
    # Half-way points between neighbours. One whose upper neighbour has the even code belongs to that: it moves down.
    halves = torch.tensor([(low + high) / 2 for low, high in pairwise(MAGNITUDES)])
    halves[1::2] = halves[1::2].nextafter(torch.tensor(0.0))
    codes = torch.bucketize(scaled.abs().contiguous(), halves.to(scaled.device), out_int32=True).to(torch.uint8)
    return codes | (scaled.signbit().to(torch.uint8) << 3)


def _decode(codes: torch.Tensor, scales_TG: torch.Tensor) -> torch.Tensor:
    """fp32 values of codes."""
    magnitudes = torch.tensor(MAGNITUDES, device=codes.device)[(codes & 7).int()]
    return torch.where(codes > 7, -magnitudes, magnitudes) * _power(scales_TG).float()[..., None]


class Mxfp4(QuantisedFormat):
    """`quant_method` mxfp4."""

    suffixes = ("_blocks", "_scales")

    def __init__(self, config: Mapping[str, Any]):
        require(config, "quant_method", "mxfp4")
        self.not_converted = tuple(config.get("modules_to_not_convert") or ())

    def quantises(self, plain: TensorSpec) -> bool:
        module, _, leaf = plain.name.rpartition(".")
        is_expert = module.endswith("experts") and leaf in ("gate_up_proj", "down_proj")
        return is_expert and not covers(module, self.not_converted)

    def parts(self, shape):
        experts, inputs, outputs = shape
        if inputs % GROUP:
            raise CheckpointFormatError(f"MXFP4 packs {GROUP} inputs together; {inputs} is not a multiple of it.")
        groups = inputs // GROUP
        return {
            "_blocks": (torch.uint8, (experts, outputs, groups, GROUP // 2)),
            "_scales": (torch.uint8, (experts, outputs, groups)),
        }

    def plain_shape(self, parts: Mapping[str, TensorSpec]) -> tuple[int, ...]:
        blocks, scales = (parts[suffix] for suffix in self.suffixes)
        check_part(blocks, (torch.uint8,), 4)
        check_part(scales, (torch.uint8,), 3)
        check_shape(blocks, (*blocks.shape[:3], GROUP // 2), blocks)
        check_shape(scales, blocks.shape[:3], blocks)
        experts, outputs, groups = scales.shape
        return experts, groups * GROUP, outputs

    def part_regions(self, region: Region) -> dict[str, Region]:
        experts, (start, stop), outputs = region
        scales = (experts, outputs, (start // GROUP, -(-stop // GROUP)))
        return {"_blocks": (*scales, (0, GROUP // 2)), "_scales": scales}

    def dequantise(self, parts: Mapping[str, torch.Tensor], region: Region) -> torch.Tensor:
        """bf16 [E, I, O]."""
        start, stop = region[1]
        first = start % GROUP
        blocks, scales = parts["_blocks"], parts["_scales"]
        plain_EIO = torch.empty(blocks.shape[0], stop - start, blocks.shape[1], dtype=torch.bfloat16)
        plain_EIO = plain_EIO.to(blocks.device)
        # One expert at a time: the temporaries of a whole layer of 128 would be several times its size.
        for expert_IO, expert_blocks, expert_scales in zip(plain_EIO, blocks, scales, strict=True):
            expert_IO.copy_(dequantise_mxfp4(expert_blocks, expert_scales)[:, first : first + stop - start].T)
        return plain_EIO

    def quantise(self, plain: torch.Tensor, source_scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        given = [None] * len(plain) if source_scale is None else list(source_scale)
        pairs = [quantise_mxfp4(expert_IO.T, scale) for expert_IO, scale in zip(plain, given, strict=True)]
        blocks, scales = (torch.stack(tensors) for tensors in zip(*pairs, strict=True))
        return {"_blocks": blocks, "_scales": scales}
