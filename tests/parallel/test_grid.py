"""The same training under every layout that fits on 8 ranks: EP x efsdp x copies x accumulation, and both doors. (The
one that needs 16 is run by benchmarks/parity_grid.py.)

Rows of very different length, so ranks have unequal numbers of tokens; experts 0 and 1 get none, which are all experts
of a rank under EP 4. fp64 weights, so that what is compared is the method; the softmax of head and router stays fp32 by
design, hence 1e-6.
"""

from __future__ import annotations

import pytest
import torch

from tests.parallel.grid import CELLS
from tests.ranks import run_on_ranks
from tests.trainers.scenario import differences

# What else a cell runs with, so that each is tried under expert parallelism: transformers' dispatcher, recompute.
FURTHER = [
    {"ep_size": 2, "accumulation": 3, "expert_dispatch": "all_to_all"},
    {"ep_size": 4, "accumulation": 1, "gradient_checkpointing": True},
]
FEW_EXPERTS = {"config": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 48}, "idle_experts": ()}


@pytest.fixture(scope="module")
def references() -> list[dict]:
    """All experts in one process; and with 2 experts only."""
    return run_on_ranks("tests.parallel.grid:references", 1, variants=[{}, FEW_EXPERTS, *CELLS[1]])[0]


# Experts sharded on the hidden dimension: of whole layers, and of an EP rank's part.
FEW_EXPERTS_LAYOUTS = [
    {"ep_size": 1, "accumulation": 3, **FEW_EXPERTS},
    {"ep_size": 2, "accumulation": 1, **FEW_EXPERTS},
]
# The default dtype and kernel.
FP32_LAYOUTS = [
    {"ep_size": 2, "dp_replicate_size": copies, "accumulation": 3, "dtype": torch.float32, "experts_kernel": "auto"}
    for copies in (1, 2)
]
ACCELERATE_LAYOUTS = [
    {"ep_size": 1, "accumulation": 3},
    {"ep_size": 2, "dp_replicate_size": 2, "accumulation": 3},
    {"ep_size": 4, "accumulation": 1, "gradient_checkpointing": True},
]


def run(num_ranks: int, layouts: list[dict], **options) -> list[dict]:
    return run_on_ranks("tests.parallel.grid:run_layouts", num_ranks, layouts=layouts, **options)[0]


@pytest.fixture(scope="module")
def on_4_ranks() -> list[dict]:
    layouts = [*CELLS[4], *FURTHER, *FEW_EXPERTS_LAYOUTS, *FP32_LAYOUTS, *ACCELERATE_LAYOUTS]
    return run(4, layouts, through_accelerate=len(ACCELERATE_LAYOUTS))


def assert_same(layouts: list[dict], runs: list[dict], reference: dict, tolerance: float = 1e-6) -> None:
    for layout, run in zip(layouts, runs, strict=True):
        found = differences(run, reference)
        assert max(found.values()) < tolerance, (layout, found)


def test_every_cell_of_the_grid_is_run():
    assert {ranks: len(cells) for ranks, cells in CELLS.items()} == {1: 2, 2: 6, 4: 8, 8: 6, 16: 2}


def test_on_1_rank(references):
    assert_same(CELLS[1], references[2:], references[0])


@pytest.mark.parametrize("num_ranks", [2, 8])
def test_on_2_and_8_ranks(num_ranks, references):
    assert_same(CELLS[num_ranks], run(num_ranks, CELLS[num_ranks]), references[0])


def test_on_4_ranks(on_4_ranks, references):
    layouts = [*CELLS[4], *FURTHER]
    assert_same(layouts, on_4_ranks[: len(layouts)], references[0])


def test_more_ranks_than_experts(on_4_ranks, references):
    start = len(CELLS[4]) + len(FURTHER)
    assert_same(FEW_EXPERTS_LAYOUTS, on_4_ranks[start : start + len(FEW_EXPERTS_LAYOUTS)], references[1])


def test_fp32(on_4_ranks, references):
    """Rounding alone: 1e-5 of each gradient's largest entry and of each weight's norm."""
    start = len(CELLS[4]) + len(FURTHER) + len(FEW_EXPERTS_LAYOUTS)
    for found_run in on_4_ranks[start : start + len(FP32_LAYOUTS)]:
        found = differences(found_run, references[0])
        # Adam divides by the gradient's size: where that nearly cancels, a weight's last bits are noise.
        found["state"] = max(
            ((found_run["state"][name] - expected).norm() / expected.norm().clamp(min=1e-12)).item()
            for name, expected in references[0]["state"].items()
        )
        assert max(found.values()) < 1e-5, found


def test_sharded_by_accelerate(on_4_ranks, references):
    assert_same(ACCELERATE_LAYOUTS, on_4_ranks[-len(ACCELERATE_LAYOUTS) :], references[0])
