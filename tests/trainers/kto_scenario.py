"""One short run of KTO with everything about it recorded."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig

from tests.rl.toy import char_tokenizer
from tests.trainers.preference_scenario import pairs, policy, run_quickly
from tests.trainers.scenario import Recorder


def rows(num_rows: int = 16) -> list[dict]:
    """Answers of different lengths, good and bad in turn."""
    names = ("chosen", "rejected")
    return [
        {"prompt": pair["prompt"], "completion": pair[names[index % 2]], "label": index % 2 == 0}
        for index, pair in enumerate(pairs(num_rows))
    ]


def train(kind: Any, config_class: Any, *, batch: int = 4, accumulation: int = 1, **arguments: Any) -> dict:
    keywords = {key: arguments.pop(key) for key in ("model", "ref_model", "peft_config") if key in arguments}
    if arguments.pop("adapters", False):
        keywords |= {"ref_model": None, "peft_config": LoraConfig(target_modules=["q_proj", "v_proj"], r=4)}
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as folder:
        settings = {"gradient_checkpointing": False, "max_grad_norm": 0.5, "router_aux_loss_coef": 0.0, "beta": 0.3}
        args = config_class(
            output_dir=folder,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            per_device_eval_batch_size=batch,
            **(settings | arguments),
        )
        trainer = kind(
            **({"model": policy(0), "ref_model": policy(1)} | keywords),
            args=args,
            train_dataset=Dataset.from_list(rows()),
            processing_class=char_tokenizer(),
            callbacks=[recorder],
        )
        run_quickly(trainer)
        evaluated = trainer.evaluate(Dataset.from_list(rows(8)))["eval_loss"]
    load = trainer._balance.metrics() if hasattr(trainer, "_balance") else None
    tokens = int(trainer._totals[0]) if hasattr(trainer, "_totals") else None
    return {
        "logs": recorder.logs,
        "grads": recorder.grads,
        "load": load and load.load_LE.sum(1).tolist(),
        "tokens": tokens,
        "eval_loss": evaluated,
    }


def train_all(runs: list[dict]) -> list[dict]:
    from xtuner_hf import MoEKTOConfig, MoEKTOTrainer

    torch.manual_seed(0)
    return [train(MoEKTOTrainer, MoEKTOConfig, **run) for run in runs]
