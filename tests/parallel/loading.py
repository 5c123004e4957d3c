"""Loads a checkpoint sharded, on the ranks of a job, and measures the memory that it takes."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from tests.trainers.scenario import full
from xtuner_hf import Qwen3MoeForCausalLM
from xtuner_hf.parallel.layout import ParallelLayout


class PeakMemory:
    """Growth of the process's own memory (not of file pages, which the system may drop) inside the `with`, in bytes."""

    def __enter__(self):
        self._start, self.peak = self._now(), 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.001):
            self.peak = max(self.peak, self._now() - self._start)

    @staticmethod
    def _now() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("no RssAnon in /proc/self/status")


def load(folder: str, layouts: list[dict], compare: bool = True) -> list[dict]:
    """What each rank holds of the checkpoint under each layout, and the peak of host memory while loading."""
    world_size = int(os.environ["WORLD_SIZE"])
    results = []
    for sizes in layouts:
        layout = ParallelLayout(world_size=world_size, ranks_per_node=world_size, **sizes)
        with PeakMemory() as memory:
            model = Qwen3MoeForCausalLM.from_pretrained(
                folder, dtype=torch.float32, distributed_config=layout.distributed_config()
            )
        local = sum(p.to_local().numel() * p.element_size() for p in model.parameters())
        placements = {n: str(p.placements) for n, p in model.named_parameters() if isinstance(p, DTensor)}
        results.append(
            {
                "peak": memory.peak,
                "shard": local,
                "placements": placements,
                "state": {n: full(p).float() for n, p in model.state_dict().items()} if compare else {},
            }
        )
    return results
