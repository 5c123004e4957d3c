"""`xtuner-hf`: commands around training.

xtuner-hf convert out/checkpoint-500 model-for-the-hub --dtype bfloat16
xtuner-hf bench --shapes qwen3-30b-a3b --lengths 4096
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from .bench.arguments import add_arguments as add_bench_arguments


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="xtuner-hf", description="Commands around MoE training.")
    commands = parser.add_subparsers(dest="command", required=True)
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
    bench = commands.add_parser(
        "bench",
        help="measure layer stacks of published models, ours next to stock transformers",
        description="Train short stacks of layers with the widths of published models, through the trainers' own "
        "step: forward, backward and optimizer apart, tokens/s, TFLOP/s, peak memory. docs/speed.md explains them.",
    )
    add_bench_arguments(bench)
    options = parser.parse_args(arguments)
    if options.command == "bench":
        from .bench.command import run_benchmark

        run_benchmark(options)
        return
    convert_checkpoint(options.checkpoint, options.out, options.dtype, options.max_shard_size, options.per_expert)


def convert_checkpoint(
    checkpoint: Path, out: Path, dtype: str | None, max_shard_size: str, per_expert: bool = False
) -> None:
    """What `xtuner-hf convert` does.

    Raises:
        SystemExit: with one sentence, if there is no complete checkpoint.
    """
    # Not on top: `--help` should not take the seconds that torch needs.
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
    from .models.auto import causal_lm_class

    if read_facts(checkpoint) is None:
        complete = complete_checkpoints(checkpoint)
        if not complete:
            raise SystemExit(f"{checkpoint} is no complete training checkpoint and holds none.")
        checkpoint = complete[-1]
    group = None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
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
        model = causal_lm_class(config)._from_config(config, **kept)
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
