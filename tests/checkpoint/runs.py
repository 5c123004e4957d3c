"""Training runs that end in a checkpoint, for processes of their own (`tests.ranks`)."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from datasets import Dataset
from torch.distributed.tensor import DTensor

import xtuner_hf
from tests.families import tokens
from tests.tiny import build, dense_config, moe_config, uneven_rows
from tests.trainers.scenario import tiny_tokenizer
from xtuner_hf.data import PackedCollator


def outcome(function, *args, **kwargs) -> str:
    """What an error says, to be looked at in the test's own process."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def make_trainer(kind: str, model, folder: str, tokenizer=None, **arguments):
    """A trainer of ours that saves after its second and last step."""
    is_sft = kind == "MoESFTTrainer"
    defaults = {
        "output_dir": folder,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "save_steps": 2,
        "save_only_model": True,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "remove_unused_columns": False,
        **({"dataset_kwargs": {"skip_prepare_dataset": True}} if is_sft else {}),
    }
    arguments_class = xtuner_hf.MoESFTConfig if is_sft else xtuner_hf.MoETrainingArguments
    return getattr(xtuner_hf, kind)(
        model=model,
        args=arguments_class(**(defaults | arguments)),
        data_collator=PackedCollator(pad_token_id=0),
        train_dataset=Dataset.from_list(uneven_rows()),
        processing_class=tokenizer or tiny_tokenizer(),
    )


def whole(model) -> dict[str, torch.Tensor]:
    """The parameters and buffers of a sharded model, gathered without the code under test."""
    state = model.state_dict()
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.items()}


def models() -> dict:
    return {
        "moe": lambda: build(xtuner_hf.Qwen3MoeForCausalLM, moe_config(router_correction_bias=True)),
        "tied": lambda: build(
            xtuner_hf.Qwen3ForCausalLM, dense_config(tie_word_embeddings=True, eos_token_id=1, pad_token_id=0)
        ),
    }


def train_and_save(folder: str, runs: dict[str, dict]) -> dict[str, dict[str, torch.Tensor]]:
    """Train two steps and save in every way, run by run (processes are slow to start); returns the trained tensors.

    Args:
        runs: sub-folder -> kind of trainer, ep_size, and model: one of `models()`, or a checkpoint's folder.
    """
    return {name: _train_and_save(Path(folder) / name, **run) for name, run in runs.items()}


def _train_and_save(output: Path, kind: str, model: str, ep_size: int = 1) -> dict[str, torch.Tensor]:
    start = models()[model]() if model in models() else model
    trainer = make_trainer(kind, start, str(output), ep_size=ep_size, save_only_model=True)
    trainer.train()
    trainer.save_model()
    trainer.args.export_dtype = "bfloat16"
    trainer.save_model(str(output / "bf16"))
    return whole(trainer.model)


def load_sharded(good: str, broken: list[str], target: str) -> list[str]:
    """Load each broken checkpoint on sharded ranks, then a good one, and save that again."""
    from transformers.distributed import DistributedConfig

    layouts = [DistributedConfig(fsdp_size=2, ep_size=ep_size) for ep_size in (1, 2)]
    load = xtuner_hf.AutoModelForCausalLM.from_pretrained
    outcomes = [outcome(load, folder, distributed_config=layout) for folder in broken for layout in layouts]
    for layout in layouts:
        load(good, distributed_config=layout).save_pretrained(Path(target) / f"ep{layout.ep_size}")
    return outcomes


# ---- through the Hub's client: HF_ENDPOINT is read when huggingface_hub is imported, hence a process of their own ----


def push_and_load(folder: str) -> dict:
    """Push a model in both ways and load it by name, with our class and with stock transformers'."""
    model = models()["moe"]().eval()
    model.save_pretrained(Path(folder) / "saved")
    model.push_to_hub("me/tiny-qwen3-moe", commit_message="the first one")
    model.save_pretrained(
        Path(folder) / "pushed", push_to_hub=True, repo_id="me/in-shards", max_shard_size="300KB", private=True
    )
    plain = build(xtuner_hf.Qwen3MoeForCausalLM, moe_config()).eval()
    plain.push_to_hub("plain")
    tokens = torch.randint(2, 128, (2, 15), generator=torch.Generator().manual_seed(2))
    stock = transformers.AutoModelForCausalLM.from_pretrained("me/plain")
    loaded = {
        name: xtuner_hf.AutoModelForCausalLM.from_pretrained(f"me/{name}") for name in ("tiny-qwen3-moe", "in-shards")
    }
    return {
        "classes": {type(again) for again in loaded.values()},
        "loaded_from": loaded["tiny-qwen3-moe"].loaded_from,
        "states": [model.state_dict(), *(again.state_dict() for again in loaded.values())],
        "stock_class": type(stock),
        "logit_difference": (stock(tokens).logits - plain(tokens).logits).abs().max().item(),
    }


def load_published_and_save(folder: str, name: str) -> dict:
    """Put a folder on the Hub, load it by name, train its last norm, and save it.

    Returns what the model computes, and the files of the repository that were downloaded.
    """
    from huggingface_hub import HfApi

    HfApi().create_repo(name)
    HfApi().upload_folder(repo_id=name, folder_path=folder)
    model = xtuner_hf.AutoModelForCausalLM.from_pretrained(name).eval()
    with torch.no_grad():
        model.model.norm.weight += 1.0
    model.save_pretrained(f"{folder}-saved")
    found = [path for path in model.source_folder.rglob("*") if path.is_file()]
    return {
        "logits": model.float()(tokens()).logits.detach(),
        "files": {str(path.relative_to(model.source_folder)) for path in found},
        "loaded_from": model.loaded_from,
    }


def meet_faults() -> dict[str, str]:
    """What happens where the server does not play along, as the test has told it to."""
    from huggingface_hub import HfApi

    load = xtuner_hf.AutoModelForCausalLM.from_pretrained
    model = build(xtuner_hf.Qwen3MoeForCausalLM, moe_config())
    model.push_to_hub("me/retried", max_shard_size="300KB")
    shards = [name for name in HfApi().list_repo_files("me/retried") if name.endswith(".safetensors")]
    found = {
        "no token": outcome(model.push_to_hub, "me/refused", token=False),
        "wrong token": outcome(model.push_to_hub, "me/refused", token="wrong"),
        "no such model": outcome(load, "me/nothing"),
        "no such revision": outcome(load, "me/retried", revision="v2"),
        "forbidden": outcome(load, "me/forbidden"),
    }
    HfApi().delete_file(shards[1], "me/retried")
    found["missing shard"] = outcome(load, "me/retried")
    return found


def train_and_push(folder: str, kind: str, model: str, ep_size: int = 1) -> None:
    """Train and push as `push_to_hub=True` asks for, in bf16 from fp32 weights; then the model alone."""
    output = Path(folder) / "run"
    trainer = make_trainer(
        kind,
        models()[model]() if model in models() else model,
        str(output),
        ep_size=ep_size,
        save_steps=1,
        save_only_model=True,
        bf16=True,
        push_to_hub=True,
        hub_model_id=f"me/{kind}",
        hub_always_push=True,
    )
    trainer.train()
    trainer.push_to_hub()
    trainer.model.push_to_hub("me/alone")


# ---- for the engines ----


def train_for_engine(folder: str) -> None:
    """Train a model of sizes that CPU engines take, with expert parallelism; saves it before and after."""
    config = moe_config(hidden_size=128, intermediate_size=128, moe_intermediate_size=64, head_dim=64, vocab_size=512)
    model = build(xtuner_hf.Qwen3MoeForCausalLM, config)
    model.save_pretrained(Path(folder) / "start")
    trainer = make_trainer(
        "MoETrainer", model, str(Path(folder) / "trained"), ep_size=2, save_strategy="no", max_steps=4
    )
    trainer.train()
    trainer.save_model()
