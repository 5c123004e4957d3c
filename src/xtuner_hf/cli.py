"""`xtuner-hf`: commands around training.

xtuner-hf doctor
xtuner-hf plan qwen3-235b-a22b --gpus 256 --device h800 --seq-len 4096
xtuner-hf bench --shapes qwen3-30b-a3b --lengths 4096
xtuner-hf convert out/checkpoint-500 model-for-the-hub --dtype bfloat16
xtuner-hf layout InternVL3_5-30B-A3B-HF out --to chat

What a command does is imported when it runs: `--help` should not take the seconds that torch needs.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .bench.arguments import add_arguments as add_bench_arguments
from .plan.command import add_arguments as add_plan_arguments
from .plan.command import run as run_plan


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="xtuner-hf", description="Commands around MoE training.")
    commands = parser.add_subparsers(dest="command", required=True)
    for add_command in (_add_doctor, _add_plan, _add_bench, _add_convert, _add_layout):
        add_command(commands)
    options = parser.parse_args(arguments)
    options.run(options)


def _add_doctor(commands: Any) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="say what this machine has for training, what is missing and what to install",
        description="Looks at packages, devices and what they need, without importing what might crash. Ends with 1 if "
        "something is missing.",
    )
    doctor.set_defaults(run=_doctor)


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="memory and time of a training run, without a device",
        description="Simulate one rank's training step on fake tensors: does it fit, what is it made of, how fast "
        "is it. With --search, which layout is the fastest that fits.",
    )
    add_plan_arguments(plan)
    plan.set_defaults(run=run_plan)


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure layer stacks of published models, ours next to stock transformers",
        description="Train short stacks of layers with the widths of published models, through the trainers' own "
        "step: forward, backward and optimizer apart, tokens/s, TFLOP/s, peak memory. docs/speed.md explains them.",
    )
    add_bench_arguments(bench)
    bench.set_defaults(run=_bench)


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser(
        "convert",
        help="make a Hub checkpoint of a training checkpoint",
        description="Write the model of a training checkpoint as the Hub has it: safetensors, index, config and "
        "tokenizer. Reads one chunk at a time. Under torchrun or accelerate launch the processes share the writing. "
        "Of a run with adapters: the adapter as PEFT has it.",
    )
    convert.add_argument("checkpoint", type=Path, help="checkpoint-N, or an output_dir for its newest one")
    convert.add_argument("out", type=Path, help="folder to write, best a new one")
    convert.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; default: as saved"
    )
    convert.add_argument("--max-shard-size", default="5GB", help="size of a file at most, 5GB by default")
    convert.add_argument(
        "--per-expert", action="store_true", help="of an adapter: a tensor for each expert, not PEFT's fused ones"
    )
    convert.set_defaults(run=_convert)


def _add_layout(commands: Any) -> None:
    layout = commands.add_parser(
        "layout",
        help="rewrite an InternVL checkpoint in the other of its two layouts",
        description="InternVL is on the Hub in transformers' layout (-HF) and in that of its own code "
        "(InternVLChatModel, which SGLang reads). Tensors are renamed and stay the same byte by byte.",
    )
    layout.add_argument("checkpoint", type=Path, help="folder with config.json and safetensors")
    layout.add_argument("out", type=Path, help="folder to write, best a new one")
    layout.add_argument("--to", choices=("hf", "chat"), required=True, help="transformers' layout or InternVL's own")
    layout.add_argument(
        "--like", type=Path, help="with --to chat: a published checkpoint whose code and config.json go along"
    )
    layout.set_defaults(run=_layout)


def _doctor(options: argparse.Namespace) -> None:
    from .doctor import examine

    raise SystemExit(examine())


def _bench(options: argparse.Namespace) -> None:
    from .bench.command import run_benchmark

    run_benchmark(options)


def _convert(options: argparse.Namespace) -> None:
    convert_checkpoint(options.checkpoint, options.out, options.dtype, options.max_shard_size, options.per_expert)


def _layout(options: argparse.Namespace) -> None:
    change_layout(options.checkpoint, options.out, options.to, options.like)


def change_layout(checkpoint: Path, out: Path, to: str, like: Path | None = None) -> None:
    """What `xtuner-hf layout` does.

    Raises:
        SystemExit: with one sentence, for a checkpoint that is no InternVL's or is quantised.
    """
    from .checkpoint.internvl_chat import to_chat_layout, to_hf_layout
    from .checkpoint.quantised_format import CheckpointFormatError

    try:
        if to == "chat":
            to_chat_layout(checkpoint, out, like=like)
        else:
            to_hf_layout(checkpoint, out)
    except CheckpointFormatError as error:
        raise SystemExit(str(error)) from None
    print(f"{out}: {checkpoint} in the layout '{to}'")


def convert_checkpoint(
    checkpoint: Path, out: Path, dtype: str | None, max_shard_size: str, per_expert: bool = False
) -> None:
    """What `xtuner-hf convert` does.

    Raises:
        SystemExit: with one sentence, if there is no complete checkpoint.
    """
    import torch
    import torch.distributed as dist
    from transformers import AutoConfig, GenerationConfig

    from ._compat import parse_size_to_int
    from .checkpoint.adapter import CONFIG as ADAPTER_CONFIG
    from .checkpoint.adapter import convert_adapter
    from .checkpoint.export import export_to_hub
    from .checkpoint.folder import complete_checkpoints, read_facts
    from .checkpoint.side_files import copy_side_files
    from .checkpoint.sources import CheckpointTensors
    from .device import HOST_COLLECTIVES
    from .models.auto import model_class

    if read_facts(checkpoint) is None:
        complete = complete_checkpoints(checkpoint)
        if not complete:
            raise SystemExit(f"{checkpoint} is no complete training checkpoint and holds none.")
        checkpoint = complete[-1]
    group = None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if not dist.is_initialized():
            dist.init_process_group(HOST_COLLECTIVES)
        group = dist.group.WORLD
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if group else (0, 1)
    if (checkpoint / ADAPTER_CONFIG).exists():
        if rank == 0:
            convert_adapter(checkpoint, out, per_expert)
            copy_side_files(checkpoint, out)
            print(f"{out}: the adapter of {checkpoint}")
        return
    if per_expert:
        raise SystemExit(f"--per-expert is for adapters, and {checkpoint} is of a run without.")
    config = AutoConfig.from_pretrained(checkpoint)
    # Multi-token prediction layers are built when asked for; a configuration that counts some had them saved.
    kept = {"mtp_loss_coef": 0} if getattr(config, "num_nextn_predict_layers", 0) else {}
    with torch.device("meta"):
        model = model_class(config)._from_config(config, **kept)
    # The checkpoint's own files come along: configurations, tokenizer, templates, remote code.
    model.source_folder = checkpoint
    if (checkpoint / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    source = CheckpointTensors(checkpoint, rank, world_size)
    export_to_hub(
        model,
        out,
        source=source,
        dtype=getattr(torch, dtype) if dtype else None,
        max_shard_bytes=parse_size_to_int(max_shard_size),
        group=group,
    )
    if rank == 0:
        print(f"{out}: the model of {checkpoint}")


if __name__ == "__main__":
    main()
