"""What is checked and prepared before a trainer of ours is built: model, layout, data, output folder."""

from __future__ import annotations

import logging
from collections.abc import Sized
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.distributed import DistributedConfig

from .._compat import launched_with_deepspeed, launched_with_fsdp, loads_on_rank_0_only
from ..attention.ulysses import check_heads
from ..attention.varlen import VARLEN_ATTENTION, attention_refusal
from ..device import kind_of
from ..memory.recompute import set_recompute
from ..models.auto import check_has_mtp, load_model, num_experts
from ..models.base import HubModelMixin
from ..models.fp8 import use_fp8
from ..models.fused import compile_blocks, fuse_norms
from ..parallel.adapters import base_model, without_adapters
from ..parallel.layout import ParallelLayout
from ..parallel.shard import copy_from_rank_0, is_sharded, shard_model, sum_gradients
from .vision import prepare_vision

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


def shards_with_accelerate(args: TrainingArguments) -> bool:
    """Whether the second door was chosen: an FSDP launch config, or `--fsdp`."""
    return bool(args.fsdp) or launched_with_fsdp()


def reduces_each_micro_batch(args: Any) -> bool:
    """Whether gradients are reduced into shards after each micro-batch of an optimizer step.

    Accelerate and transformers wait for the last one by default, which saves reductions and keeps the gradient of
    *every* parameter whole on every rank: 940 GB for Qwen3-235B. With copies (HSDP), transformers lets nothing but the
    sum over them wait. What `gradient_accumulation_kwargs` of the accelerator's config says counts.

    Args:
        args: of one of our trainers.
    """
    asked = (args.accelerator_config.gradient_accumulation_kwargs or {}).get("sync_each_batch")
    return args.dp_replicate_size == 1 or shards_with_accelerate(args) if asked is None else asked


def check_accelerate_door(model: Any) -> None:
    """What must be known before the model is read."""
    if is_sharded(model):
        raise ValueError(
            "Two doors at once: the launch config asks Accelerate for FSDP, and the model is already sharded by the "
            "distributed_config it was loaded with. Launch with distributed_type MULTI_GPU, MULTI_NPU or MULTI_CPU, "
            "as in accelerate_configs/, or give the trainer the checkpoint's name or an unsharded model."
        )
    if loads_on_rank_0_only():
        raise ValueError(
            "The launch config has fsdp_cpu_ram_efficient_loading: true, which sends every parameter whole from rank 0 "
            "and cannot feed sharded experts. Set it to false, or launch without FSDP in the config: each rank then "
            "reads its own shard only."
        )


def check_launch(args: Any) -> None:
    """What must be known before anything is put on a device.

    Raises:
        ValueError: for a launch that would train without this package's sharding.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"This process sees {args.n_gpu} GPUs, and transformers would train a copy of the model on each in threads "
            "(nn.DataParallel), which neither shards nor balances: start one process a GPU with `accelerate launch "
            "--config_file accelerate_configs/gpu_8.yaml`, or show it a single one with CUDA_VISIBLE_DEVICES=0."
        )
    if args.deepspeed or launched_with_deepspeed():
        raise ValueError(
            "This run asks for DeepSpeed, which would shard the model once more: models of this package are sharded "
            "with FSDP2. Leave out `deepspeed` and launch with a file of accelerate_configs/; ep_size, sp_size and "
            "optimizer_offload do what ZeRO, Ulysses and its offload would."
        )


def prepare_model(model: Any, args: Any) -> nn.Module:
    """Our model, with the experts kernel asked for and, unless Accelerate does it later, sharded over the processes.

    Args:
        model: a model of this package, PEFT around it or not, or the name of a checkpoint, of which
            each process then reads only its shard.
        args: of one of our trainers.

    Raises:
        TypeError: for a model of another package.
        ValueError: for a layout or a launch that cannot be.
    """
    check_launch(args)
    layout = args.parallel_layout
    if shards_with_accelerate(args):
        check_accelerate_door(model)
    model = _load(model, layout, args) if isinstance(model, str) else _adopt(model, layout, args)
    _check_mtp(base_model(model), args)
    check_dtype(base_model(model), args.device)
    if layout.sp_size > 1:
        check_attention(base_model(model).config.get_text_config(), layout.sp_size)
    if args.world_size > 1 and args.process_index == 0:
        _announce(f"{layout.describe(num_experts(base_model(model).config))}\n{layout.picture()}")
    sum_gradients(model)
    if args.fp8:
        use_fp8(base_model(model), args.device)
    if kind_of(args.device).fused_rms_norm:
        fuse_norms(base_model(model))
    if args.compile_blocks:
        compile_blocks(base_model(model))
    set_recompute(base_model(model), args.recompute or "full", offload=args.activation_offload, device=args.device)
    prepare_vision(model, args)
    return model


def check_dtype(model: nn.Module, device: torch.device) -> None:
    """Whether the device computes in the model's dtype.

    Raises:
        ValueError: for float64 where there is none, and torch would go on in float32 with a warning.
    """
    if kind_of(device).float64:
        return
    name = next((name for name, parameter in model.named_parameters() if parameter.dtype == torch.float64), None)
    if name is not None:
        raise ValueError(
            f"{name} is float64, which {device.type} devices do not compute in; load the model with dtype='float32', "
            "or train on the CPU with --use_cpu."
        )


def check_attention(config: Any, sp_size: int) -> None:
    """Whether attention can be shared between ranks.

    Raises:
        ValueError: too few heads for so many ranks, or an attention implementation that knows nothing of them.
    """
    check_heads(config.num_attention_heads, sp_size)
    if config._attn_implementation != VARLEN_ATTENTION:
        raise ValueError(attention_refusal(config._attn_implementation))


def _announce(message: str) -> None:
    """Log at INFO, and be seen also where nobody has set up logging."""
    if not logger.hasHandlers():
        package = logging.getLogger(__name__.partition(".")[0])
        package.addHandler(logging.StreamHandler())
        package.setLevel(logging.INFO)
    logger.info(message)


def _adopt(model: Any, layout: ParallelLayout, args: Any) -> nn.Module:
    base = base_model(model)
    if not isinstance(base, HubModelMixin):
        raise TypeError(
            f"The model is a {type(base).__module__}.{type(base).__name__}; this trainer needs one of xtuner_hf: "
            "load it with its AutoModelForCausalLM or AutoModelForImageTextToText, or pass the checkpoint's name."
        )
    if args.experts_implementation is not None:
        base.set_experts_implementation(args.experts_implementation)
    if args.mtp_loss_coef is not None:
        _set_mtp(base, args.mtp_loss_coef)
    layout.check_experts(num_experts(base.config))
    if args.world_size == 1:
        return model
    if is_sharded(base):
        _check_loaded_layout(base.config.distributed_config, layout)
        return model
    if shards_with_accelerate(args):
        copy_from_rank_0(base, args.device)
        return model
    with without_adapters(model):
        shard_model(base, _distributed_config(layout, args))
    return model


def _load(name: str, layout: ParallelLayout, args: Any) -> PreTrainedModel:
    # fp32 master weights, as TRL loads a model by name; bf16=True computes in bf16 from them.
    kwargs = {"dtype": "float32", **(getattr(args, "model_init_kwargs", None) or {})}
    if args.experts_implementation is not None:
        kwargs["experts_implementation"] = args.experts_implementation
    if args.mtp_loss_coef is not None:
        kwargs["mtp_loss_coef"] = args.mtp_loss_coef
    if args.world_size > 1 and not shards_with_accelerate(args):
        kwargs["distributed_config"] = _distributed_config(layout, args)
    model = load_model(name, **kwargs)
    layout.check_experts(num_experts(model.config))
    return model


def _set_mtp(base: Any, coef: float) -> None:
    check_has_mtp(type(base), base.config, coef)
    base.set_mtp_loss_coef(coef)


def _check_mtp(base: Any, args: Any) -> None:
    coef = getattr(base, "mtp_loss_coef", None)
    if coef and not args.trains_mtp:
        raise ValueError(
            f"mtp_loss_coef is {coef}, but {type(args).__name__} trains on whole answers, whose preference or reward "
            "says nothing of further tokens: set it to 0 to keep the multi-token prediction layers as they are, or "
            "leave them out of the model."
        )


def _distributed_config(layout: ParallelLayout, args: Any) -> DistributedConfig:
    return layout.distributed_config(bf16=args.bf16, ep_implementation=args.ep_implementation)


def _check_loaded_layout(loaded: DistributedConfig, layout: ParallelLayout) -> None:
    """The arguments cannot change how a model already lies; say so if they would."""
    for name in ("ep_size", "dp_replicate_size"):
        if getattr(loaded, name) != getattr(layout, name):
            raise ValueError(
                f"The model was loaded with {name} {getattr(loaded, name)}, the training arguments say "
                f"{getattr(layout, name)}; give both the same, or give the trainer the checkpoint's name."
            )
