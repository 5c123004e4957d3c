"""Training on 2 and 4 NPUs, joined by HCCL, equals one process on the CPU: FSDP2, EP, HSDP and shared sequences."""

from __future__ import annotations

import pytest
import torch

from tests.npu.ranks import run_on_npus
from tests.parallel.grid import references, run_layouts
from tests.trainers.scenario import differences

RUN = f"{run_layouts.__module__}:{run_layouts.__name__}"
ROWS = 8  # of an optimizer step
COMMON = {"dtype": torch.float32, "experts_kernel": "grouped_mm", "steps": 2, "idle_experts": (0, 1, 2, 3)}
# An eps above rounding: AdamW divides gradients by their size, and would make steps of lr of errors.
COMMON |= {"adam_epsilon": 1e-5}
ONE_EXPERT_A_RANK = {"config": {"num_experts": 2, "num_experts_per_tok": 1}, "idle_experts": (0,)}
LAYOUTS = {
    2: [
        {},
        {"ep_size": 2},
        {"ep_size": 2, "expert_dispatch": "all_to_all"},
        {"ep_size": 2} | ONE_EXPERT_A_RANK,
        {"sp_size": 2},
        {"dp_replicate_size": 2},
    ],
    4: [{"ep_size": 2, "accumulation": 2}, {"ep_size": 2, "dp_replicate_size": 2}, {"ep_size": 2, "sp_size": 2}],
}


BF16 = {"ep_size": 2, "bf16": True}


@pytest.mark.parametrize("num_ranks", LAYOUTS)
def test_every_layout_equals_one_process(num_ranks):
    """Half of the experts, under EP 2 all of one rank, get no token at all. One layout has a single expert a rank."""
    layouts = LAYOUTS[num_ranks]
    on_npus = [{"use_cpu": False} | COMMON | layout for layout in [*layouts, BF16]]
    *runs, in_bf16 = run_on_npus(RUN, num_ranks, layouts=on_npus, rows=ROWS)[0]
    shared = ("ep_size", "sp_size", "dp_replicate_size", "expert_dispatch")
    alone = [COMMON | {name: value for name, value in layout.items() if name not in shared} for layout in layouts]
    expected = references(alone, rows=ROWS)
    for layout, run, reference in zip(layouts, runs, expected, strict=True):
        found = differences(run, reference)
        assert max(found.values()) < 1e-5, (layout, found)
    # bf16 moves tokens near the border between two experts to the other one: its error is that of the loss.
    for ours, reference in zip(in_bf16["logs"], expected[0]["logs"], strict=True):
        assert ours["loss"] == pytest.approx(reference["loss"], rel=2e-2)
