"""A checkpoint folder is complete or no checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from xtuner_hf.checkpoint.folder import (
    MARKER,
    begin,
    commit,
    complete_checkpoints,
    keep_newest,
    read_facts,
    remove_incomplete,
)


def write(output_dir: Path, step: int, text: str = "weights") -> Path:
    final = output_dir / f"checkpoint-{step}"
    folder = begin(final)
    (folder / "dcp").mkdir()
    (folder / "dcp" / "shard").write_text(text)
    commit(folder, final, {"step": step})
    return final


def names(output_dir: Path) -> list[str]:
    return [path.name for path in complete_checkpoints(output_dir)]


def test_it_appears_when_it_is_complete(tmp_path):
    final = tmp_path / "checkpoint-3"
    folder = begin(final)
    (folder / "shard").write_text("weights")
    assert names(tmp_path) == []
    assert not final.exists()
    commit(folder, final, {"step": 3})
    assert names(tmp_path) == ["checkpoint-3"]
    assert not folder.exists()
    assert read_facts(final) == {"step": 3, "files": {"shard": 7}}


@pytest.mark.parametrize("damage", ["marker gone", "marker cut short", "file gone", "file cut short"])
def test_a_damaged_one_does_not_count(damage, tmp_path):
    write(tmp_path, 3)
    path = write(tmp_path, 10) / (MARKER if "marker" in damage else "dcp/shard")
    path.unlink() if "gone" in damage else path.write_text(path.read_text()[:3])
    assert names(tmp_path) == ["checkpoint-3"]


def test_newest_by_number_and_not_by_name(tmp_path):
    for step in (9, 10, 2):
        write(tmp_path, step)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-9", "checkpoint-10"]


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (None, None, [1, 2, 3, 4]),
        (2, None, [3, 4]),
        (2, 1, [1, 4]),
        (1, 1, [1, 4]),
        (1, 4, [4]),
        (9, None, [1, 2, 3, 4]),
    ],
)
def test_the_newest_and_the_best_stay(limit, best, kept, tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    keep_newest(tmp_path, limit, best and str(tmp_path / f"checkpoint-{best}"))
    assert names(tmp_path) == [f"checkpoint-{step}" for step in kept]
    assert sorted(path.name for path in tmp_path.iterdir()) == names(tmp_path)


def test_the_same_step_again_replaces(tmp_path):
    write(tmp_path, 3, "old")
    final = write(tmp_path, 3, "new")
    assert (final / "dcp" / "shard").read_text() == "new"
    assert names(tmp_path) == ["checkpoint-3"]


def test_what_a_kill_left_is_removed(tmp_path):
    write(tmp_path, 3)
    begin(tmp_path / "checkpoint-6")
    (tmp_path / "incomplete-checkpoint-1.old").mkdir()
    remove_incomplete(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
