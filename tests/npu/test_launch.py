"""`accelerate launch` with the files for Atlas nodes, and `xtuner-hf doctor`, as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from tests import npu_standin
from tests.ranks import REPO
from tests.trainers.scenario import differences, train
from xtuner_hf import doctor

CONFIGS = REPO / "accelerate_configs"


def test_a_node_is_launched_and_trains_as_one_process_does(tmp_path):
    """Two of the eight NPUs: the machine that tests has two cores."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "npu_8.yaml")]
    command += [
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
        "-m",
        "tests.npu.launched",
        str(tmp_path / "run.pt"),
    ]
    environment = npu_standin.program_environment() | {"STANDIN_MAILBOX": str(tmp_path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-4000:]
    found = torch.load(tmp_path / "run.pt", weights_only=False)
    assert found["where"] == ("DistributedType.MULTI_NPU", "npu", "hccl", 2)
    expected = train(dtype=torch.float32, steps=1, experts_kernel="grouped_mm")
    worst = differences(found, expected)
    worst.pop("state")  # AdamW makes steps of lr of rounding errors
    assert max(worst.values()) < 1e-5, worst


@pytest.mark.parametrize(("name", "machines"), [("npu_8.yaml", 1), ("npu_nodes.yaml", 2)])
def test_the_files_are_what_accelerate_reads(name, machines):
    config = load_config_from_file(str(CONFIGS / name))
    assert config.distributed_type == "MULTI_NPU"
    assert (config.num_machines, config.num_processes) == (machines, 8 * machines)
    assert not config.use_cpu


def test_the_doctor_finds_the_npus():
    assert doctor._probe(npu_standin.program_environment()) == {
        "type": "npu",
        "count": 8,
        "name": "Ascend910B1",
        "memory": 8 << 30,
    }
    environment = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    without = doctor._probe(environment | {"PYTHONPATH": str(Path(REPO / "src"))})
    assert "libhccl.so: cannot open shared object file" in without["error"]
