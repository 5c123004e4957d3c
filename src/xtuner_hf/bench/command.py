"""`xtuner-hf bench`: runs cases one after the other in this process and writes what they took.

bench.json           every figure, and what they were measured on
bench.md, bench.png  the same as a table and as a plot
efficiencies.json    what `xtuner-hf plan` takes in place of its guesses
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from ..device import best_device, data_sheet_flops, device_name, is_host, measured_matmul_flops
from .rates import efficiencies
from .report import plot, table
from .run import Case, measure
from .shapes import SHAPES


def run_benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """What the command does; returns what bench.json holds."""
    started = time.monotonic()
    device = best_device()
    shapes = {name: SHAPES[name].made_tiny() if options.tiny else SHAPES[name] for name in options.shapes}
    results: dict[str, Any] = {
        "device": device_name(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "data_sheet_flops_per_second": data_sheet_flops(device_name(device)),
        "matrix_flops_per_second": measured_matmul_flops(device),
        "layers": {name: f"{shape.layers} of {shape.published_layers}" for name, shape in shapes.items()},
        "tiny": options.tiny,
        "cases": [],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for case in cases(options):
        if time.monotonic() - started > options.deadline:
            break
        results["cases"].append(_try(case, shapes[case.shape], device, options))
        _write(results, options.out)  # what a cut-off run has measured stays
        print(table(results | {"cases": results["cases"][-1:]}).splitlines()[-1], flush=True)
    first = next(iter(shapes.values()))
    measured = efficiencies(first, options.tokens, min(options.lengths), device)
    (options.out / "efficiencies.json").write_text(json.dumps(measured, indent=2) + "\n")
    plot(results, options.out / "bench.png")
    return results


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """All combinations, variants innermost: what is compared runs side by side."""
    outer = (options.shapes, options.lengths, options.recomputes, options.routings, options.variants)
    for shape, length, recompute, routing, variant in itertools.product(*outer):
        tokens = max(options.tokens // length, 1) * length
        yield Case(shape, variant, length, tokens, routing, recompute)


def _try(case: Case, shape: Any, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a case, or why it has none: out of memory, a kernel that is not there."""
    try:
        return measure(case, shape, device, steps=options.steps, warmup=options.warmup)
    except Exception as error:
        return case.__dict__ | {"error": f"{type(error).__name__}: {error}"}
    finally:
        gc.collect()
        if not is_host(device):
            torch.get_device_module(device).empty_cache()


def _write(results: dict[str, Any], folder: Path) -> None:
    (folder / "bench.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "bench.md").write_text(table(results))
