"""Runs a function on several processes joined by gloo, with a deadline, and leaves no process behind."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

REPO = Path(__file__).resolve().parent.parent


def run_on_ranks(function: str, world_size: int, timeout: float = 180, **kwargs: Any) -> list[Any]:
    """Call `module:function`(**kwargs) on each of `world_size` processes; returns what each rank returned.

    The processes have the environment of `accelerate launch --use_cpu`, also when there is only one of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save(kwargs, Path(folder) / "kwargs.pt")
        processes = [_start(function, rank, world_size, _free_port_once(folder), folder) for rank in range(world_size)]
        try:
            _wait(processes, folder, timeout)
        finally:
            for process in processes:
                _kill(process)
        return [torch.load(Path(folder) / f"result-{rank}.pt", weights_only=False) for rank in range(world_size)]


def _free_port_once(folder: str) -> int:
    port_file = Path(folder) / "port"
    if not port_file.exists():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port_file.write_text(str(probe.getsockname()[1]))
    return int(port_file.read_text())


def _start(function: str, rank: int, world_size: int, port: int, folder: str) -> subprocess.Popen:
    env = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(REPO / "src"), str(REPO), os.environ.get("PYTHONPATH", "")]),
    }
    with open(Path(folder) / f"log-{rank}.txt", "w") as log:
        command = [sys.executable, "-m", "tests.ranks", function, folder]
        return subprocess.Popen(command, cwd=REPO, env=env, stdout=log, stderr=log, start_new_session=True)


def _wait(processes: list[subprocess.Popen], folder: str, timeout: float) -> None:
    for rank, process in enumerate(processes):
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = f"no end after {timeout} s"
        if code != 0:
            for other in processes:
                _kill(other)
            logs = "\n".join(
                f"--- rank {other} ---\n{(Path(folder) / f'log-{other}.txt').read_text()[-4000:]}"
                for other in range(len(processes))
            )
            raise RuntimeError(f"rank {rank} failed ({code}):\n{logs}")


def _kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> None:
    name, folder = sys.argv[1:]
    module, function = name.split(":")
    torch.manual_seed(0)
    kwargs = torch.load(Path(folder) / "kwargs.pt", weights_only=False)
    result = getattr(importlib.import_module(module), function)(**kwargs)
    torch.save(result, Path(folder) / f"result-{os.environ['RANK']}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    # The result is written. Without this, a thread of torch that outlives the interpreter sometimes aborts the process
    # ("terminate called without an active exception", once in some thousand ranks).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
