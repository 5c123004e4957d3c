"""What a run leaves for people: its history, the progress line and the figure."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from xtuner_hf.trainers.figure import draw_training
from xtuner_hf.trainers.history import HISTORY_FILE, HistoryCallback, read_history
from xtuner_hf.trainers.progress import ProgressLineCallback, format_duration


def state(step: int = 0, rank: int = 0) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, max_steps=100, is_world_process_zero=rank == 0)


def write_run(folder, steps: int, start: int = 0, rank: int = 0) -> None:
    args, callback = SimpleNamespace(output_dir=str(folder)), HistoryCallback()
    callback.on_train_begin(args, state(start, rank), None)
    for step in range(start + 1, start + steps + 1):
        callback.record_load(torch.tensor([[4, 4, 0, 8], [4, 4, 4, 4]]))
        logs = {"loss": 10.0 / step, "tokens_per_second": 1000.0, "mfu": 0.1}
        callback.on_log(args, state(step, rank), None, logs=logs)
    callback.on_log(args, state(start + steps, rank), None, logs={"eval_loss": 3.0})


def test_history_holds_logs_and_relative_load(tmp_path):
    write_run(tmp_path, 2)
    entries = read_history(tmp_path / HISTORY_FILE)
    assert [entry["step"] for entry in entries] == [1, 2, 2]
    assert entries[1]["load"] == [[1.0, 1.0, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0]]
    assert "load" not in entries[2]


def test_history_of_a_resumed_run_drops_what_the_resumed_run_does_again(tmp_path):
    write_run(tmp_path, 5)
    write_run(tmp_path, 2, start=3)
    assert [entry["step"] for entry in read_history(tmp_path / HISTORY_FILE)] == [1, 2, 3, 4, 5, 5]


def test_a_kill_while_a_resumed_run_drops_entries_loses_none(tmp_path, monkeypatch):
    """The old file stays until the new one is complete."""
    write_run(tmp_path, 5)
    before = read_history(tmp_path / HISTORY_FILE)

    def killed(*_, **__):
        raise KeyboardInterrupt

    for moment in ("write_text", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, moment, killed)
            with pytest.raises(KeyboardInterrupt):
                write_run(tmp_path, 2, start=3)
        assert read_history(tmp_path / HISTORY_FILE) == before


def test_a_history_that_a_kill_cut_short_is_read_up_to_there(tmp_path):
    (tmp_path / HISTORY_FILE).write_text(json.dumps({"step": 1, "loss": 2.0}) + '\n{"step": 2, "lo')
    assert read_history(tmp_path / HISTORY_FILE) == [{"step": 1, "loss": 2.0}]


def test_only_rank_0_writes(tmp_path):
    write_run(tmp_path, 2, rank=1)
    assert list(tmp_path.iterdir()) == []


def test_figure_shows_red_where_an_expert_is_overloaded_and_blue_where_idle(tmp_path):
    write_run(tmp_path, 20)
    draw_training(tmp_path / HISTORY_FILE, tmp_path / "training.png")
    image = Image.open(tmp_path / "training.png").convert("RGB")
    colours = {colour for count, colour in image.getcolors(1 << 24) if count > 2000}
    assert any(red > 200 and blue < 150 for red, _, blue in colours), "no overloaded expert in the picture"
    assert any(blue > 90 and red < 50 for red, _, blue in colours), "no idle expert in the picture"


def test_figure_of_a_dense_model_has_no_map_and_an_empty_history_no_figure(tmp_path):
    (tmp_path / HISTORY_FILE).write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    draw_training(tmp_path / HISTORY_FILE, tmp_path / "dense.png")
    assert Image.open(tmp_path / "dense.png").height < 700
    draw_training(tmp_path / "nothing.jsonl", tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()


def test_progress_line_reads_well(capsys):
    callback = ProgressLineCallback()
    callback.on_train_begin(None, state(0), None)
    logs = {"loss": 5.3117, "tokens_per_second": 4210.4, "mfu": 0.1123}
    load = {"router/max_vio": 0.3, "router/max_vio_worst_layer": 0.8, "router/dead_experts": 2.0}
    callback.on_log(None, state(50), None, logs=logs | load)
    callback.on_log(None, state(50, rank=1), None, logs=logs)
    callback.on_log(None, state(50), None, logs={"eval_loss": 4.0})
    assert capsys.readouterr().out.splitlines() == [
        "step 50/100 (50 %) | loss 5.312 | 4,210 tokens/s | MFU 11.2 % | experts: busiest 1.8x even, 2 idle | 0 s left",
        "step 50/100 | held-out loss 4.000",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(45.2, "45 s"), (130, "2 min 10 s"), (11100, "3 h 05 min"), (float("nan"), "unknown time")]
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text
