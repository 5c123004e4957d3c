"""Forwards take what transformers' take, in its order: others read the signature, or pass inputs by position."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from datasets import Dataset
from peft import PromptTuningConfig, get_peft_model
from transformers import default_data_collator

from tests.tiny import build, moe_config
from xtuner_hf import MoETrainer, MoETrainingArguments, Qwen3MoeForCausalLM
from xtuner_hf.models.auto import AutoModelForCausalLM, AutoModelForImageTextToText

IDS = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForImageTextToText])
def test_names_and_order(auto):
    def positional(cls) -> list[str]:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return [name for name, given in inspect.signature(cls.forward).parameters.items() if given.kind is kind]

    theirs = {"kimi_k2": "deepseek_v3", "interns1": "internvl"}
    official = transformers.models.auto.modeling_auto
    names = {**official.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **official.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    for model_type in auto.classes:
        config = transformers.AutoConfig.for_model(model_type)
        ours = positional(auto.class_of(config))
        stock = positional(getattr(transformers, names[theirs.get(model_type, model_type)]))
        assert len(ours) >= 7, model_type
        assert ours == stock[: len(ours)], model_type


def test_the_mask_by_position():
    """It was taken for labels."""
    model = build(Qwen3MoeForCausalLM, moe_config()).eval()
    with torch.no_grad():
        found, expected = model(IDS, MASK), model(input_ids=IDS, attention_mask=MASK)
    assert found.loss is None
    assert torch.equal(found.logits, expected.logits)


def test_the_trainer_keeps_masks_of_the_data_set(tmp_path):
    """They were dropped as a column that the model does not take: padding went through attention and experts."""
    rows = [{"input_ids": IDS[0].tolist(), "attention_mask": MASK[0].tolist(), "labels": [-100, -100, 5, 6, 7]}] * 2
    args = MoETrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    model = build(Qwen3MoeForCausalLM, moe_config())
    trainer = MoETrainer(model, args, default_data_collator, Dataset.from_list(rows))
    assert set(next(iter(trainer.get_train_dataloader()))) == {"input_ids", "attention_mask", "labels"}


def test_virtual_tokens_generate():
    """PEFT's prompt tuning lets generate() look for inputs in the forward's signature."""
    ours = build(Qwen3MoeForCausalLM, moe_config())
    stock = build(transformers.Qwen3MoeForCausalLM, moe_config())
    stock.load_state_dict(ours.state_dict())
    found = []
    for model in (ours, stock):
        torch.manual_seed(0)
        adapted = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
        found.append(adapted.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=5, do_sample=False))
    assert torch.equal(*found)
