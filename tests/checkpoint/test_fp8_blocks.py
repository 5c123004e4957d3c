"""FP8 blocks against tables and formulas written out in the test."""

import numpy as np
import pytest
import torch

from tests.checkpoint.official import FP8_CONFIG, e4m3_values, fp8_tensor, same_bytes
from xtuner_hf.checkpoint.fp8_blocks import Fp8Blocks, dequantise_blocks, quantise_blocks
from xtuner_hf.checkpoint.quantised_format import CheckpointFormatError

BLOCK = (128, 128)
# Whole blocks, ragged edges on one side and on both (kv_a_proj_with_mqa has 576 rows), less than a block.
SHAPES = [(256, 128), (576, 256), (128, 200), (300, 200), (5, 7)]


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantised_values_are_exact(shape):
    stored, values = fp8_tensor(shape, np.random.default_rng(0))
    assert torch.equal(dequantise_blocks(stored[""], stored["_scale_inv"], BLOCK), values)


def test_every_code_is_dequantised_exactly():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 128)
    scale = torch.tensor([[0.0123]])
    expected = torch.from_numpy(e4m3_values() * scale.double().item()).float().view(2, 128)
    assert torch.equal(dequantise_blocks(codes, scale, BLOCK).nan_to_num(-9.0), expected.nan_to_num(-9.0))


@pytest.mark.parametrize("region", [((0, 300), (0, 200)), ((3, 130), (127, 129)), ((256, 300), (128, 200))])
def test_a_region_is_that_part_of_the_whole(region):
    stored, values = fp8_tensor((300, 200), np.random.default_rng(1))
    fmt = Fp8Blocks(FP8_CONFIG)
    parts = {
        suffix: stored[suffix][tuple(slice(*bounds) for bounds in part)]
        for suffix, part in fmt.part_regions(region).items()
    }
    assert torch.equal(fmt.dequantise(parts, region), values[tuple(slice(*bounds) for bounds in region)])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rule_of_the_published_tools(shape, dtype):
    """scale = amax / 448 and weight / scale to the nearest code, ties to even, block by block in numpy."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    quantised, scale = quantise_blocks(weight, BLOCK)
    grid = np.sort(e4m3_values()[:127])  # the codes of positive values are in the order of their values
    for row in range(scale.shape[0]):
        for col in range(scale.shape[1]):
            cut = (slice(row * 128, (row + 1) * 128), slice(col * 128, (col + 1) * 128))
            block = weight[cut].float().numpy()
            expected_scale = np.abs(block).max() / np.float32(448)
            assert scale[row, col].item() == expected_scale
            scaled = np.abs(block / expected_scale)
            above = np.searchsorted(grid, scaled).clip(1, 126)
            to_upper = scaled - grid[above - 1] > grid[above] - scaled
            is_tie = scaled - grid[above - 1] == grid[above] - scaled
            codes = np.where(to_upper | (is_tie & (above % 2 == 0)), above, above - 1)
            codes = codes + 128 * np.signbit(block)
            assert np.array_equal(quantised[cut].view(torch.uint8).numpy(), codes)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_with_the_scales_that_it_came_with(shape, dtype):
    stored, values = fp8_tensor(shape, np.random.default_rng(2))
    again = Fp8Blocks(FP8_CONFIG).quantise(values.to(dtype), stored["_scale_inv"])
    assert all(same_bytes(again[suffix], stored[suffix]) for suffix in ("", "_scale_inv"))


def test_bf16_alone_does_not_say_what_the_scales_were():
    """Why the source's scales are kept: amax was rounded to bf16, and so is the scale that is made from it."""
    _, values = fp8_tensor((256, 256), np.random.default_rng(3))
    read = values.bfloat16()
    again = dequantise_blocks(*quantise_blocks(read, BLOCK), BLOCK).bfloat16()
    assert not torch.equal(again, read)
    assert ((again - read).abs() <= read.abs() * 2**-7).all()


def test_one_changed_value_moves_its_block_alone():
    stored, values = fp8_tensor((300, 200), np.random.default_rng(4))
    trained = values.bfloat16()
    trained[140, 3] = 1.0  # row block 1, column block 0; larger than all others
    weight, scale = quantise_blocks(trained, BLOCK, source_scale_RbCb=stored["_scale_inv"])
    changed = scale != stored["_scale_inv"]
    assert changed.nonzero().tolist() == [[1, 0]]
    same = torch.ones(300, 200, dtype=torch.bool)
    same[128:256, :128] = False
    assert torch.equal(weight.view(torch.uint8)[same], stored[""].view(torch.uint8)[same])
    assert dequantise_blocks(weight, scale, BLOCK)[140, 3] == 1.0


def test_scales_in_bf16_stay_in_bf16():
    """As Qwen3-FP8 publishes them: kept where nothing changed, rounded before they divide elsewhere."""
    stored, _ = fp8_tensor((256, 128), np.random.default_rng(6))
    scale = stored["_scale_inv"].bfloat16()
    trained = dequantise_blocks(stored[""], scale, BLOCK)
    trained[130, 7] = 1.0
    fmt = Fp8Blocks(FP8_CONFIG)
    again = fmt.quantise(trained, scale)
    assert again["_scale_inv"].dtype == torch.bfloat16
    assert again["_scale_inv"][0] == scale[0]
    assert torch.equal(again[""].view(torch.uint8)[:128], stored[""].view(torch.uint8)[:128])
    read = fmt.dequantise(again, ((0, 256), (0, 128)))
    assert (read - trained).abs().max() <= 2**-4 * trained.abs().max()


def test_power_of_two_scales_round_up_and_are_exact_without_a_source():
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(5)).bfloat16()
    config = FP8_CONFIG | {"scale_fmt": "ue8m0"}
    fmt = Fp8Blocks(config)
    parts = fmt.quantise(weight)
    scale = parts["_scale_inv"]
    amax = torch.stack([weight[r : r + 128, c : c + 128].abs().max() for r in (0, 128, 256) for c in (0, 128)])
    expected = 2 ** np.ceil(np.log2(amax.double().numpy() / 448))
    assert np.array_equal(scale.flatten().double().numpy(), expected)
    region = ((0, 300), (0, 200))
    read = fmt.dequantise(parts, region).bfloat16()
    assert torch.equal(fmt.dequantise(fmt.quantise(read), region).bfloat16(), read)


@pytest.mark.parametrize("source_scale", [None, torch.zeros(1, 1)])
def test_a_block_of_zeros_stays_zero(source_scale):
    weight, scale = quantise_blocks(torch.zeros(4, 4), BLOCK, source_scale_RbCb=source_scale)
    assert torch.equal(dequantise_blocks(weight, scale, BLOCK), torch.zeros(4, 4))
    assert source_scale is None or same_bytes(scale, source_scale)


def test_not_a_number_is_refused():
    weight = torch.ones(4, 4)
    weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantise_blocks(weight, BLOCK)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"fmt": "e5m2"}, "has fmt='e5m2' with quant_method 'fp8'; xtuner_hf reads 'e4m3'"),
        ({"activation_scheme": "static"}, "has activation_scheme='static'"),
        ({"scale_fmt": "log"}, "has scale_fmt='log'"),
        ({"weight_block_size": None}, "weight_block_size=None; xtuner_hf reads FP8 with one scale per block"),
    ],
)
def test_variants_that_we_do_not_read(change, sentence):
    with pytest.raises(CheckpointFormatError) as error:
        Fp8Blocks(FP8_CONFIG | change)
    assert sentence in str(error.value)
    assert "Load a bf16 version" in str(error.value)
