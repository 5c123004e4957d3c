"""Checkpoint folders that are complete or not there: written under another name, renamed when the last byte is on disk.

output_dir/
  incomplete-checkpoint-30/   being written; what a kill leaves behind, the next run removes
  checkpoint-20/              `checkpoint-N` as HF users know them
    checkpoint.json           the marker, written last: facts about the run, and the size of every other file
    dcp/                      the shards of model and optimizer
    ...
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

MARKER = "checkpoint.json"
SHARDS = "dcp"
_INCOMPLETE = "incomplete-"
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(ValueError):
    """A checkpoint that cannot be continued from."""


def fsync(path: Path) -> None:
    """Force a file or a folder's entries onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def incomplete(final: Path) -> Path:
    """Where a checkpoint is until it is complete."""
    return final.with_name(_INCOMPLETE + final.name)


def begin(final: Path) -> Path:
    """An empty folder to write `final` in. Called on one rank."""
    folder = incomplete(final)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def commit(folder: Path, final: Path, facts: dict[str, Any]) -> None:
    """Make what `begin` started a checkpoint: mark, sync, rename. Called on one rank when all have written.

    Args:
        facts: noted in the marker, for whoever continues; JSON values.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    marker = folder / MARKER
    marker.write_text(json.dumps(facts | {"files": sizes}, indent=1) + "\n", encoding="utf-8")
    for path in (*files, marker, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        fsync(path)
    if final.exists():  # the same step of an earlier attempt
        remove(final)
    folder.rename(final)
    fsync(final.parent)


def read_facts(folder: Path) -> dict[str, Any] | None:
    """What `commit` noted, None if the checkpoint is not complete: no marker, or a file missing or cut short."""
    try:
        facts = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        complete = all((folder / name).stat().st_size == size for name, size in facts["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return facts if complete else None


def step_of(folder: Path) -> int:
    """N of a folder named `checkpoint-N`, -1 for another name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest step first."""
    found = [path for path in output_dir.glob("checkpoint-*") if step_of(path) >= 0 and read_facts(path) is not None]
    return sorted(found, key=step_of)


def remove(folder: Path) -> None:
    """Delete a checkpoint. It stops being one before its first file goes."""
    doomed = folder.with_name(_INCOMPLETE + folder.name + ".old")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def keep_newest(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `limit` (None or 0: keep all); the best and the newest always stay."""
    checkpoints = complete_checkpoints(output_dir)
    if not limit or len(checkpoints) <= limit:
        return
    protected = {checkpoints[-1].resolve()} | ({Path(best).resolve()} if best else set())
    excess = len(checkpoints) - max(limit, len(protected))
    for folder in [path for path in checkpoints if path.resolve() not in protected][: max(excess, 0)]:
        remove(folder)


def remove_incomplete(output_dir: Path) -> None:
    """Delete what killed runs left behind."""
    for folder in output_dir.glob(f"{_INCOMPLETE}checkpoint-*"):
        shutil.rmtree(folder, ignore_errors=True)
