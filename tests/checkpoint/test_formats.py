"""Names, dtypes and shapes of the published checkpoints at full size, from our models on the meta device."""

import functools

import pytest
import torch

from tests.checkpoint.official import FP8_CONFIG, INT4_CONFIG, MXFP4_CONFIG
from tests.models import published
from xtuner_hf.checkpoint.formats import quantised_format, quantised_manifest
from xtuner_hf.checkpoint.quantised_format import CheckpointFormatError, TensorSpec
from xtuner_hf.models.manifest import hub_manifest, meta_model


def plain_manifest(config, **keywords) -> list[TensorSpec]:
    manifest = hub_manifest(meta_model(config, **keywords))
    return [TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in manifest.items()]


@functools.cache
def kimi_manifest() -> list[TensorSpec]:
    return plain_manifest(published.kimi_k2())


def stale_buffers(nbytes: int) -> list[TensorSpec]:
    """The 61 rotary buffers that published Kimi K2 checkpoints hold and that nobody reads."""
    shape = (nbytes // 2,)
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(61)]
    return [TensorSpec(name, torch.bfloat16, shape) for name in names]


def totals(manifest: list[TensorSpec]) -> tuple[int, int]:
    names = [spec.name for spec in manifest]
    assert len(set(names)) == len(names)
    return len(manifest), sum(spec.nbytes for spec in manifest)


@pytest.mark.parametrize(
    ("layers", "experts", "index"), [(24, 32, (459, 13_761_264_768)), (36, 128, (687, 65_248_815_744))]
)
def test_gpt_oss(layers, experts, index):
    manifest = quantised_manifest(plain_manifest(published.gpt_oss(layers, experts)), MXFP4_CONFIG)
    assert totals(manifest) == index
    specs = {spec.name: spec[1:] for spec in manifest}
    experts_name = "model.layers.5.mlp.experts."
    assert specs[experts_name + "gate_up_proj_blocks"] == (torch.uint8, (experts, 5760, 90, 16))
    assert specs[experts_name + "down_proj_scales"] == (torch.uint8, (experts, 2880, 90))
    assert specs[experts_name + "gate_up_proj_bias"] == (torch.bfloat16, (experts, 5760))


def test_deepseek_v3():
    manifest = quantised_manifest(plain_manifest(published.deepseek_v3(), mtp_loss_coef=0), FP8_CONFIG)
    assert totals(manifest) == (91_991, 688_574_839_360)
    specs = {spec.name: spec[1:] for spec in manifest}
    attention = "model.layers.7.self_attn.kv_a_proj_with_mqa."
    assert specs[attention + "weight"] == (torch.float8_e4m3fn, (576, 7168))
    assert specs[attention + "weight_scale_inv"] == (torch.float32, (5, 56))
    assert specs["model.layers.7.mlp.gate.weight"] == (torch.bfloat16, (256, 7168))
    assert specs["model.layers.61.eh_proj.weight"][0] == torch.bfloat16


def test_kimi_k2():
    manifest = quantised_manifest(kimi_manifest() + stale_buffers(112), FP8_CONFIG)
    assert totals(manifest) == (139_644, 1_029_173_256_720)


def test_kimi_k2_thinking():
    manifest = quantised_manifest(kimi_manifest() + stale_buffers(256), INT4_CONFIG)
    assert totals(manifest) == (208_276, 594_205_920_512)


def test_listed_modules_stay_as_they_are():
    plain = [
        TensorSpec(f"model.layers.{layer}.mlp.down_proj.weight", torch.bfloat16, (256, 256)) for layer in (1, 11, 2)
    ]
    config = FP8_CONFIG | {"modules_to_not_convert": ["model.layers.1.mlp.down_proj"]}
    names = [spec.name for spec in quantised_manifest(plain, config) if spec.dtype == torch.bfloat16]
    assert names == ["model.layers.1.mlp.down_proj.weight"]


def test_unknown_method():
    with pytest.raises(CheckpointFormatError) as error:
        quantised_format({"quant_method": "gptq", "bits": 4})
    assert str(error.value) == (
        "the checkpoint's quantization_config has quant_method 'gptq'; xtuner_hf reads fp8, mxfp4, compressed-tensors. "
        "Load a version of this model in bf16 or in one of these formats."
    )
