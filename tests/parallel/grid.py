"""Training under many layouts, one after the other in the same processes: starting those is what takes the time."""

from __future__ import annotations

import os
from itertools import product

import torch.distributed as dist
from accelerate.state import AcceleratorState

from tests.trainers.scenario import train

# Rows of an optimizer step, whatever the layout: a multiple of 8 ranks times 3 micro-batches.
ROWS = 24
STEPS = 3
# All experts of rank 0 under EP 4, so that one rank computes nothing at all.
COMMON = {"steps": STEPS, "idle_experts": (0, 1)}


def _cells() -> dict[int, list[dict]]:
    cells: dict[int, list[dict]] = {}
    for ep_size, efsdp_size, copies, accumulation in product((1, 2, 4), (1, 2), (1, 2), (1, 3)):
        layout = {"ep_size": ep_size, "dp_replicate_size": copies, "accumulation": accumulation}
        cells.setdefault(ep_size * efsdp_size * copies, []).append(layout)
    return dict(sorted(cells.items()))


# Number of ranks -> layouts: EP {1, 2, 4} x efsdp {1, 2} x copies {1, 2} x accumulation {1, 3}.
CELLS = _cells()


def references(variants: list[dict], rows: int = ROWS) -> list[dict]:
    results = []
    for variant in variants:
        accumulation = variant.get("accumulation", 1)
        results.append(train(batch=rows // accumulation, num_rows=rows * STEPS, **(COMMON | variant)))
    return results


def run_layouts(layouts: list[dict], through_accelerate: int = 0, rows: int = ROWS) -> list[dict]:
    """One result for each layout: trainer arguments, and `accumulation`.

    Args:
        through_accelerate: so many of them, the last ones, are launched as with `distributed_type: FSDP` in the config.
        rows: of an optimizer step, whatever the layout.
    """
    results = []
    for index, layout in enumerate(layouts):
        if index == len(layouts) - through_accelerate:
            os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        options = {"accumulation": 1, **layout}
        batch = rows * options.get("sp_size", 1) // options["accumulation"] // int(os.environ["WORLD_SIZE"])
        results.append(train(batch=batch, num_rows=rows * STEPS, **(COMMON | options)))
        # Accelerate's state outlives a trainer, its mesh for HSDP too.
        AcceleratorState._reset_state()
    # Every rank computed the same; one copy is enough to compare, and quicker to hand over.
    return results if dist.get_rank() == 0 else []
