"""One short training run with everything about it recorded, to compare runs that must be equal."""

from __future__ import annotations

import os
import tempfile
from contextlib import nullcontext

import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

import xtuner_hf
from tests import vision
from tests.families import FAMILIES
from tests.tiny import uneven_rows
from tests.trainers.exact_head import exact_log_probs
from xtuner_hf.data import PackedCollator

# Imported here and not by each rank (tests/ranks.py).
TRAINERS = {"MoETrainer": xtuner_hf.MoETrainer, "MoESFTTrainer": xtuner_hf.MoESFTTrainer}

BALANCE = {
    "router_aux_loss_coef": 0.05,
    "router_z_loss_coef": 0.01,
    "router_sequence_loss_coef": 0.02,
    "router_bias_update_rate": 0.01,
}

STEP = {"experts_kernel": "reference", "learning_rate": 1e-3, "max_grad_norm": 0.5}


def full(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().cpu().double().clone()


class Recorder(TrainerCallback):
    """Notes gradients (after clipping) and logs."""

    def __init__(self):
        self.grads: list[dict[str, torch.Tensor]] = []
        self.logs: list[dict] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.grads.append({name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.logs.append(dict(logs))


def train(
    trainer_kind: str = "MoETrainer",
    *,
    batch: int = 8,
    accumulation: int = 1,
    packed: bool = False,
    pad_to_multiple_of: int | None = None,
    steps: int = 2,
    dtype: torch.dtype = torch.float64,
    family: str = "qwen3_moe",
    config: dict | None = None,
    init: dict | None = None,
    num_rows: int = 16,
    rows: list[dict] | None = None,
    idle_experts: tuple[int, ...] = (),
    **arguments,
) -> dict:
    """Train a tiny model on rows of uneven length, 8 of them an optimizer step if batch x ranks x accumulation is.

    `config` changes the family's configuration, `init` goes to the model's constructor. `idle_experts` get no token.
    `family` may be one of `tests.vision.MODELS`: then some of the rows have images. In fp64 TRL's head, which computes
    in fp32, is replaced.
    """
    changes = {"router_correction_bias": True} if family == "qwen3_moe" else {}
    sees = family in vision.MODELS
    if sees:
        model = vision.ours(family, dtype, "xtuner_reference")
    else:
        model = FAMILIES[family].ours(dtype, init=init, **changes, **(config or {}))
    made, collator = (vision.uneven_rows, vision.TileCollator) if sees else (uneven_rows, PackedCollator)
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias[list(idle_experts)] = -100.0
    recorder = Recorder()
    arguments_class = xtuner_hf.MoESFTConfig if trainer_kind == "MoESFTTrainer" else xtuner_hf.MoETrainingArguments
    with tempfile.TemporaryDirectory() as folder:
        args = arguments_class(
            output_dir=folder,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=steps,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            gradient_checkpointing=arguments.pop("gradient_checkpointing", False),
            remove_unused_columns=False,
            seed=3,
            **({"dataset_kwargs": {"skip_prepare_dataset": True}} if trainer_kind == "MoESFTTrainer" else {}),
            **(BALANCE | {"use_cpu": True, "bf16": False} | STEP | arguments),
        )
        keywords = {
            "data_collator": collator(pad_token_id=0, padding_free=packed, pad_to_multiple_of=pad_to_multiple_of),
            "train_dataset": Dataset.from_list(made(num_rows) if rows is None else rows),
            "callbacks": [recorder],
        }
        if trainer_kind == "MoESFTTrainer":
            keywords["processing_class"] = tiny_tokenizer()
        trainer = TRAINERS[trainer_kind](model=model, args=args, **keywords)
        with exact_log_probs() if dtype == torch.float64 else nullcontext():
            trainer.train()
    state = {name: full(tensor) for name, tensor in trainer.model.state_dict().items()}
    return {"logs": recorder.logs, "grads": recorder.grads, "state": state}


def train_each(runs: list[dict]) -> list[dict]:
    """`train` with each of these arguments, one run after the other in the same processes.

    With `accelerate_fsdp`, which must be the last, as launched with `distributed_type: FSDP` in the config.
    """
    results = []
    for run in runs:
        if run.pop("accelerate_fsdp", False):
            os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        results.append(train(**run))
        AcceleratorState._reset_state()  # it outlives a trainer
    return results


def tiny_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {f"t{i}": i for i in range(128)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="t2")), eos_token="t1", pad_token="t0"
    )


COMPARED_LOGS = ("loss", "grad_norm", "router/aux_loss", "router/z_loss", "router/sequence_loss", "router/max_vio")


def differences(run: dict, reference: dict) -> dict[str, float]:
    """The worst difference of each kind, relative to the reference's largest entry."""

    def worst(a: dict, b: dict) -> float:
        assert a.keys() == b.keys()
        return max(((a[k] - b[k]).abs().max() / b[k].abs().max().clamp(min=1e-12)).item() for k in b)

    result = {
        "grads": max(worst(a, b) for a, b in zip(run["grads"], reference["grads"], strict=True)),
        "state": max(((run["state"][k] - reference["state"][k]).abs().max()).item() for k in reference["state"]),
    }
    for key in COMPARED_LOGS:
        pairs = zip(run["logs"], reference["logs"], strict=True)
        result[key] = max(abs(a[key] - b[key]) / max(abs(b[key]), 1e-12) for a, b in pairs)
    return result
