"""InternVL's two layouts: names as published, bytes equal there and back, the same model."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import vision
from tests.vision import row, tiles
from xtuner_hf import AutoModelForImageTextToText
from xtuner_hf.checkpoint.internvl_chat import to_chat_layout, to_hf_layout
from xtuner_hf.checkpoint.quantised_format import CheckpointFormatError
from xtuner_hf.cli import main
from xtuner_hf.models.auto import UnknownFamilyError

NAMES = ["internvl_dense", "internvl_moe", "internvl_gpt_oss"]
# What InternVL's own code calls the tensors of a layer of its tower.
LAYER = {"attn.qkv.weight", "attn.proj.weight", "attn.proj.bias", "norm1.weight", "norm2.weight", "ls1", "ls2"}
LAYER |= {"mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"}
OF_SIZE = {
    "internvl_dense": {"attn.qkv.bias", "norm1.bias", "norm2.bias"},
    "internvl_moe": {"attn.q_norm.weight", "attn.k_norm.weight"},
    "internvl_gpt_oss": {"attn.qkv.bias", "norm1.bias", "norm2.bias"},
}
EMBEDDINGS = {"class_embedding", "patch_embedding.weight", "patch_embedding.bias", "position_embedding"}


def save(folder, name: str, dtype=torch.bfloat16, **arguments) -> torch.nn.Module:
    model = vision.ours(name, dtype, drop_path_rate=0.1).eval()
    model.save_pretrained(folder, **arguments)
    added = {"content": "<IMG_CONTEXT>", "id": vision.IMAGE_TOKEN}
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [added]}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 512}))
    return model


def weights(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_those_of_internvl_s_own_code(name, tmp_path):
    save(tmp_path / "hf", name)
    to_chat_layout(tmp_path / "hf", tmp_path / "chat")
    found = weights(tmp_path / "chat")
    tower = {n.removeprefix("vision_model.") for n in found if n.startswith("vision_model.")}
    layers = {f"encoder.layers.{layer}.{part}" for layer in (0, 1) for part in LAYER | OF_SIZE[name]}
    assert tower == layers | {f"embeddings.{each}" for each in EMBEDDINGS}
    projector = {n for n in found if n.startswith("mlp1.")}
    assert projector == {f"mlp1.{layer}.{part}" for layer in (0, 1, 3) for part in ("weight", "bias")}
    before = weights(tmp_path / "hf")
    language = {n for n in before if n.startswith("language_model.")}
    assert found.keys() == {f"vision_model.{n}" for n in tower} | projector | language
    width = vision.config(name).vision_config.hidden_size
    fused = found["vision_model.encoder.layers.1.attn.qkv.weight"]
    assert fused.shape == (3 * width, width)
    values = before["vision_tower.encoder.layer.1.attention.v_proj.weight"]
    assert torch.equal(fused[2 * width :], values)
    second = before["multi_modal_projector.linear_2.bias"]
    assert torch.equal(found["mlp1.3.bias"], second)


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_is_byte_equal(name, tmp_path):
    """Tensors, one of which our model does not know; the configuration in what it says; the logits."""
    model = save(tmp_path / "hf", name)
    tensors = load_file(tmp_path / "hf" / "model.safetensors") | {"time_series.conv.weight": torch.randn(3, 2)}
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    main(["layout", str(tmp_path / "hf"), str(tmp_path / "chat"), "--to", "chat"])
    main(["layout", str(tmp_path / "chat"), str(tmp_path / "again"), "--to", "hf"])
    main(["layout", str(tmp_path / "again"), str(tmp_path / "chat again"), "--to", "chat"])
    for first, second in (("hf", "again"), ("chat", "chat again")):
        before, after = weights(tmp_path / first), weights(tmp_path / second)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8)) for n in before)
        assert all(before[n].dtype == after[n].dtype for n in before)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "again").eval()
    settings = [m.config.to_dict() for m in (model, again)]
    for key in ("text_config", "vision_config", "image_token_id", "image_seq_length", "downsample_ratio"):
        for config in settings:
            for volatile in ("dtype", "_name_or_path", "architectures"):
                config[key].pop(volatile, None) if isinstance(config[key], dict) else None
        assert settings[0][key] == settings[1][key], key
    ids = torch.tensor([row(5, -2, 9)])
    assert torch.equal(again(ids, pixel_values=tiles(2)).logits, model(ids, pixel_values=tiles(2)).logits)


def test_what_lies_beside_the_weights(tmp_path):
    save(tmp_path / "hf", "internvl_moe")
    (tmp_path / "hf" / "LICENSE").write_text("free")
    to_chat_layout(tmp_path / "hf", tmp_path / "chat")
    config = json.loads((tmp_path / "chat" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("internvl_chat", ["InternVLChatModel"])
    assert config["llm_config"]["architectures"] == ["Qwen3MoeForCausalLM"]
    assert config["llm_config"]["num_experts"] == 8
    assert config["vision_config"]["qk_normalization"] is True
    assert config["vision_config"]["qkv_bias"] is False
    assert config["vision_config"]["drop_path_rate"] == 0.1
    assert (config["force_image_size"], config["ps_version"], config["select_layer"]) == (vision.IMAGE_SIZE, "v2", -1)
    to_hf_layout(tmp_path / "chat", tmp_path / "again")
    images = json.loads((tmp_path / "again" / "preprocessor_config.json").read_text())
    assert images["size"] == {"height": vision.IMAGE_SIZE, "width": vision.IMAGE_SIZE}
    assert images["image_mean"] == [0.485, 0.456, 0.406]
    tokenizer = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert tokenizer["extra_special_tokens"]["context_image_token"] == "<IMG_CONTEXT>"
    assert tokenizer["model_max_length"] == 512
    assert (tmp_path / "again" / "LICENSE").read_text() == "free"


def test_code_and_configuration_of_a_published_checkpoint_go_along(tmp_path):
    save(tmp_path / "hf", "internvl_dense")
    to_chat_layout(tmp_path / "hf", tmp_path / "published")
    published = json.loads((tmp_path / "published" / "config.json").read_text()) | {"template": "internvl3_5"}
    (tmp_path / "published" / "config.json").write_text(json.dumps(published))
    (tmp_path / "published" / "modeling_internvl_chat.py").write_text("class InternVLChatModel: ...")
    main(["layout", *(str(tmp_path / n) for n in ("hf", "out")), "--to", "chat", "--like", str(tmp_path / "published")])
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == published
    assert (tmp_path / "out" / "modeling_internvl_chat.py").exists()
    to_hf_layout(tmp_path / "out", tmp_path / "again")
    assert not (tmp_path / "again" / "modeling_internvl_chat.py").exists()
    save(tmp_path / "other", "internvl_moe")
    with pytest.raises(CheckpointFormatError, match="is no checkpoint of this architecture"):
        to_chat_layout(tmp_path / "other", tmp_path / "bad", like=tmp_path / "published")


def test_large_checkpoints_are_written_in_shards(tmp_path):
    save(tmp_path / "hf", "internvl_moe", max_shard_size="200KB")
    to_chat_layout(tmp_path / "hf", tmp_path / "chat", max_shard_bytes=100_000)
    to_hf_layout(tmp_path / "chat", tmp_path / "again", max_shard_bytes=150_000)
    before, after = weights(tmp_path / "hf"), weights(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    index = json.loads((tmp_path / "chat" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in before.values())
    AutoModelForImageTextToText.from_pretrained(tmp_path / "again")


def test_loading_it_as_it_is_says_what_to_do(tmp_path):
    save(tmp_path / "hf", "internvl_dense")
    to_chat_layout(tmp_path / "hf", tmp_path / "chat")
    with pytest.raises(UnknownFamilyError, match=r"xtuner-hf layout .*chat OUT --to hf"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "chat")


def test_what_cannot_be_converted_is_said(tmp_path):
    save(tmp_path / "hf", "internvl_dense")
    with pytest.raises(SystemExit, match="has model_type 'internvl'; a checkpoint of 'internvl_chat' was expected"):
        main(["layout", str(tmp_path / "hf"), str(tmp_path / "out"), "--to", "hf"])
    to_chat_layout(tmp_path / "hf", tmp_path / "chat")
    (tmp_path / "chat" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointFormatError, match=re.escape("no tokenizer with a token <IMG_CONTEXT>")):
        to_hf_layout(tmp_path / "chat", tmp_path / "out")
    config = json.loads((tmp_path / "chat" / "config.json").read_text())
    (tmp_path / "chat" / "added_tokens.json").write_text(json.dumps({"<IMG_CONTEXT>": 127}))
    (tmp_path / "chat" / "config.json").write_text(json.dumps(config | {"ps_version": "v1"}))
    with pytest.raises(CheckpointFormatError, match="ps_version is 'v1'"):
        to_hf_layout(tmp_path / "chat", tmp_path / "out")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    del tensors["vision_tower.encoder.layer.1.attention.k_proj.weight"]
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointFormatError, match=r"no vision_tower.*k_proj\.weight of this shape"):
        to_chat_layout(tmp_path / "hf", tmp_path / "out")
