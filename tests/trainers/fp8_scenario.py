"""Short FP8 runs of the common scenario, and how often weights were quantised in them."""

from __future__ import annotations

import os
from unittest import mock

import torch
from accelerate.state import AcceleratorState
from datasets import Dataset

import xtuner_hf
from tests.families import FAMILIES
from tests.tiny import uneven_rows
from tests.trainers.scenario import Recorder, full, train
from xtuner_hf.data import PackedCollator
from xtuner_hf.kernels import fp8

# Attention whose shards on two ranks are whole blocks (q), and ones that are not (k, v).
WIDE = {"num_attention_heads": 8, "head_dim": 32, "num_key_value_heads": 2}
STEPS, ROWS = 2, 2  # rows of a micro-batch: blocks of tokens are cut from the same ones on any number of ranks


def fp8_run(ranks: int = 1, **arguments) -> dict:
    """`train` with fp8=True, and `quantised`: the shapes of the weights that this process quantised."""
    shapes = []

    def quantise_blocks(weight, make=fp8.quantise_blocks):
        shapes.append(tuple(weight.shape))
        return make(weight)

    options = {"config": WIDE, "dtype": arguments.pop("dtype"), "steps": STEPS}
    with mock.patch.object(fp8, "quantise_blocks", quantise_blocks):
        accumulation = 8 // (ROWS * ranks)
        result = train(**options, batch=ROWS, accumulation=accumulation, fp8=True, experts_kernel="auto", **arguments)
    return result | {"quantised": shapes}


def on_ranks(runs: list[dict]) -> list[dict]:
    results = []
    for run in runs:
        if run.pop("accelerate_door", False):
            os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        results.append(fp8_run(**run))
        AcceleratorState._reset_state()  # it outlives a trainer
    return results


def resumed(folder: str) -> dict:
    """Losses of three steps, of the last one after resuming, and the parameters then, trained and exported."""
    losses, model = _saving_run(folder)
    losses_again, model_again = _saving_run(folder, resume=f"{folder}/checkpoint-2")
    exported = xtuner_hf.AutoModelForCausalLM.from_pretrained(f"{folder}/hub").state_dict()
    return {
        "losses": (losses, losses_again),
        "trained": [{name: full(value) for name, value in each.state_dict().items()} for each in (model, model_again)],
        "exported": {name: full(value) for name, value in exported.items()},
    }


def _saving_run(folder: str, resume: str | None = None) -> tuple[list[float], torch.nn.Module]:
    recorder = Recorder()
    trainer = xtuner_hf.MoETrainer(
        model=FAMILIES["qwen3_moe"].ours(torch.float32, **WIDE),
        args=xtuner_hf.MoETrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=2,
            max_steps=3,
            logging_steps=1,
            save_strategy="steps",
            save_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            fp8=True,
        ),
        data_collator=PackedCollator(pad_token_id=0),
        train_dataset=Dataset.from_list(uneven_rows(16)),
        callbacks=[recorder],
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(f"{folder}/hub")
    AcceleratorState._reset_state()
    return [log["loss"] for log in recorder.logs], trainer.model
