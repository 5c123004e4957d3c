"""A vLLM server on the CPU, in the environment that `make engine` builds; ends with the `with`."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import httpx2 as httpx
import pytest

from tests.ports import free_port
from tests.ranks import REPO

PYTHON = REPO / ".venv-engine" / "bin" / "python"
START_SECONDS = 180


class VllmServer:
    """Serves a checkpoint folder in fp32 with all that reinforcement learning needs.

    Args:
        folder: the checkpoint.
        scratch: for the log.
    """

    def __init__(self, folder: Path, scratch: Path):
        if not PYTHON.exists():
            pytest.fail(f"There is no vLLM in {PYTHON.parent.parent}: run `make engine` to install it (a few minutes).")
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log = scratch / "vllm.log"
        env = {
            **os.environ,
            "PYTHONPATH": str(REPO / "src"),
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        flags = {
            "--model": folder,
            "--port": port,
            "--host": "127.0.0.1",
            "--dtype": "float32",
            "--max-model-len": 128,
            "--max-num-seqs": 64,
            "--kv-cache-memory-bytes": 2**26,
            "--logprobs-mode": "processed_logprobs",
            "--weight-transfer-config": '{"backend": "safetensors"}',
            "--worker-extension-cls": "xtuner_hf.rl.engines.vllm_worker.SafetensorsWorker",
        }
        switches = ["--enforce-eager", "--skip-tokenizer-init", "--enable-scale-out"]
        command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", *switches]
        command += [str(part) for flag in flags.items() for part in flag]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, env=env, cwd=scratch, stdout=log, stderr=log, start_new_session=True
            )

    def __enter__(self) -> VllmServer:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", timeout=5, trust_env=False).status_code == 200:
                    return self
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        state = "ended" if self._process.poll() is not None else f"did not come up in {START_SECONDS} s"
        self.__exit__()
        raise RuntimeError(f"vLLM {state}:\n{self.log()}")

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def log(self) -> str:
        return self._log.read_text(errors="replace")[-6000:]
