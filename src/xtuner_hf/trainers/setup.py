"""What is checked and prepared before a trainer of ours is built: model, layout, data, output folder."""

from __future__ import annotations

import logging
from collections.abc import Sized
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from ..models.auto import AutoModelForCausalLM
from ..models.base import HubModelMixin
from ..parallel.shard import check_ep_size, distributed_config, is_sharded, shard_model, sum_gradients

logger = logging.getLogger(__name__)

# What a run leaves behind.
_RUN_TRACES = ("checkpoint-*", "history.jsonl", "model*.safetensors", "trainer_state.json")


def check_dataset(dataset: Any, name: str) -> None:
    """An empty data set is an error here; further down it would be a StopIteration or a run of no steps."""
    if isinstance(dataset, Sized) and len(dataset) == 0:
        raise ValueError(f"{name} is empty: there is nothing to train on. Check the file or the filter that made it.")


def check_output_dir(output_dir: str, resuming: bool) -> None:
    """Refuse a folder that holds another run, whose files would be mixed with or overwritten by this one's."""
    if resuming:
        return
    found = sorted(path.name for pattern in _RUN_TRACES for path in Path(output_dir).glob(pattern))
    if found:
        raise FileExistsError(
            f"output_dir {output_dir!r} holds another run ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''}): "
            "choose another output_dir, move the old one away, or continue it with resume_from_checkpoint=True."
        )


def check_launch(args: TrainingArguments) -> None:
    """Accelerate's FSDP wrapping and sharding at load exclude each other."""
    if args.fsdp or args.distributed_state.distributed_type == "FSDP":
        raise ValueError(
            "The launch config asks Accelerate for FSDP; this trainer shards the model itself (FSDP2, experts over "
            "ep_size). Launch with distributed_type MULTI_GPU, MULTI_NPU or MULTI_CPU, as in accelerate_configs/."
        )


def prepare_model(model: Any, args: Any) -> nn.Module:
    """Our model, with the experts kernel asked for, sharded over the job's processes.

    Args:
        model: a model of this package (PEFT around it is fine in one process), or the name of a checkpoint, of which
            each process then reads only its shard.
        args: of one of our trainers.

    Raises:
        TypeError: for a model of another package.
        ValueError: for an `ep_size` or a launch that cannot be.
    """
    check_launch(args)
    model = _load(model, args) if isinstance(model, str) else _adopt(model, args)
    sum_gradients(model)
    return model


def _adopt(model: Any, args: Any) -> nn.Module:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, HubModelMixin):
        raise TypeError(
            f"The model is a {type(base).__module__}.{type(base).__name__}; this trainer needs one of xtuner_hf: "
            "load it with xtuner_hf.AutoModelForCausalLM, or pass the checkpoint's name."
        )
    if args.experts_implementation is not None:
        base.set_experts_implementation(args.experts_implementation)
    check_ep_size(args.ep_size, args.world_size, num_experts(base))
    if args.world_size == 1 or is_sharded(base):
        return model
    if base is not model:
        raise ValueError(
            "A PEFT model is not sharded yet: train it in one process, or train the full model on several."
        )
    config = distributed_config(args.ep_size, args.world_size, bf16=args.bf16)
    return shard_model(base, config)


def _load(name: str, args: Any) -> PreTrainedModel:
    # fp32 master weights, as TRL loads a model by name; bf16=True computes in bf16 from them.
    kwargs = {"dtype": "float32", **(getattr(args, "model_init_kwargs", None) or {})}
    if args.experts_implementation is not None:
        kwargs["experts_implementation"] = args.experts_implementation
    if args.world_size > 1:
        kwargs["distributed_config"] = distributed_config(args.ep_size, args.world_size, bf16=args.bf16)
    model = AutoModelForCausalLM.from_pretrained(name, **kwargs)
    check_ep_size(args.ep_size, args.world_size, num_experts(model))
    return model


def num_experts(model: PreTrainedModel) -> int | None:
    """Experts of each MoE layer, None for a dense model."""
    return getattr(model.config.get_text_config(), "num_local_experts", None)
