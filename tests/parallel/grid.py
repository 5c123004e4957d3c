"""Training under many layouts, one after the other in the same processes: starting those is what takes the time."""

from __future__ import annotations

import os

import torch.distributed as dist
from accelerate.state import AcceleratorState

from tests.trainers.scenario import train

# Rows of an optimizer step, whatever the layout: a multiple of 8 ranks times 3 micro-batches.
ROWS = 24
STEPS = 3
# All experts of rank 0 under EP 4, so that one rank computes nothing at all.
COMMON = {"steps": STEPS, "num_rows": ROWS * STEPS, "idle_experts": (0, 1)}


def references(variants: list[dict]) -> list[dict]:
    return [train(batch=ROWS, **(COMMON | variant)) for variant in variants]


def run_layouts(layouts: list[dict], accelerate_fsdp: bool = False) -> list[dict]:
    """One result for each layout: trainer arguments, and `accumulation`.

    Args:
        accelerate_fsdp: launch as with `distributed_type: FSDP` in the config.
    """
    if accelerate_fsdp:
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    results = []
    for layout in layouts:
        options = {"accumulation": 1, **layout}
        batch = ROWS * options.get("sp_size", 1) // options["accumulation"] // int(os.environ["WORLD_SIZE"])
        results.append(train(batch=batch, **(COMMON | options)))
        # Accelerate's state outlives a trainer, its mesh for HSDP too.
        AcceleratorState._reset_state()
    # Every rank computed the same; one copy is enough to compare, and quicker to hand over.
    return results if dist.get_rank() == 0 else []
