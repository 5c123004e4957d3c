"""Reading checkpoint folders: lazy views, and one sentence for each way in which a checkpoint can be broken."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.families import write_case
from tests.checkpoint.official import read_stored, write_folder
from xtuner_hf.checkpoint.hub_source import HubSource
from xtuner_hf.checkpoint.quantised_format import CheckpointFormatError

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


def change(folder, edit) -> None:
    """Let `edit` change the stored tensors of a folder, and write it again."""
    stored, config = read_stored(folder), json.loads((folder / "config.json").read_text())
    edit(stored)
    write_folder(folder, stored, config)


def change_config(folder, **entries) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


@pytest.mark.parametrize("case", ["deepseek_v3_ragged", "gpt_oss"])
def test_views_have_the_plain_names_shapes_and_values(tmp_path, case):
    _, values = write_case(tmp_path, case)
    views = HubSource(tmp_path).lazy_tensors()
    assert views.keys() == values.keys()
    for name, value in values.items():
        assert tuple(views[name].get_shape()) == value.shape
        assert torch.equal(views[name][...].float(), value.float())


@pytest.mark.parametrize(
    "index", [(slice(0, 60), slice(130, 200)), slice(3, 4), (slice(0, 0), slice(0, 9)), (slice(None),), ...]
)
def test_views_are_indexed_like_tensors(tmp_path, index):
    _, values = write_case(tmp_path, "deepseek_v3_ragged")
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    assert torch.equal(HubSource(tmp_path).lazy_tensors()[name][index], values[name][index])


def test_one_file_without_an_index(tmp_path):
    _, values = write_case(tmp_path, "gpt_oss")
    config = json.loads((tmp_path / "config.json").read_text())
    stored = read_stored(tmp_path)
    single = tmp_path / "single"
    single.mkdir()
    save_file(stored, single / "model.safetensors")
    (single / "config.json").write_text(json.dumps(config))
    assert HubSource(single).lazy_tensors().keys() == values.keys()


def test_missing_scale(tmp_path):
    write_case(tmp_path, "deepseek_v3")
    change(tmp_path, lambda stored: stored.pop(f"{EXPERT}_scale_inv"))
    expected = (
        f"{EXPERT} (float8_e4m3fn [128, 256]) needs the tensor {EXPERT}_scale_inv to be dequantised, and {tmp_path} "
        "does not have it; the checkpoint is incomplete, download it again."
    )
    with pytest.raises(CheckpointFormatError, match=re.escape(expected)):
        HubSource(tmp_path)


def test_weight_of_another_dtype_beside_its_scale(tmp_path):
    write_case(tmp_path, "deepseek_v3")
    change(tmp_path, lambda stored: stored.update({EXPERT: stored[EXPERT].bfloat16()}))
    with pytest.raises(
        CheckpointFormatError, match=re.escape(f"{EXPERT} to be dequantised, and {tmp_path} has it as ")
    ):
        HubSource(tmp_path)


def test_missing_blocks(tmp_path):
    write_case(tmp_path, "gpt_oss")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    change(tmp_path, lambda stored: stored.pop(f"{name}_blocks"))
    with pytest.raises(
        CheckpointFormatError, match=re.escape(f"{name}_scales (uint8 [4, 128, 3]) needs the tensor {name}_bl")
    ):
        HubSource(tmp_path)


@pytest.mark.parametrize(
    ("case", "name", "sentence"),
    [
        ("deepseek_v3", f"{EXPERT}_scale_inv", "has shape [1, 1], expected [1, 2] for"),
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj_scales", "has shape [4, 96, 1], expected [4, 96, 2] for"),
    ],
)
def test_scale_of_another_shape(tmp_path, case, name, sentence):
    write_case(tmp_path, case)
    change(tmp_path, lambda stored: stored.update({name: stored[name][..., :1]}))
    with pytest.raises(CheckpointFormatError, match=re.escape(f"{name} {sentence}")):
        HubSource(tmp_path)


def test_scale_of_another_dtype(tmp_path):
    write_case(tmp_path, "deepseek_v3")
    name = f"{EXPERT}_scale_inv"
    change(tmp_path, lambda stored: stored.update({name: stored[name].to(torch.int32)}))
    with pytest.raises(CheckpointFormatError, match=r"is int32 \[1, 2\], expected 2 dimensions of float32 or bfloat16"):
        HubSource(tmp_path)


def test_fp8_weights_under_a_config_that_does_not_say_so(tmp_path):
    write_case(tmp_path, "deepseek_v3")
    change_config(tmp_path, quantization_config=None)
    with pytest.raises(CheckpointFormatError, match=r"in FP8, but its config.json has no quantization_config"):
        HubSource(tmp_path)


def test_shard_that_is_not_there(tmp_path):
    write_case(tmp_path, "deepseek_v3")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointFormatError, match=r"names model-00002-of-00002.safetensors, which is not there"):
        HubSource(tmp_path)


def test_tensor_that_its_shard_does_not_hold(tmp_path):
    write_case(tmp_path, "deepseek_v3")
    shard = tmp_path / "model-00002-of-00002.safetensors"
    tensors = load_file(shard)
    name = next(iter(tensors))
    del tensors[name]
    save_file(tensors, shard)
    with pytest.raises(
        CheckpointFormatError, match=re.escape(f"places {name} in {shard.name}, which does not hold it")
    ):
        HubSource(tmp_path)


def test_folder_without_weights(tmp_path):
    with pytest.raises(
        CheckpointFormatError, match=r"holds neither model.safetensors.index.json nor model.safetensors"
    ):
        HubSource(tmp_path)
