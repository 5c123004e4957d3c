"""A folder of a trained model in bf16, rewritten as its source was published."""

import functools
import json

import pytest
import torch
from datasets import Dataset

from tests.checkpoint.families import config_json, deepseek_config, plain_checkpoint, write_case
from tests.checkpoint.official import FP8_CONFIG, read_stored, same_bytes, write_official
from tests.checkpoint.test_hub_source import change
from tests.tiny import uneven_rows
from xtuner_hf import DeepseekV3ForCausalLM, MoETrainer, MoETrainingArguments
from xtuner_hf.checkpoint.hub_folder import HubFolder
from xtuner_hf.checkpoint.quantised_format import CheckpointFormatError
from xtuner_hf.checkpoint.requantise import requantise_folder
from xtuner_hf.data import PackedCollator

REMOTE_CODE = "class Configuration: ...\n"


@pytest.mark.parametrize("case", ["deepseek_v3_ragged", "gpt_oss", "qwen3_moe"])
def test_folder_to_folder(tmp_path, case):
    source, trained, target = (tmp_path / name for name in ("source", "trained", "target"))
    model_class, _ = write_case(source, case)
    (source / "configuration_remote.py").write_text(REMOTE_CODE)
    model = model_class.from_pretrained(source)
    norm = model.model.norm.weight
    with torch.no_grad():
        norm.add_(1.0)
    model.save_pretrained(trained)
    requantise_folder(trained, source, target, shard_bytes=100_000)
    original, written = read_stored(source), read_stored(target)
    assert written.keys() == original.keys()
    changed = [name for name, tensor in original.items() if not same_bytes(written[name], tensor)]
    assert changed == ["model.norm.weight"]
    assert torch.equal(written["model.norm.weight"], norm)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in original.values())
    assert len(set(index["weight_map"].values())) == len(list(target.glob("*.safetensors"))) > 1
    assert not list(target.glob("*.tmp"))
    assert (target / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert (target / "configuration_remote.py").read_text() == REMOTE_CODE
    again = model_class.from_pretrained(target).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_tensors_that_the_model_lacks_are_copied(tmp_path):
    source, trained, target = (tmp_path / name for name in ("source", "trained", "target"))
    model_class, _ = write_case(source, "gpt_oss")
    model_class.from_pretrained(source).save_pretrained(trained)
    change(trained, lambda stored: stored.pop("lm_head.weight"))
    requantise_folder(trained, source, target)
    assert same_bytes(read_stored(target)["lm_head.weight"], read_stored(source)["lm_head.weight"])


@pytest.mark.parametrize("coef", [None, 0.0, 0.3])
def test_the_multi_token_prediction_layer(coef, tmp_path):
    """Left out of the model it is copied from the source; kept or trained it is written by the model."""
    source, trained, target = (tmp_path / name for name in ("source", "trained", "target"))
    config = deepseek_config(num_nextn_predict_layers=1)
    with_mtp = functools.partial(DeepseekV3ForCausalLM, mtp_loss_coef=0)
    entries = config_json(config, FP8_CONFIG) | {"architectures": ["DeepseekV3ForCausalLM"]}
    plain = plain_checkpoint(with_mtp, config)
    write_official(source, plain, entries)
    model = DeepseekV3ForCausalLM.from_pretrained(source, mtp_loss_coef=coef, dtype=torch.float32).train()
    if coef:
        rows = torch.randint(2, 64, (1, 16), generator=torch.Generator().manual_seed(0))
        model(rows, labels=rows, chunked_loss=True).loss.backward()
        torch.optim.SGD(model.model.layers[2].parameters(), lr=1.0).step()
    model.save_pretrained(trained)
    held = {name for name in HubFolder(trained).names() if name.startswith("model.layers.2.")}
    assert len(held) == (0 if coef is None else sum(name.startswith("model.layers.2.") for name in plain))
    requantise_folder(trained, source, target)
    original, written = read_stored(source), read_stored(target)
    assert written.keys() == original.keys()
    changed = {name for name, tensor in original.items() if not same_bytes(written[name], tensor)}
    assert bool(changed) == bool(coef)
    assert all(name.startswith("model.layers.2.") for name in changed)
    assert not coef or "model.layers.2.eh_proj.weight" in changed


def test_from_official_weights_through_a_trainer_and_back(tmp_path):
    source, saved, target = (tmp_path / name for name in ("source", "saved", "target"))
    model_class, _ = write_case(source, "qwen3_moe")
    args = MoETrainingArguments(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=4,
        max_steps=1,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        remove_unused_columns=False,
    )
    trainer = MoETrainer(
        model=str(source),
        args=args,
        train_dataset=Dataset.from_list(uneven_rows(4)),
        data_collator=PackedCollator(pad_token_id=0, padding_free=True),
    )
    trainer.train()
    trainer.save_model(str(saved))
    requantise_folder(saved, source, target)
    original, written = read_stored(source), read_stored(target)
    assert {name: (t.dtype, t.shape) for name, t in written.items()} == {
        name: (t.dtype, t.shape) for name, t in original.items()
    }
    assert (target / "config.json").read_bytes() == (source / "config.json").read_bytes()
    again = model_class.from_pretrained(target, dtype=torch.float32).state_dict()
    for name, tensor in trainer.model.state_dict().items():
        worst = (again[name] - tensor).abs().max() / tensor.abs().max()
        assert worst < 2**-4, name  # half a step of e4m3's 3 bits; bf16 of what is not quantised


def test_a_source_that_is_not_quantised(tmp_path):
    source, trained = tmp_path / "source", tmp_path / "trained"
    model_class, _ = write_case(source, "gpt_oss")
    model_class.from_pretrained(source).save_pretrained(trained)
    with pytest.raises(CheckpointFormatError, match="is not quantised; "):
        requantise_folder(trained, trained, tmp_path / "target")
