"""`history.jsonl` in the output folder: what was logged, step by step, and the load of every expert.

One line a log: {"step": 20, "loss": 3.1, ..., "load": [[1.02, 0.97, ...], ...]} where `load[layer][expert]` is the
expert's share of the step's tokens divided by an even share.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..checkpoint.folder import fsync

HISTORY_FILE = "history.jsonl"


class HistoryCallback(TrainerCallback):
    """Writes the file on rank 0; a resumed run goes on after the step that it resumed from."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._load: list[list[float]] | None = None

    def record_load(self, load_LE: torch.Tensor) -> None:
        """Note the load [L, E] (token, expert) pairs that belongs to the next log."""
        even_L1 = load_LE.double().mean(-1, keepdim=True).clamp(min=1e-9)
        self._load = [[round(value, 2) for value in row] for row in (load_LE / even_L1).tolist()]

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self._path = Path(args.output_dir) / HISTORY_FILE
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = [entry for entry in read_history(self._path) if entry["step"] <= state.global_step]
        # A kill leaves the old file or the new one.
        new = self._path.with_name(f"{HISTORY_FILE}.incomplete")
        new.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
        fsync(new)
        new.replace(self._path)

    def on_log(self, args, state, control, logs=None, **kwargs):
        load, self._load = self._load, None
        if self._path is None or not logs:
            return
        entry = {"step": state.global_step, **logs} | ({} if load is None else {"load": load})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def read_history(path: Path) -> list[dict[str, Any]]:
    """The entries of a history file, oldest first; none if there is no such file.

    A last line that a kill cut short is left out.
    """
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries
