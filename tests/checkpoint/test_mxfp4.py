"""MXFP4 against tables written out in the test and against transformers."""

import numpy as np
import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.checkpoint.official import MXFP4_CONFIG, e2m1_values, mxfp4_tensor, same_bytes
from xtuner_hf.checkpoint.mxfp4 import Mxfp4, dequantise_mxfp4, quantise_mxfp4

WHOLE = ((0, 3), (0, 96), (0, 40))


def stored_and_values(seed: int = 0):
    return mxfp4_tensor((3, 96, 40), np.random.default_rng(seed))


def test_every_byte_at_every_scale_is_exact():
    scales = torch.arange(0, 253, dtype=torch.uint8)
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(253, 16, 16)
    values = dequantise_mxfp4(blocks, scales[:, None].expand(253, 16).contiguous())
    byte = np.arange(256).reshape(16, 16)
    pairs = e2m1_values()[np.stack([byte & 15, byte >> 4], axis=-1)].reshape(-1)
    expected = pairs[None] * 2.0 ** (scales.numpy().astype(np.float64) - 127)[:, None]
    assert np.array_equal(values.double().numpy(), expected)


def test_equals_transformers():
    stored, values = stored_and_values()
    ours = Mxfp4(MXFP4_CONFIG).dequantise(stored, WHOLE)
    assert torch.equal(ours, convert_moe_packed_tensors(stored["_blocks"], stored["_scales"]))
    assert torch.equal(ours.float(), values)


@pytest.mark.parametrize("region", [((1, 2), (0, 96), (0, 40)), ((0, 3), (5, 70), (3, 9)), ((2, 3), (64, 65), (0, 1))])
def test_a_region_is_that_part_of_the_whole(region):
    stored, values = stored_and_values()
    fmt = Mxfp4(MXFP4_CONFIG)
    parts = {
        suffix: stored[suffix][tuple(slice(*bounds) for bounds in part)]
        for suffix, part in fmt.part_regions(region).items()
    }
    assert torch.equal(fmt.dequantise(parts, region).float(), values[tuple(slice(*bounds) for bounds in region)])


def test_rule_of_the_specification():
    """Exponent floor(log2(amax)) - 2, then the nearest of the values, to an even code from half-way, at most 6."""
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    # Half-way points, both signs, and a value above 6 times the scale.
    weight[0, :16] = torch.tensor(
        [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.5, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, 4]
    )
    weight[0, 16:32] = 0.0
    blocks, scales = quantise_mxfp4(weight)
    table = e2m1_values()[:8]
    groups = weight.double().numpy().reshape(64, 3, 32)
    exponents = np.floor(np.log2(np.abs(groups).max(-1))) - 2
    assert np.array_equal(scales.numpy(), exponents + 127)
    distance = np.abs(np.abs(groups / 2.0 ** exponents[..., None])[..., None] - table)
    # Ties: of two equally near codes the even one, that is the smaller of (distance, code is odd).
    nearest = np.lexsort((np.broadcast_to(np.arange(8) % 2, distance.shape), distance), axis=-1)[..., 0]
    codes = nearest + 8 * np.signbit(groups)
    assert np.array_equal(blocks.numpy(), codes[..., 0::2] + 16 * codes[..., 1::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(dtype):
    fmt = Mxfp4(MXFP4_CONFIG)
    stored, values = stored_and_values()
    stored["_blocks"][0, 0, 0] &= 0x33  # values up to 1.5: the rule alone would choose a smaller scale
    values = fmt.dequantise(stored, WHOLE).to(dtype)
    with_scales = fmt.quantise(values, stored["_scales"])
    assert all(same_bytes(with_scales[suffix], stored[suffix]) for suffix in fmt.suffixes)
    without = fmt.quantise(values)
    assert not torch.equal(without["_scales"], stored["_scales"])
    assert torch.equal(fmt.dequantise(without, WHOLE).to(dtype), values)


def test_one_changed_value_moves_its_group_alone():
    fmt = Mxfp4(MXFP4_CONFIG)
    stored, _ = stored_and_values()
    trained = fmt.dequantise(stored, WHOLE)
    trained[1, 40, 7] = 3.0  # expert 1, input 40 (group 1), output 7
    again = fmt.quantise(trained, stored["_scales"])
    different = (again["_blocks"] != stored["_blocks"]).any(-1) | (again["_scales"] != stored["_scales"])
    assert different.nonzero().tolist() == [[1, 7, 1]]
    assert fmt.dequantise(again, WHOLE)[1, 40, 7] == 3.0


def test_zeros_and_not_a_number():
    blocks, scales = quantise_mxfp4(torch.zeros(2, 32))
    assert not dequantise_mxfp4(blocks, scales).any()
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantise_mxfp4(torch.full((2, 32), float("inf")))
