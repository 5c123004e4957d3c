"""Training under each layout of EP {1, 2, 4} x efsdp {1, 2} x copies {1, 2} x accumulation {1, 3}, against one process.

    python -m benchmarks.parity_grid                    # all of it, 16 processes at most
    python -m benchmarks.parity_grid --ranks 2 4

Three optimizer steps of a tiny Qwen3-MoE in fp64 with all balance terms, rows of very different length and experts
without tokens. Reported is the worst relative difference of losses, gradient norms, router metrics, gradients, and
weights; the softmax of head and router stays fp32, hence some 1e-7. The optimizer is SGD: Adam divides by the size of a
gradient, and where that nearly cancels it makes 1e-5 of 1e-7, with accumulation in one process too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tests.parallel.grid import CELLS, STEPS
from tests.ranks import run_on_ranks
from tests.trainers.scenario import differences

# Rows of an optimizer step: 16 ranks times 3 micro-batches.
ROWS = 48
OPTIMIZER = {"optim": "sgd", "learning_rate": 0.1}
RESULTS = Path(__file__).parent / "results" / "parity_grid.json"


def measure(ranks: list[int]) -> dict:
    (reference,) = run_on_ranks("tests.parallel.grid:references", 1, variants=[OPTIMIZER], rows=ROWS)[0]
    found = []
    for num_ranks in ranks:
        layouts = [layout | OPTIMIZER for layout in CELLS[num_ranks]]
        if num_ranks == 1:
            runs = run_on_ranks("tests.parallel.grid:references", 1, variants=layouts, rows=ROWS)[0]
        else:
            options = {"timeout": 1800, "layouts": layouts, "rows": ROWS}
            runs = run_on_ranks("tests.parallel.grid:run_layouts", num_ranks, **options)[0]
        for layout, run in zip(CELLS[num_ranks], runs, strict=True):
            efsdp_size = num_ranks // layout["ep_size"] // layout["dp_replicate_size"]
            worst = {name: float(f"{value:.2g}") for name, value in differences(run, reference).items()}
            found.append({"ranks": num_ranks, "efsdp_size": efsdp_size, **layout, "differences": worst})
            print(json.dumps(found[-1]), flush=True)
    worst = max(max(cell["differences"].values()) for cell in found)
    return {"steps": STEPS, "worst difference": worst, "cells": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    figures = measure(options.ranks)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(figures, indent=1) + "\n")
    if figures["worst difference"] > 1e-6:
        raise SystemExit(f"The worst difference is {figures['worst difference']}; it should be below 1e-6.")


if __name__ == "__main__":
    main()
