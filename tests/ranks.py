"""Runs a function on several processes joined by gloo, with a deadline, and leaves no process behind.

One process imports what the function needs and then splits into the ranks: importing is most of what a short test does,
and eight ranks on two cores would do it eight times.
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
from pathlib import Path
from typing import Any

import torch

from tests.ports import free_port

REPO = Path(__file__).resolve().parent.parent


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
        # A session of its own, so that all ranks can be killed together.
        job = subprocess.Popen(
            [sys.executable, "-m", launcher, function, folder, str(world_size)],
            cwd=REPO,
            env=_environment(world_size),
            start_new_session=True,
        )
        try:
            failed = job.wait(timeout) != 0
            problem = "failed"
        except subprocess.TimeoutExpired:
            failed, problem = True, f"no end after {timeout} s"
        except BaseException:
            _kill(job)
            raise
        if failed:
            _kill(job)
            logs = [Path(folder) / f"log-{rank}.txt" for rank in range(world_size)]
            text = "\n".join(f"--- {log.stem} ---\n{log.read_text()[-4000:]}" for log in logs if log.exists())
            raise RuntimeError(f"{function} on {world_size} ranks: {problem}\n{text}")
        return [torch.load(Path(folder) / f"result-{rank}.pt", weights_only=False) for rank in range(world_size)]


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


def _kill(job: subprocess.Popen) -> None:
    # Ranks outlive the process that they come from where one of them failed.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    job.wait()


def main() -> None:
    name, folder, world_size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
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
            sys.exit(1)  # the others are killed with the session


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
