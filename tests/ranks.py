"""Runs a function on several processes joined by gloo, with a deadline, and leaves no process behind.

    pytest  --job-->  nursery  --fork-->  job  --fork-->  ranks

Importing is most of what a short test does. So one process of a test run, the nursery, has imported what nearly all
jobs need, and splits into each of them; a job imports the rest and splits into its ranks. No job runs in the nursery
itself: all begin as the first one does.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tests.ports import free_port

REPO = Path(__file__).resolve().parent.parent


_PRELOADED = ("tests.trainers.scenario", *(f"xtuner_hf.trainers.{name}" for name in ("sft", "mpo", "kto", "dapo")))


def run_on_ranks(
    function: str, world_size: int, timeout: float = 180, *, launcher: str = "tests.ranks", **kwargs: Any
) -> list[Any]:
    """Call `module:function`(**kwargs) on each of `world_size` processes; returns what each rank returned.

    The processes have the environment of `accelerate launch --use_cpu`, also when there is only one of them.

    Args:
        launcher: the module that starts them, with the arguments of `main`.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save(kwargs, Path(folder) / "kwargs.pt")
        is_usual = launcher == "tests.ranks" and _read_at_import() == _READ_BY_NURSERY
        job: _Job = _NurseryJob() if is_usual else _OwnJob(launcher)
        # A session of its own, so that all ranks can be killed together.
        pid = job.start(function, folder, world_size)
        try:
            code = job.wait(timeout)
        except BaseException:
            _kill(pid)
            job.wait(None)  # the next one would take its answer for its own
            raise
        if code is None:
            _kill(pid)
            job.wait(None)
        if code != 0:
            _kill(pid)
            problem = "failed" if code is not None else f"no end after {timeout} s"
            logs = [Path(folder) / f"log-{rank}.txt" for rank in range(world_size)]
            text = "\n".join(f"--- {log.stem} ---\n{log.read_text()[-4000:]}" for log in logs if log.exists())
            raise RuntimeError(f"{function} on {world_size} ranks: {problem}\n{text}")
        return [torch.load(Path(folder) / f"result-{rank}.pt", weights_only=False) for rank in range(world_size)]


class _OwnJob:
    """Of a process that imports everything anew."""

    def __init__(self, launcher: str):
        self._launcher = launcher

    def start(self, function: str, folder: str, world_size: int) -> int:
        command = [sys.executable, "-m", self._launcher, function, folder, str(world_size)]
        self._process = subprocess.Popen(command, cwd=REPO, env=_environment(world_size), start_new_session=True)
        return self._process.pid

    def wait(self, timeout: float | None) -> int | None:
        """The exit code; None if it is still running."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout)
        return None


class _NurseryJob:
    """The same, of a fork of the nursery."""

    _connection: Connection | None = None

    def start(self, function: str, folder: str, world_size: int) -> int:
        if _NurseryJob._connection is None:
            _NurseryJob._connection, theirs = Pipe()
            command = [sys.executable, "-m", "tests.ranks", str(theirs.fileno())]
            subprocess.Popen(command, cwd=REPO, env=_environment(1), pass_fds=[theirs.fileno()], start_new_session=True)
            theirs.close()
        try:
            self._connection.send((function, folder, world_size, _environment(world_size)))
            return self._connection.recv()
        except BaseException:  # what it would answer now, the next job would take for its own
            _NurseryJob._connection = None
            raise

    def wait(self, timeout: float | None) -> int | None:
        return self._connection.recv() if self._connection.poll(timeout) else None


_Job = _OwnJob | _NurseryJob


def _read_at_import() -> dict[str, str]:
    """What HuggingFace's libraries look for when they are imported."""
    return {name: value for name, value in os.environ.items() if name.startswith(("HF_", "TRANSFORMERS_", "TRL_"))}


_READ_BY_NURSERY = _read_at_import()


def _environment(world_size: int) -> dict[str, str]:
    return {
        **os.environ,
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(REPO / "src"), str(REPO), os.environ.get("PYTHONPATH", "")]),
    }


def _kill(pid: int) -> None:
    # Ranks outlive the process that they come from where one of them failed.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def main() -> None:
    if len(sys.argv) == 2:
        _serve(Connection(int(sys.argv[1])))
    else:
        name, folder, world_size = sys.argv[1:]
        sys.exit(_launch(name, Path(folder), int(world_size)))


def _serve(connection: Connection) -> None:
    """What the nursery does, until nobody holds the other end."""
    for name in _PRELOADED:
        importlib.import_module(name)
    while True:
        try:
            function, folder, world_size, environment = connection.recv()
        except EOFError:
            return
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.setsid()
                os.environ.clear()
                os.environ.update(environment)
                code = _launch(function, Path(folder), world_size)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        connection.send(pid)
        connection.send(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def _launch(name: str, folder: Path, world_size: int) -> int:
    """Splits into the ranks; 0 when all have ended well."""
    module, function = name.split(":")
    imported = importlib.import_module(module)
    ranks = {}
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            _run(getattr(imported, function), folder, rank)
        ranks[pid] = rank
    while ranks:
        pid, status = os.waitpid(-1, 0)
        rank = ranks.pop(pid)
        if status != 0:
            with open(folder / f"log-{rank}.txt", "a") as log:
                log.write(f"\nrank {rank} ended with {os.waitstatus_to_exitcode(status)}\n")
            return 1  # the others are killed with the session
    return 0


def _run(function: Any, folder: Path, rank: int) -> None:
    """What a rank does; ends its process."""
    code = 1
    log = os.open(folder / f"log-{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    try:
        torch.manual_seed(0)
        kwargs = torch.load(folder / "kwargs.pt", weights_only=False)
        torch.save(function(**kwargs), folder / f"result-{rank}.pt")
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        code = 0
    except BaseException:
        traceback.print_exc()
    # The result is written. Without this, a thread of torch that outlives the interpreter sometimes aborts the process
    # ("terminate called without an active exception", once in some thousand ranks).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
