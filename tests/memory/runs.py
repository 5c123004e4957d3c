"""A short training run to compare optimizer options by what they leave behind."""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from tests.tiny import build, moe_config, uneven_rows
from tests.trainers.scenario import BALANCE, full
from xtuner_hf.memory.optimizer import ParameterStep


class Watch(TrainerCallback):
    """Notes the logs, and how many gradients there are at once: `counts` at each gradient's arrival."""

    def __init__(self):
        self.logs: list[dict] = []
        self.most_gradients = 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        parameters = list(model.parameters())

        def count(_):
            self.most_gradients = max(self.most_gradients, sum(p.grad is not None for p in parameters))

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(count)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.logs.append(dict(logs))


def train(steps: int = 4, batch: int = 8, **arguments) -> dict:
    """Train a tiny fp32 model without clipping; returns logs, parameters and the optimizer's states."""
    import xtuner_hf
    from xtuner_hf.data import PackedCollator

    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "output_dir": folder,
            "per_device_train_batch_size": batch,
            "max_steps": steps,
            "learning_rate": 1e-3,
            "weight_decay": 0.1,
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "remove_unused_columns": False,
            "seed": 3,
        }
        trainer = xtuner_hf.MoETrainer(
            model=build(xtuner_hf.Qwen3MoeForCausalLM, moe_config()),
            args=xtuner_hf.MoETrainingArguments(**(values | BALANCE | {"router_bias_update_rate": 0.0} | arguments)),
            data_collator=PackedCollator(pad_token_id=0),
            train_dataset=Dataset.from_list(uneven_rows()),
            callbacks=[watch],
        )
        trainer.train()
    optimizer = trainer.optimizer.optimizer
    states = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    return {
        "logs": watch.logs,
        "most_gradients": watch.most_gradients,
        "parameters": {name: full(parameter) for name, parameter in trainer.model.named_parameters()},
        "state_dtypes": {value.dtype for value in states},
        "state_bytes": sum(local_bytes(value) for value in states),
        "left_on_device": sum(len(coming) for coming in optimizer._coming.values())
        if isinstance(optimizer, ParameterStep)
        else None,
    }


def train_each(each_options: list[dict]) -> list[dict]:
    """Several runs one after the other: starting processes takes longer than any of them."""
    return [train(**options) for options in each_options]


def local_bytes(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage().nbytes() if type(local) is torch.Tensor else 0
