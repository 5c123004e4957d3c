"""Short FP8 runs of the common scenario, and how often weights were quantised in them."""

from __future__ import annotations

import os
from unittest import mock

from accelerate.state import AcceleratorState

from tests.trainers.scenario import train
from xtuner_hf.kernels import fp8

# Attention whose shards on two ranks are whole blocks (q), and ones that are not (k, v).
WIDE = {"num_attention_heads": 8, "head_dim": 32, "num_key_value_heads": 2}
STEPS, ROWS = 2, 2  # rows of a micro-batch: blocks of tokens are cut from the same ones on any number of ranks


def fp8_run(ranks: int = 1, **arguments) -> dict:
    """`train` with fp8=True, and `quantised`: the shapes of the weights that this process quantised."""
    shapes = []

    def quantise_blocks(weight, make=fp8.quantise_blocks):
        shapes.append(tuple(weight.shape))
        return make(weight)

    options = {"config": WIDE, "dtype": arguments.pop("dtype"), "steps": STEPS}
    with mock.patch.object(fp8, "quantise_blocks", quantise_blocks):
        accumulation = 8 // (ROWS * ranks)
        result = train(**options, batch=ROWS, accumulation=accumulation, fp8=True, experts_kernel="auto", **arguments)
    return result | {"quantised": shapes}


def on_ranks(runs: list[dict]) -> list[dict]:
    results = []
    for run in runs:
        if run.pop("accelerate_door", False):
            os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        results.append(fp8_run(**run))
        AcceleratorState._reset_state()  # it outlives a trainer
    return results
