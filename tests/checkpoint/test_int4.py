"""Packed INT4 against a packer written out in the test."""

import copy

import numpy as np
import pytest
import torch

from tests.checkpoint.official import INT4_CONFIG, int4_tensor
from xtuner_hf.checkpoint.int4 import PackedInt4
from xtuner_hf.checkpoint.quantised_format import CheckpointFormatError


def test_word_by_hand():
    """Eight values from the lowest bits up: -8 -7 0 7 1 -1 2 3 are stored as 0 1 8 15 9 7 10 11."""
    word = sum(code << (4 * place) for place, code in enumerate([0, 1, 8, 15, 9, 7, 10, 11]))
    packed = torch.tensor([[word - 2**32] * 4], dtype=torch.int32)
    parts = {"_packed": packed, "_scale": torch.tensor([[0.5]], dtype=torch.bfloat16)}
    values = PackedInt4(INT4_CONFIG).dequantise(parts, ((0, 1), (0, 32)))
    assert values[0, :8].tolist() == [-4, -3.5, 0, 3.5, 0.5, -0.5, 1, 1.5]


@pytest.mark.parametrize("region", [((0, 24), (0, 128)), ((3, 5), (7, 100)), ((23, 24), (64, 65))])
def test_values_and_regions_are_exact(region):
    stored, values = int4_tensor((24, 128), np.random.default_rng(0))
    fmt = PackedInt4(INT4_CONFIG)
    parts = {
        suffix: stored[suffix][tuple(slice(*bounds) for bounds in part)]
        for suffix, part in fmt.part_regions(region).items()
    }
    assert torch.equal(fmt.dequantise(parts, region), values[tuple(slice(*bounds) for bounds in region)])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_bits": 8}, "has num_bits=8"),
        ({"symmetric": False}, "has symmetric=False"),
        ({"strategy": "channel"}, "has strategy='channel'"),
        ({"actorder": "group"}, "has actorder='group'"),
    ],
)
def test_variants_that_we_do_not_read(change, sentence):
    config = copy.deepcopy(INT4_CONFIG)
    config["config_groups"]["group_0"]["weights"] |= change
    with pytest.raises(CheckpointFormatError) as error:
        PackedInt4(config)
    assert sentence in str(error.value)


def test_another_packing_and_quantised_activations():
    with pytest.raises(CheckpointFormatError, match="has format='mxfp4-pack-quantized'"):
        PackedInt4(INT4_CONFIG | {"format": "mxfp4-pack-quantized"})
    config = copy.deepcopy(INT4_CONFIG)
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    with pytest.raises(CheckpointFormatError, match="quantised activations"):
        PackedInt4(config)
