"""`xtuner-hf plan`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .devices import PlanError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments; nothing here takes the seconds that torch needs."""
    parser.add_argument("model", help="a folder with a config.json, such a file, or a known name: qwen3-235b-a22b, ...")
    parser.add_argument("--gpus", type=int, required=True, help="ranks of the job")
    parser.add_argument("--device", default="h100", help="h100 h200 h800 b200 a100 ascend-a2 ascend-a3")
    parser.add_argument("--seq-len", type=int, default=4096, help="tokens of a row, of all ranks that share it")
    parser.add_argument(
        "--document-len", type=int, help="tokens of the documents packed in a row; default: one document"
    )
    parser.add_argument("--micro-batch", type=int, default=1, help="rows of a rank at a time")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of an optimizer step")
    parser.add_argument("--ep", type=int, default=1, dest="ep_size", help="ep_size")
    parser.add_argument("--sp", type=int, default=1, dest="sp_size", help="sp_size")
    parser.add_argument("--replicas", type=int, default=1, dest="dp_replicate_size", help="dp_replicate_size (HSDP)")
    parser.add_argument("--ranks-per-node", type=int, help="default: the device's usual number")
    parser.add_argument("--recompute", default="full", choices=("none", "selective", "full"))
    parser.add_argument(
        "--offload", nargs="*", default=[], choices=("activations", "optimizer"), help="what waits in host memory"
    )
    parser.add_argument("--optimizer-states", default="full", choices=("full", "bf16"))
    parser.add_argument("--optimizer-in-backward", action="store_true")
    parser.add_argument("--mtp-loss-coef", type=float, help="train multi-token prediction layers")
    parser.add_argument("--lora-rank", type=int, help="train adapters of this rank on attention, MLPs and experts")
    parser.add_argument("--tiles-per-row", type=int, default=0, help="of images, whose tokens --seq-len counts too")
    parser.add_argument(
        "--freeze", nargs="*", default=[], choices=("vision", "projector", "language"), help="what does not train"
    )
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the parameters between steps"
    )
    parser.add_argument("--fp8", action="store_true", help="multiply in FP8 (docs/fp8.md)")
    parser.add_argument("--every-layer", action="store_true", help="simulate all layers, not two shallow models")
    parser.add_argument("--calibration", type=Path, help="JSON with measured efficiencies of this device")
    parser.add_argument("--search", action="store_true", help="try layouts and rank those that fit")
    parser.add_argument("--tokens-per-step", type=int, help="of the job; what --search keeps the same")
    parser.add_argument("--out", type=Path, help="folder: pictures of the plan; launch files of what --search chose")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> None:
    """What the command does.

    Raises:
        SystemExit: with one sentence, for what cannot be planned.
    """
    from .planning import quiet

    try:
        with quiet():
            if options.search:
                _search(options)
            else:
                _plan(options)
    except PlanError as error:
        raise SystemExit(f"xtuner-hf plan: {error}") from None


def _job(options: argparse.Namespace) -> Any:
    import torch

    from .planning import make_job

    names = (
        "gpus device ranks_per_node ep_size sp_size dp_replicate_size calibration seq_len document_len micro_batch "
        "accumulation recompute optimizer_states optimizer_in_backward mtp_loss_coef lora_rank tiles_per_row fp8"
    )
    return make_job(
        options.model,
        activation_offload="activations" in options.offload,
        optimizer_offload="optimizer" in options.offload,
        frozen=tuple(options.freeze),
        dtype=getattr(torch, options.dtype),
        **{name: getattr(options, name) for name in names.split()},
    )


def _plan(options: argparse.Namespace) -> None:
    from .page import page
    from .planning import plan_job

    plan = plan_job(_job(options), every_layer=options.every_layer)
    print(json.dumps(plan.as_dict(), indent=2) if options.json else page(plan), end="\n" if options.json else "")
    if options.out is not None:
        from .picture import draw, write_trace

        options.out.mkdir(parents=True, exist_ok=True)
        draw(plan, options.out / "plan.png")
        write_trace(plan, options.out / "trace.json")


def _say(line: str) -> None:
    """On the screen alone: the result may go to a file or another program."""
    if sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)


def _search(options: argparse.Namespace) -> None:
    from .search import search, table, write_launch_files

    found = search(_job(options), tokens_per_step=options.tokens_per_step, progress=_say)
    if options.json:
        print(json.dumps([candidate.as_dict() for candidate in found], indent=2))
    else:
        print(table(found))
    if options.out is not None:
        write_launch_files(found, options.out)
