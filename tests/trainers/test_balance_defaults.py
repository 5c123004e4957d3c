from __future__ import annotations

import pytest
from datasets import Dataset

from tests.families import FAMILIES
from tests.tiny import uneven_rows
from xtuner_hf import MoEDAPOConfig, MoEDPOConfig, MoEGRPOConfig, MoETrainer, MoETrainingArguments

ARGUMENTS = {"use_cpu": True, "bf16": False, "report_to": []}


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("qwen3_moe", {}, (0.001, 0.0, 0.0)),
        ("gpt_oss", {}, (0.0, 0.0, 0.0)),  # not the 0.9 of its configuration
        ("deepseek_v3", {}, (0.0, 1e-4, 1e-3)),
        ("deepseek_v3", {"router_bias_update_rate": 0.0, "router_aux_loss_coef": 0.2}, (0.2, 1e-4, 0.0)),
    ],
)
def test_none_takes_what_the_family_published(name, arguments, expected, tmp_path):
    changes = {"gpt_oss": {"router_aux_loss_coef": 0.9}, "qwen3_moe": {"router_aux_loss_coef": 0.001}}
    model = FAMILIES[name].ours(**changes.get(name, {}))
    args = MoETrainingArguments(str(tmp_path), **ARGUMENTS, **arguments)
    trainer = MoETrainer(model=model, args=args, train_dataset=Dataset.from_list(uneven_rows()))
    config = trainer._balance.config
    assert (config.aux_loss_coef, config.sequence_loss_coef, trainer._bias_update_rate) == expected


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(MoEGRPOConfig, 0.0), (MoEDAPOConfig, 0.0), (MoEDPOConfig, None), (MoETrainingArguments, None)],
)
def test_reinforcement_learning_alone_does_not_balance_unless_asked(kind, expected, tmp_path):
    args = kind(str(tmp_path), **ARGUMENTS)
    for name in ("router_aux_loss_coef", "router_sequence_loss_coef", "router_bias_update_rate"):
        assert getattr(args, name) == expected, name
