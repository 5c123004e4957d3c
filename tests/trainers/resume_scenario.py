"""Training runs that save, stop, go on and fail on purpose. Each function here runs on the processes of a job."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

import xtuner_hf
from tests.families import cast
from tests.tiny import build, moe_config, uneven_rows
from tests.trainers.scenario import BALANCE, Recorder, full
from xtuner_hf.data import PackedCollator


def make_trainer(
    output_dir: str,
    *,
    callbacks=(),
    dtype=torch.float32,
    dataset=None,
    config: dict | None = None,
    no_dropout: bool = False,
    lora: bool = False,
    **arguments,
):
    """A tiny MoE with every balance term on, 4 rows a step by default, dropout so that random numbers count."""
    changes = {"router_correction_bias": True, "attention_dropout": 0.0 if no_dropout else 0.1, **(config or {})}
    config = moe_config(**changes)
    model = cast(build(xtuner_hf.Qwen3MoeForCausalLM, config), dtype)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.01,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 3,
        "watchdog_timeout": 0,
        "seed": 3,
        "use_cpu": True,
    }
    args = xtuner_hf.MoETrainingArguments(
        output_dir=output_dir,
        report_to=[],
        bf16=False,
        remove_unused_columns=False,
        **(defaults | BALANCE | arguments),
    )
    return xtuner_hf.MoETrainer(
        model=model,
        args=args,
        data_collator=PackedCollator(pad_token_id=0),
        train_dataset=dataset if dataset is not None else Dataset.from_list(uneven_rows(20)),
        callbacks=list(callbacks),
    )


class Stop(TrainerCallback):
    """Ends a run early: its schedule is that of the whole one."""

    def __init__(self, step: int | None):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


class Best(TrainerCallback):
    """Says that a step was the best one, as an evaluation would."""

    def __init__(self, step: int | None):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            state.best_global_step = self.step


def train(
    output_dir: str,
    resume=None,
    stop_after: int | None = None,
    best_step: int | None = None,
    accelerate_fsdp: bool = False,
    export_to: str | None = None,
    **arguments,
) -> dict:
    """One run; the losses it logged, the state it ended with, and the checkpoints on disk.

    Args:
        accelerate_fsdp: launch as with `distributed_type: FSDP` in the config.
        export_to: a folder for `save_model`.
    """
    if accelerate_fsdp:
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    recorder = Recorder()
    trainer = make_trainer(output_dir, callbacks=[recorder, Stop(stop_after), Best(best_step)], **arguments)
    trainer.train(resume_from_checkpoint=resume)
    if export_to is not None:
        trainer.save_model(export_to)
    optimizer = {}
    for name, parameter in trainer.model.named_parameters():
        entries = trainer.optimizer.optimizer.state.get(parameter, {})
        optimizer |= {f"{name}.{key}": full(value) for key, value in entries.items()}
    return {
        "losses": {log_step: log["loss"] for log_step, log in zip(_steps(trainer), recorder.logs, strict=True)},
        "norms": {log_step: log["grad_norm"] for log_step, log in zip(_steps(trainer), recorder.logs, strict=True)},
        "state": {name: full(tensor) for name, tensor in trainer.model.state_dict().items()},
        "optimizer": optimizer,
        "learning_rate": trainer.optimizer.param_groups[0]["lr"],
        "checkpoints": sorted(path.name for path in Path(output_dir).glob("*checkpoint-*")),
        "door": str(trainer.accelerator.distributed_type),
        "best": trainer.state.best_model_checkpoint,
    }


def _steps(trainer) -> list[int]:
    first = trainer._initial_global_step
    return [log["step"] for log in trainer.state.log_history if "loss" in log and log["step"] > first]


class At(TrainerCallback):
    """Calls a function at the beginning of a step on some ranks."""

    def __init__(self, step: int, function, ranks=None):
        self.step, self.function, self.ranks = step, function, ranks

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step and (self.ranks is None or args.process_index in self.ranks):
            self.function()


def train_with_nan(output_dir: str, at: tuple[int, ...], rank: int, **arguments) -> dict:
    """The loss of `rank` is NaN at these steps."""
    seen: dict[int, dict] = {}

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            tensors = {name: full(tensor) for name, tensor in trainer.model.state_dict().items()}
            seen[state.global_step] = {"state": tensors, "skipped": trainer.step_was_skipped}

    trainer = make_trainer(output_dir, callbacks=[Note()], save_strategy="no", **arguments)
    parent = trainer.compute_loss

    def compute_loss(*positional, **keywords):
        loss = parent(*positional, **keywords)
        bad = trainer.state.global_step + 1 in at and trainer.args.process_index == rank
        return loss * float("nan") if bad else loss

    trainer.compute_loss = compute_loss
    try:
        trainer.train()
        error = None
    except xtuner_hf.trainers.stability.NonFiniteError as found:
        error = str(found)
    return {"seen": seen, "error": error, "logs": trainer.state.log_history, "lr": trainer.lr_scheduler.last_epoch}


def train_until_sigterm(output_dir: str, at: int, rank: int, **arguments) -> dict:
    """One rank gets SIGTERM in the middle of a run."""
    callback = At(at, lambda: os.kill(os.getpid(), signal.SIGTERM), ranks=[rank])
    trainer = make_trainer(output_dir, callbacks=[callback], max_steps=50, save_steps=1000, **arguments)
    try:
        trainer.train()
        code = "went on"
    except SystemExit as stop:
        code = stop.code
    return {
        "code": code,
        "step": trainer.state.global_step,
        "handler_is_back": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
    }


class Stream(torch.utils.data.IterableDataset):
    """As many rows as it was told, on this rank."""

    def __init__(self, rows: int):
        self.rows = uneven_rows(rows)

    def __iter__(self):
        return iter(self.rows)


def train_on_uneven_streams(output_dir: str, rows: tuple[int, ...], **arguments) -> list[dict]:
    """Each rank has a stream of its own, of so many rows; once with an error, once drained."""
    return [_train_on_a_stream(f"{output_dir}/{mode}", rows, uneven_batches=mode, **arguments) for mode in MODES]


MODES = ("error", "drain")


def _train_on_a_stream(output_dir: str, rows: tuple[int, ...], **arguments) -> dict:
    stream = Stream(rows[int(os.environ["RANK"])])
    trainer = make_trainer(output_dir, dataset=stream, per_device_train_batch_size=2, save_strategy="no", **arguments)
    # Accelerate would deal one stream out to all ranks.
    trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader(
        stream, batch_size=2, collate_fn=trainer.data_collator
    )
    try:
        trainer.train()
        error = None
    except xtuner_hf.trainers.stability.UnevenBatchesError as found:
        error = str(found)
    return {"error": error, "step": trainer.state.global_step}


def train_with_a_straggler(output_dir: str, rank: int) -> list[str]:
    """One rank sleeps before a step; what the watchdogs of this rank and of the others say."""
    import logging

    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    logging.getLogger("xtuner_hf.trainers.watchdog").addHandler(Keep())
    callback = At(2, lambda: time.sleep(4), ranks=[rank])
    make_trainer(output_dir, callbacks=[callback], max_steps=2, save_strategy="no", watchdog_timeout=1).train()
    return lines
