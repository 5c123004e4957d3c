"""Steps that are not numbers, SIGTERM, ranks with unequal data, a rank that does not come."""

from __future__ import annotations

import torch

from tests.ranks import run_on_ranks
from tests.trainers import resume_scenario
from xtuner_hf.checkpoint.folder import read_facts

SCENARIO = "tests.trainers.resume_scenario"


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(tmp_path):
    """Step 2 is NaN on rank 1: no rank moves, neither weights nor the correction bias; the schedule goes on."""
    runs = run_on_ranks(
        f"{SCENARIO}:train_with_nan",
        2,
        output_dir=str(tmp_path),
        at=(2,),
        rank=1,
        ep_size=2,
        max_steps=3,
        per_device_train_batch_size=2,
    )
    for run in runs:
        seen = run["seen"]
        assert [seen[step]["skipped"] for step in (1, 2, 3)] == [False, True, False]
        assert all(torch.equal(tensor, seen[1]["state"][name]) for name, tensor in seen[2]["state"].items())
        moved = [name for name, tensor in seen[3]["state"].items() if not torch.equal(tensor, seen[2]["state"][name])]
        assert len(moved) == len(seen[3]["state"])
        assert all(tensor.isfinite().all() for tensor in seen[3]["state"].values())
        assert [log.get("skipped_steps") for log in run["logs"] if "loss" in log] == [None, 1, 1]
        assert run["error"] is None
        assert run["lr"] == 3


def test_too_many_in_a_row_stop_the_run(tmp_path):
    """Steps 1, 3 and 4 are NaN; two in a row are too many."""
    run = resume_scenario.train_with_nan(str(tmp_path), at=(1, 3, 4), rank=0, max_skipped_steps=2)
    assert "2 optimizer steps in a row were skipped, up to step 4" in run["error"]
    assert "loss not finite on 1 rank(s)" in run["error"]
    assert sorted(run["seen"]) == [1, 2, 3]


def test_a_step_taken_in_backward_cannot_be_skipped(tmp_path):
    run = resume_scenario.train_with_nan(
        str(tmp_path), at=(2,), rank=0, optimizer_in_backward=True, max_grad_norm=0, max_steps=3
    )
    assert "Step 2 has a loss or gradient that is not finite, and optimizer_in_backward has stepped" in run["error"]
    assert sorted(run["seen"]) == [1]


def test_sigterm_on_one_rank_saves_and_ends_all(tmp_path):
    runs = run_on_ranks(
        f"{SCENARIO}:train_until_sigterm",
        2,
        output_dir=str(tmp_path),
        at=3,
        rank=1,
        per_device_train_batch_size=2,
    )
    assert [(run["code"], run["step"]) for run in runs] == [(0, 3), (0, 3)]
    assert all(run["handler_is_back"] for run in runs)
    facts = read_facts(tmp_path / "checkpoint-3")
    assert facts is not None
    assert facts["step"] == 3


def test_unequal_numbers_of_steps(tmp_path):
    """Rank 0 has rows for three steps, rank 1 for five: an error on both, or an end of the epoch on both."""
    runs = run_on_ranks(
        f"{SCENARIO}:train_on_uneven_streams", 2, output_dir=str(tmp_path), rows=(6, 10), ep_size=2, max_steps=5
    )
    for rank, (failed, drained) in enumerate(runs):
        assert failed["step"] == 3
        assert "Before step 4 some ranks have 1 micro-batches left and some 0" in failed["error"]
        assert f"(rank {rank} has {rank})" in failed["error"]
        # Epochs of three steps each; the fifth step is in the second one.
        assert drained == {"error": None, "step": 5}


def test_the_watchdog_names_rank_and_collective(tmp_path):
    waiting, sleeping = run_on_ranks(f"{SCENARIO}:train_with_a_straggler", 2, output_dir=str(tmp_path), rank=1)
    assert len(waiting) >= 1
    assert waiting[0].startswith("Rank 0 (in a step, step 2) has not moved for ")
    assert "waits in all_" in waiting[0]
    assert "is in no collective but at" in sleeping[0]
    assert "resume_scenario.py" in sleeping[0]
