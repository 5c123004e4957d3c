"""What a script of TRL's passes to its trainers, and ours take as well or refuse."""

from __future__ import annotations

from unittest import mock

import pytest
from datasets import Dataset
from transformers import AutoProcessor, AutoTokenizer

import xtuner_hf
from tests.rl.toy import char_tokenizer
from tests.trainers.preference_scenario import policy

KINDS = ("SFT", "DPO", "KTO", "MPO", "GRPO", "DAPO")


def make(kind: str, model, **arguments):
    row = {"prompt": "1+1=", "completion": "2", "label": True}
    if kind in ("DPO", "MPO"):
        row = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
    if kind in ("GRPO", "DAPO"):
        row = {"prompt": "1+1="}
        arguments["reward_funcs"] = lambda completions, **_: [0.0] * len(completions)
    return getattr(xtuner_hf, f"MoE{kind}Trainer")(model, train_dataset=Dataset.from_list([row] * 8), **arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_without_arguments(kind, monkeypatch, tmp_path):
    """As with TRL, all are the defaults and the folder is named after the model and the algorithm."""
    monkeypatch.chdir(tmp_path)
    model = policy()
    model.config.name_or_path = "some/tiny-model"
    with mock.patch("transformers.training_args.is_torch_bf16_gpu_available", return_value=True):
        trainer = make(kind, model, processing_class=char_tokenizer())
    assert type(trainer.args) is getattr(xtuner_hf, f"MoE{kind}Config")
    assert trainer.args.output_dir == f"tiny-model-{kind}"


@pytest.mark.parametrize("kind", ["SFT", "DPO", "GRPO"])
def test_the_tokenizer_is_of_the_models_revision(kind, monkeypatch, tmp_path):
    """Ours hand TRL a model that is loaded, for which it would take the tokenizer of the main branch."""
    policy().save_pretrained(tmp_path / "model")
    asked = {}

    def from_pretrained(name, **keywords):
        asked.update(keywords)
        return char_tokenizer()

    for loader in (AutoProcessor, AutoTokenizer):
        monkeypatch.setattr(loader, "from_pretrained", from_pretrained)
    config_class = getattr(xtuner_hf, f"MoE{kind}Config")
    options = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False, "report_to": []}
    args = config_class(**options, model_init_kwargs={"revision": "v2"})
    make(kind, str(tmp_path / "model"), args=args)
    sides = {"truncation_side": "left", "padding_side": "left"} if kind == "GRPO" else {}
    assert asked == {"revision": "v2"} | sides


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_is_refused(kind, tmp_path):
    args = getattr(xtuner_hf, f"MoE{kind}Config")(str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    with pytest.raises(ValueError, match="quantization_config: this package trains weights that are not quantised"):
        make(kind, policy(), args=args, processing_class=char_tokenizer(), quantization_config=object())
