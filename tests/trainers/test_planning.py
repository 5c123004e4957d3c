from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests.tiny import build, moe_config
from xtuner_hf import MoETrainingArguments, Qwen3MoeForCausalLM
from xtuner_hf.plan.devices import PlanError
from xtuner_hf.trainers import planning


@pytest.fixture
def on_h100(monkeypatch):
    monkeypatch.setattr(planning, "device_name", lambda device: "NVIDIA H100 80GB HBM3")


@pytest.fixture
def run(tmp_path):
    model = build(Qwen3MoeForCausalLM, moe_config())
    args = MoETrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=True, recompute="full")
    batch = {"input_ids": torch.zeros(1, 96, dtype=torch.int64), "position_ids": torch.arange(32).repeat(3)[None]}
    return model, args, [batch, batch]


def test_a_run_in_the_planners_words(on_h100, run):
    job = planning.job_of_run(*run)
    assert (job.seq_len, job.document_len, job.micro_batch, job.accumulation) == (96, 32, 1, 2)
    assert (job.device.key, job.recompute, job.bf16, job.dtype) == ("h100", "full", True, torch.float32)
    assert job.layout == run[1].parallel_layout


# As README's train.py, nothing stands behind `if __name__ == "__main__"`.
SCRIPT = """
import logging, torch
from tests.tiny import build, moe_config
from xtuner_hf import MoETrainingArguments, Qwen3MoeForCausalLM
from xtuner_hf.trainers import planning

print("the script runs as", __name__)
logging.basicConfig(level=logging.INFO)
planning.device_name = lambda device: "NVIDIA H100 80GB HBM3"
args = MoETrainingArguments(output_dir="out", use_cpu=True, bf16=True, recompute="full")
batch = {"input_ids": torch.zeros(1, 96, dtype=torch.int64), "position_ids": torch.arange(32).repeat(3)[None]}
planning.announce_plan(build(Qwen3MoeForCausalLM, moe_config()), args, [batch, batch])
"""


def test_one_line_at_the_start_and_the_script_runs_once(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "train.py"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout == "the script runs as __main__\n"
    assert [line for line in run.stderr.splitlines() if f"{planning.__name__}:Planned: fits: 3.5 of 79.6 GiB" in line]


def test_a_planner_that_dies_stops_no_run(on_h100, run, caplog, monkeypatch):
    monkeypatch.setattr(planning, "_PLANNER", "raise SystemExit(3)")
    planning.announce_plan(*run)
    assert "This run cannot be planned: the planner's process ended with 3" in caplog.text


def test_a_device_that_the_table_lacks(run, caplog):
    planning.announce_plan(*run)
    assert "'cpu' is not in the planner's table" in caplog.text


def test_shapes_of_rows_with_padding(on_h100, run):
    model, args, _ = run
    batch = {"input_ids": torch.zeros(4, 40, dtype=torch.int64), "attention_mask": torch.ones(4, 40)}
    job = planning.job_of_run(model, args, [batch])
    assert (job.seq_len, job.micro_batch, job.documents) == (40, 4, [40] * 4)
    assert replace(job, micro_batch=1).documents == [40]


def test_gradients_that_stay_whole_are_not_planned(on_h100, run):
    model, args, batches = run
    args.accelerator_config.gradient_accumulation_kwargs = {"sync_each_batch": False}
    with pytest.raises(PlanError, match="sync_each_batch"):
        planning.job_of_run(model, args, batches)
    assert planning.job_of_run(model, args, batches[:1]).accumulation == 1
