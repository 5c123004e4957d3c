"""Peaks as the benchmark measures them: each case in a process of its own."""

from __future__ import annotations

import ctypes
from typing import Any

from benchmarks.memory import OPTIMIZERS, STEPS, allocator_threshold, measure, plan, run_case
from tests.ranks import run_on_ranks

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def row(kind: str, shape: str, case: str, tokens: int) -> dict:
    """As `run_case`, in a process that has imported all that it needs already."""
    arguments = {"kind": kind, "shape": shape, "case": case, "tokens": tokens}
    return run_on_ranks("tests.memory.test_peak:measured", 1, **arguments)[0]


def peak(*case: Any) -> int:
    return row(*case)["peak_bytes"]


def measured(kind: str, shape: str, case: str, tokens: int) -> dict:
    for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        ctypes.CDLL(None).mallopt(parameter, allocator_threshold(kind))
    return measure(kind, shape, case, tokens, "cpu")


def test_the_chunked_loss_needs_less_than_an_eighth_of_full_logits():
    full = peak("head", "head", "full logits", 1024)
    assert full > 2 * 1024 * 151_936 * 4, "logits and their gradient: the measure sees them"
    assert peak("head", "head", "chunked", 1024) < full / 8


def test_recompute_keeps_less_the_more_it_recomputes():
    full, selective, none = (peak("step", "small", f"recompute {case}", 4096) for case in ("full", "selective", "none"))
    assert full < selective < none


def test_bf16_states_and_steps_in_backward_save_what_they_say():
    plain = row("optimizer", "wide", "torch AdamW", 16)["bytes_per_parameter"]
    # As the benchmark starts it.
    case = "optimizer_states bf16, optimizer_in_backward"
    small = run_case("optimizer", "wide", case, 16, "cpu")["bytes_per_parameter"]
    # Of 4 bytes of gradient and 8 of states: nearly all of the first, half of the second.
    assert plain > 12
    assert plain - small > 0.85 * (4 + 4)


def test_the_plan_measures_offload_only_where_there_is_a_device():
    assert not any("offload" in case for _, _, case, _ in plan("small", [4096], 4096, "cpu"))
    on_gpu = {case for _, _, case, _ in plan("qwen3-30b-a3b", [65536], 32768, "cuda")}
    assert set(STEPS) | set(OPTIMIZERS) <= on_gpu
