"""`sp_size` as a training argument: the same training as in one process, through every trainer and both doors.

fp64 weights, so that what is compared is the method; the softmax of head and router stays fp32 by design, hence 1e-6.
"""

from __future__ import annotations

import pytest

from tests.ranks import run_on_ranks
from tests.trainers.scenario import differences

LAYOUTS = {
    "padded rows": {"sp_size": 2},
    "packed, EP, accumulation": {"sp_size": 2, "ep_size": 2, "accumulation": 3, "packed": True},
    "SP over all ranks, EP, recompute": {
        **{"sp_size": 4, "ep_size": 2, "accumulation": 3, "packed": True, "gradient_checkpointing": True}
    },
    "copies of the parameters": {"sp_size": 2, "dp_replicate_size": 2, "packed": True},
    "SFT": {"sp_size": 2, "ep_size": 2, "accumulation": 3, "packed": True, "trainer_kind": "MoESFTTrainer"},
}
ACCELERATE_LAYOUTS = [{"sp_size": 2, "ep_size": 2, "accumulation": 3, "packed": True}]


@pytest.fixture(scope="module")
def reference() -> dict:
    return run_on_ranks("tests.parallel.grid:references", 1, variants=[{}])[0][0]


@pytest.fixture(scope="module")
def runs() -> dict:
    found = run_on_ranks("tests.parallel.grid:run_layouts", 4, layouts=list(LAYOUTS.values()))[0]
    return dict(zip(LAYOUTS, found, strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_one_process(name, runs, reference):
    found = differences(runs[name], reference)
    assert max(found.values()) < 1e-6, found


def test_sharded_by_accelerate(reference):
    (run,) = run_on_ranks("tests.parallel.grid:run_layouts", 4, layouts=ACCELERATE_LAYOUTS, accelerate_fsdp=True)[0]
    found = differences(run, reference)
    assert max(found.values()) < 1e-6, found
