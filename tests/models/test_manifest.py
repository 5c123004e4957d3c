"""Full-size models on the meta device against what is published: parameters, tensors and bytes of the Hub's indices.

The published indices of DeepSeek V3, Kimi K2 and GPT-OSS describe quantised files; what quantisation adds to our bf16
manifest is worked out here from names and shapes alone.
"""

from __future__ import annotations

from math import ceil

import pytest
import torch
from safetensors.torch import load_file

from tests.families import FAMILIES
from tests.models import published
from xtuner_hf.models.auto import AutoModelForCausalLM
from xtuner_hf.models.manifest import HubTensor, hub_manifest, meta_model

VIT_300M, VIT_6B = published.VIT_300M, published.VIT_6B
QWEN3_06B = published.qwen3_dense(1024, 3072, 28, 16, True)
QWEN3_8B = published.qwen3_dense(4096, 12288, 36, 32, False)
QWEN3_32B = published.qwen3_dense(5120, 25600, 64, 64, False)
A3B = published.qwen3_moe(2048, 48, 32, 4, 128, 768)
A22B = published.qwen3_moe(4096, 94, 64, 4, 128, 1536)


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [
        pytest.param(published.qwen3_dense(1024, 3072, 28, 16, True), 596_049_920, None, id="Qwen3-0.6B"),
        pytest.param(published.qwen3_dense(5120, 25600, 64, 64, False), 32_762_123_264, None, id="Qwen3-32B"),
        pytest.param(published.qwen3_moe(2048, 48, 32, 4, 128, 768), 30_532_122_624, 3_353_032_704, id="30B-A3B"),
        pytest.param(published.qwen3_moe(4096, 94, 64, 4, 128, 1536), 235_093_634_560, 22_190_763_520, id="235B-A22B"),
        pytest.param(published.qwen3_moe(6144, 62, 96, 8, 160, 2560), 480_154_875_392, 35_474_765_312, id="480B-A35B"),
        pytest.param(published.gpt_oss(24, 32), 20_914_757_184, 4_187_440_704, id="gpt-oss-20b"),
        pytest.param(published.gpt_oss(36, 128), 116_829_156_672, 5_711_982_912, id="gpt-oss-120b"),
        pytest.param(published.deepseek_v3(), 671_026_404_352, 37_552_282_624, id="DeepSeek-V3"),
        pytest.param(published.kimi_k2(), 1_026_408_209_408, 32_861_477_888, id="Kimi-K2"),
        pytest.param(published.internvl(QWEN3_06B, VIT_300M), 905_315_328, None, id="InternVL3.5-1B"),
        pytest.param(published.internvl(QWEN3_32B, VIT_6B), 38_390_405_504, None, id="InternVL3.5-38B"),
        pytest.param(published.internvl(A3B, VIT_300M), 30_848_730_112, 3_669_640_192, id="InternVL3.5-30B-A3B"),
        pytest.param(published.internvl(A22B, VIT_6B), 240_699_370_368, 27_796_499_328, id="InternVL3.5-241B-A28B"),
        pytest.param(
            published.internvl(published.gpt_oss(24, 32), VIT_300M),
            21_238_874_304,
            4_511_557_824,
            id="InternVL-GPT-OSS",
        ),
        pytest.param(published.interns1(A22B, VIT_6B), 240_709_856_128, 27_806_985_088, id="Intern-S1"),
        pytest.param(published.interns1(QWEN3_8B, VIT_300M), 8_538_804_224, None, id="Intern-S1-mini"),
    ],
)
def test_parameter_counts(config, total, active):
    """`active`: those that take part in a token, embedding and head included."""
    parameters = dict(meta_model(config).named_parameters())
    assert sum(parameter.numel() for parameter in parameters.values()) == total
    if active is not None:
        routed = sum(parameter.numel() for name, parameter in parameters.items() if ".mlp.experts." in name)
        text = config.get_text_config()
        assert total - routed + routed * text.num_experts_per_tok // text.num_local_experts == active


def fp8_index(manifest: dict[str, HubTensor]) -> tuple[int, int]:
    """Tensors and bytes if every projection is FP8 with an fp32 scale for each 128 x 128 block."""
    tensors = num_bytes = 0
    for name, tensor in manifest.items():
        if name.endswith(("_proj.weight", "_proj_with_mqa.weight")) and not name.endswith("eh_proj.weight"):
            rows, columns = tensor.shape
            tensors, num_bytes = tensors + 2, num_bytes + rows * columns + 4 * ceil(rows / 128) * ceil(columns / 128)
        else:
            tensors, num_bytes = tensors + 1, num_bytes + tensor.num_bytes
    return tensors, num_bytes


def mxfp4_index(manifest: dict[str, HubTensor]) -> tuple[int, int]:
    """Tensors and bytes if experts' matrices are 4-bit values with one byte of scale for each 32."""
    tensors = num_bytes = 0
    for name, tensor in manifest.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors, num_bytes = tensors + 2, num_bytes + tensor.num_values // 2 + tensor.num_values // 32
        else:
            tensors, num_bytes = tensors + 1, num_bytes + tensor.num_bytes
    return tensors, num_bytes


def test_deepseek_v3_with_its_mtp_layer():
    manifest = hub_manifest(meta_model(published.deepseek_v3(), mtp_loss_coef=0))
    assert fp8_index(manifest) == (91_991, 688_574_839_360)
    mtp = [tensor.num_values for name, tensor in manifest.items() if name.startswith("model.layers.61.")]
    assert sum(mtp) == 13_463_426_048 + 256  # and the correction bias
    assert manifest["model.layers.61.eh_proj.weight"] == HubTensor((7168, 14336), torch.bfloat16)
    assert manifest["model.layers.61.embed_tokens.weight"] == HubTensor((129280, 7168), torch.bfloat16)
    assert manifest["model.layers.3.mlp.gate.e_score_correction_bias"] == HubTensor((256,), torch.float32)
    assert manifest["model.layers.3.mlp.experts.255.up_proj.weight"] == HubTensor((2048, 7168), torch.bfloat16)
    assert manifest["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"] == HubTensor((576, 7168), torch.bfloat16)


def test_kimi_k2():
    """The published index also lists a stale rotary buffer of 56 bf16 values in each of its 61 layers."""
    manifest = hub_manifest(meta_model(published.kimi_k2()))
    tensors, num_bytes = fp8_index(manifest)
    assert (tensors + 61, num_bytes + 61 * 112) == (139_644, 1_029_173_256_720)
    assert sum(tensor.num_values for tensor in manifest.values()) == 1_026_408_232_448


@pytest.mark.parametrize(
    ("layers", "experts", "index"), [(24, 32, (459, 13_761_264_768)), (36, 128, (687, 65_248_815_744))]
)
def test_gpt_oss(layers, experts, index):
    manifest = hub_manifest(meta_model(published.gpt_oss(layers, experts)))
    assert mxfp4_index(manifest) == index
    assert manifest["model.layers.0.mlp.experts.gate_up_proj"] == HubTensor((experts, 2880, 5760), torch.bfloat16)
    assert manifest["model.layers.0.self_attn.sinks"] == HubTensor((64,), torch.bfloat16)
    assert manifest["model.layers.0.mlp.router.bias"] == HubTensor((experts,), torch.bfloat16)


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        (published.qwen3_dense(1024, 3072, 28, 16, True), 310),
        (published.qwen3_moe(2048, 48, 32, 4, 128, 768), 18_867),
        (published.qwen3_moe(4096, 94, 64, 4, 128, 1536), 36_945),
    ],
)
def test_qwen3_tensor_counts(config, tensors):
    assert len(hub_manifest(meta_model(config))) == tensors


@pytest.mark.parametrize("name", FAMILIES)
def test_a_manifest_is_what_save_pretrained_writes(name, tmp_path):
    changes, arguments = {}, {}
    if name in ("deepseek_v3", "glm4_moe"):
        changes, arguments = {"num_nextn_predict_layers": 1}, {"mtp_loss_coef": 0}
    config = FAMILIES[name].make_config(**changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **arguments)
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    expected = {key: HubTensor(tuple(tensor.shape), tensor.dtype) for key, tensor in written.items()}
    assert hub_manifest(model) == hub_manifest(meta_model(config, **arguments)) == expected


@pytest.mark.parametrize(
    ("config", "prefix", "vision_tensors"),
    [
        # A layer has q, k, v, projection, fc1, fc2 with biases, two norms with biases, and two lambdas: 18.
        pytest.param(published.internvl(A3B, VIT_300M), "", 24 * 18 + 4, id="30B-A3B"),
        # No biases of q, k, v and of the norms, but two norms more: 15.
        pytest.param(published.internvl(A22B, VIT_6B), "", 45 * 15 + 4, id="241B-A28B"),
        pytest.param(published.interns1(A22B, VIT_6B), "model.", 45 * 15 + 4, id="Intern-S1"),
    ],
)
def test_models_that_read_images(config, prefix, vision_tensors):
    manifest = hub_manifest(meta_model(config))
    width, text = config.vision_config.hidden_size, config.text_config
    tower = [name for name in manifest if name.startswith(f"{prefix}vision_tower.")]
    assert len(tower) == vision_tensors
    language = hub_manifest(meta_model(text))
    trunk, head = ("language_model.model.", "language_model.lm_head.")
    if prefix:
        trunk, head = ("model.language_model.", "lm_head.")
    renamed = {
        n.replace("model.", trunk, 1) if n.startswith("model.") else n.replace("lm_head.", head): n for n in language
    }
    assert {name for name in manifest if name.startswith((trunk, head))} == renamed.keys()
    assert all(manifest[name] == language[plain] for name, plain in renamed.items())
    assert len(manifest) == len(tower) + 6 + len(language)
    layer = f"{prefix}vision_tower.encoder.layer.23"
    bf16 = torch.bfloat16
    assert manifest[f"{layer}.attention.q_proj.weight"] == HubTensor((width, width), bf16)
    assert (f"{layer}.attention.q_norm.weight" in manifest) == config.vision_config.use_qk_norm
    assert manifest[f"{prefix}vision_tower.embeddings.position_embeddings"] == HubTensor((1, 1025, width), bf16)
    assert manifest[f"{prefix}multi_modal_projector.linear_1.weight"] == HubTensor((text.hidden_size, 4 * width), bf16)
