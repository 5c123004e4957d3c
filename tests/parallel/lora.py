"""Training of adapters on fused experts, under one layout after the other in the same processes."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import set_seed

import xtuner_hf
from tests.checkpoint.export_scenario import Spy
from tests.families import FAMILIES
from tests.tiny import uneven_rows
from tests.trainers.resume_scenario import Stop, _steps
from tests.trainers.scenario import Recorder, full, tiny_tokenizer
from xtuner_hf.data import PackedCollator

ROWS, STEPS = 8, 4
# A rank that the kernel has to fill up, and an adapter that is not on experts.
ADAPTER = {
    "r": 3,
    "lora_alpha": 6,
    "target_modules": ["q_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "task_type": "CAUSAL_LM",
}


def make_trainer(
    output_dir: str,
    kind: str = "MoETrainer",
    *,
    model: str = "",
    callbacks=(),
    family: str = "qwen3_moe",
    adapter: dict | None = None,
    init_lora_weights: bool = False,
    accumulation: int = 1,
    **arguments,
):
    """A trainer of an adapter whose factors are random, or as PEFT starts them.

    Args:
        kind: `MoETrainer` gets a PEFT model; `MoESFTTrainer` a model, or a checkpoint's name, and a `peft_config`.
    """
    is_sft = kind == "MoESFTTrainer"
    config = LoraConfig(**(adapter or ADAPTER), init_lora_weights=init_lora_weights)
    base = model or FAMILIES[family].ours(torch.float32)
    args = (xtuner_hf.MoESFTConfig if is_sft else xtuner_hf.MoETrainingArguments)(
        output_dir=output_dir,
        per_device_train_batch_size=ROWS
        * arguments.get("sp_size", 1)
        // accumulation
        // int(os.environ.get("WORLD_SIZE", "1")),
        gradient_accumulation_steps=accumulation,
        max_steps=STEPS,
        save_steps=2,
        learning_rate=1e-2,
        max_grad_norm=0.5,
        logging_steps=1,
        router_aux_loss_coef=0.05,
        report_to=[],
        watchdog_timeout=0,
        remove_unused_columns=False,
        seed=3,
        **({"dataset_kwargs": {"skip_prepare_dataset": True}} if is_sft else {}),
        **({"use_cpu": True, "bf16": False, "gradient_checkpointing": False} | arguments),
    )
    set_seed(7)
    return getattr(xtuner_hf, kind)(
        model=base if is_sft else get_peft_model(base, config),
        args=args,
        data_collator=PackedCollator(pad_token_id=0),
        train_dataset=Dataset.from_list(uneven_rows(ROWS * STEPS)),
        processing_class=tiny_tokenizer(),
        callbacks=list(callbacks),
        **({"peft_config": config} if is_sft else {}),
    )


def adapter_of(model) -> dict[str, torch.Tensor]:
    return {name: full(tensor) for name, tensor in model.state_dict().items() if "lora_" in name}


def train(output_dir: str, resume=None, stop_after: int | None = None, export: bool = False, **options) -> dict:
    """One run; what it logged, the adapter before and after, and its gradients."""
    recorder = Recorder()
    trainer = make_trainer(output_dir, callbacks=[recorder, Stop(stop_after)], **options)
    start = adapter_of(trainer.model)
    trainer.train(resume_from_checkpoint=resume)
    if export:
        trainer.save_model(f"{output_dir}/adapter")
        with Spy() as spy:
            trainer.save_merged_model(f"{output_dir}/merged")
    steps = _steps(trainer)
    return {
        "largest tensor": spy.largest if export else None,
        "losses": {step: log["loss"] for step, log in zip(steps, recorder.logs, strict=True)},
        "norms": {step: log["grad_norm"] for step, log in zip(steps, recorder.logs, strict=True)},
        "grads": recorder.grads,
        "start": start,
        "adapter": adapter_of(trainer.model),
        "placements": {n: str(getattr(p, "placements", None)) for n, p in trainer.model.named_parameters()},
    }


def run_layouts(folder: str, layouts: list[dict], through_accelerate: int = 0) -> list[dict]:
    """One run after the other; each in `folder/<its index>` unless it says where.

    Args:
        through_accelerate: so many of them, the last ones, are launched as with `distributed_type: FSDP` in the config.
    """
    results = []
    for index, layout in enumerate(layouts):
        if index == len(layouts) - through_accelerate:
            os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        results.append(train(**({"output_dir": str(Path(folder) / str(index))} | layout)))
        AcceleratorState._reset_state()
    return results if not dist.is_initialized() or dist.get_rank() == 0 else []
