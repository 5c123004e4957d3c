"""Jobs of tests/ranks.py come from one process and know nothing of each other."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.ranks import run_on_ranks

SEEN: list[str] = []


def leave_traces() -> tuple[int, int, int, str | None, float]:
    SEEN.append("here")
    trace, os.environ["A_TRACE"] = os.environ.get("A_TRACE"), "left"
    drawn = float(torch.rand(()))
    return os.getppid(), int(os.environ["RANK"]), len(SEEN), trace, drawn


def fail_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("this rank cannot go on")
    time.sleep(600)


def hang() -> None:
    print("waiting", os.getpid(), flush=True)
    time.sleep(600)


def is_offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")  # of a process that nobody has asked after yet: Z
    return status.exists() and "State:\tZ" not in status.read_text()


def test_every_job_begins_as_the_first_one():
    first, second = (run_on_ranks("tests.test_ranks:leave_traces", 2) for _ in range(2))
    assert first[0][0] != second[0][0], "jobs of their own"
    assert [rank[1:] for rank in first] == [rank[1:] for rank in second]
    assert [rank[1:4] for rank in first] == [(0, 1, None), (1, 1, None)]


def test_what_fails_or_hangs_is_told_and_ends():
    with pytest.raises(RuntimeError, match=r"failed(?s:.*)this rank cannot go on(?s:.*)rank 1 ended with 1"):
        run_on_ranks("tests.test_ranks:fail_on_rank_1", 2)
    with pytest.raises(RuntimeError, match=r"no end after 1 s\n--- log-0 ---\nwaiting \d+") as caught:
        run_on_ranks("tests.test_ranks:hang", 1, timeout=1)
    pid = int(str(caught.value).split()[-1])
    deadline = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid)
    assert [rank[2] for rank in run_on_ranks("tests.test_ranks:leave_traces", 1)] == [1]


def test_an_interrupted_job_leaves_no_answer_for_the_next():
    run_on_ranks("tests.test_ranks:leave_traces", 1)  # there is a nursery
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # processes in the background ignore it
    try:
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            run_on_ranks("tests.test_ranks:hang", 1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [rank[2] for rank in run_on_ranks("tests.test_ranks:leave_traces", 1)] == [1]


def test_variables_that_are_read_at_import_get_a_process_of_their_own(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run_on_ranks("tests.test_ranks:is_offline", 1) == [True]
