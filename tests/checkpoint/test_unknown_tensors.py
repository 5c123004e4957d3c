"""Tensors of a checkpoint that our model does not know are in what it saves, byte by byte."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import vision
from xtuner_hf import AutoModelForImageTextToText
from xtuner_hf.checkpoint.export import export_to_hub

# Under names of both kinds of prefix, and in dtypes that the model does not have.
UNKNOWN = {
    "time_series.conv.weight": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "vision_tower.extra": torch.arange(7),
    "model.time_series.scale": torch.tensor([float("nan"), 1.5], dtype=torch.float16),
}


def weights(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", ["internvl_moe", "interns1"])
@pytest.mark.parametrize("shard_size", ["5GB", "100KB"])
def test_saved_by_every_door_and_read_again(name, shard_size, tmp_path):
    vision.ours(name).save_pretrained(tmp_path / "source")
    known = load_file(tmp_path / "source" / "model.safetensors")
    save_file(known | UNKNOWN, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "source")
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(tmp_path / "saved", max_shard_size=shard_size)
    export_to_hub(model, tmp_path / "exported", max_shard_bytes=10**9 if shard_size == "5GB" else 100_000)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    again.save_pretrained(tmp_path / "again")
    for folder in ("saved", "exported", "again"):
        found = weights(tmp_path / folder)
        assert found.keys() == known.keys() | UNKNOWN.keys()
        for unknown, tensor in UNKNOWN.items():
            assert found[unknown].dtype == tensor.dtype
            assert torch.equal(found[unknown].view(torch.uint8), tensor.view(torch.uint8))
        index = json.loads((tmp_path / folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == found.keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
        changed = {n for n in known if not torch.equal(known[n], found[n])}
        assert changed == {next(n for n in known if n.endswith("lm_head.weight"))}


def test_models_of_text_leave_out_what_they_do_not_know(tmp_path):
    """DeepSeek V3's multi-token prediction layer is left out on purpose."""
    from tests.families import FAMILIES
    from xtuner_hf import AutoModelForCausalLM

    FAMILIES["qwen3_moe"].ours().save_pretrained(tmp_path / "source")
    known = load_file(tmp_path / "source" / "model.safetensors")
    save_file(known | UNKNOWN, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    AutoModelForCausalLM.from_pretrained(tmp_path / "source").save_pretrained(tmp_path / "saved")
    assert weights(tmp_path / "saved").keys() == known.keys()
