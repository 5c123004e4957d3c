"""A folder of a trained model in bf16, rewritten as its source was published."""

import json

import pytest
import torch
from datasets import Dataset

from tests.checkpoint.families import write_case
from tests.checkpoint.official import read_stored, same_bytes
from tests.checkpoint.test_hub_source import change
from tests.tiny import uneven_rows
from xtuner_hf import MoETrainer, MoETrainingArguments
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
