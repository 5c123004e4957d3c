"""`xtuner-hf doctor` on machines of all kinds: this one, and ones that are made up."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from xtuner_hf import doctor
from xtuner_hf.doctor import Machine, findings

ASCEND, NVIDIA = "/dev/davinci_manager", "/dev/nvidiactl"
NO_ACCELERATOR = {"type": "cpu", "count": 0}
NPUS = {"type": "npu", "count": 8, "name": "Ascend910B2", "memory": 64 * 2**30}


def machine(found: dict, *files: str, environment: dict | None = None, **versions: str | None) -> Machine:
    given = {name.replace("_", "-"): version for name, version in versions.items()}
    return Machine(
        lambda name: given[name] if name in given else doctor._version(name),
        lambda: found,
        lambda path: path in files,
        environment or {},
    )


def said(*arguments, **options) -> list[str]:
    return [f"{line.state}: {line.text}" for line in findings(machine(*arguments, **options))]


def test_this_machine():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", "from xtuner_hf.cli import main; main(['doctor'])"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "ok       torch 2." in run.stdout
    assert run.stdout.endswith("Ready to train.\n")


def test_a_cpu_is_enough():
    lines = said(NO_ACCELERATOR)
    assert len(lines) == 2
    assert lines[1].startswith("ok: no accelerator")


def test_a_package_that_is_missing_or_of_another_version():
    lines = said(NO_ACCELERATOR, trl=None, peft="0.1")
    assert 'missing: trl not installed: pip install "trl<1.17,>=1.16"' in lines
    assert 'missing: peft is 0.1: pip install "peft<0.22,>=0.21"' in lines
    assert said(NO_ACCELERATOR, torch=None)[0].startswith("missing: torch not installed")


def test_npus():
    lines = said(NPUS, ASCEND, torch="2.13.0", torch_npu="2.13.0")[1:]
    assert lines[0] == (
        "ok: 8 x Ascend910B2 (npu), 64 GiB each, 376 TFLOP/s in bf16 by its data sheet; collectives: hccl"
    )
    assert lines[2] == "ok: torch-npu 2.13.0 fits torch 2.13.0"
    assert not any(line.startswith("missing") for line in lines)


def test_npus_that_torch_does_not_see():
    lines = said(NO_ACCELERATOR, ASCEND, torch="2.13.0+cpu", torch_npu=None)
    assert 'missing: torch-npu is not installed: pip install "torch-npu==2.13.*"' in lines
    assert any(line.startswith("missing: ASCEND_HOME_PATH is not set, which says where CANN is") for line in lines)


def test_a_plugin_of_another_release():
    lines = said(NPUS, ASCEND, torch="2.13.0", torch_npu="2.12.0.post3")
    assert 'missing: torch-npu 2.12.0.post3 beside torch 2.13.0: pip install "torch-npu==2.13.*"' in lines


def test_a_plugin_without_its_runtime():
    """The trap: with torch_npu installed and no CANN, `import torch` itself fails."""
    error = {"error": "RuntimeError: Failed to load the backend extension: torch_npu."}
    lines = said(error, torch="2.13.0", torch_npu="2.13.0", environment={"ASCEND_HOME_PATH": "/nowhere"})
    assert "missing: `import torch` fails: RuntimeError: Failed to load the backend extension: torch_npu." in lines
    assert any("ASCEND_HOME_PATH is /nowhere, which is not there" in line for line in lines)
    assert any("`pip uninstall torch-npu`, or set TORCH_DEVICE_BACKEND_AUTOLOAD=0" in line for line in lines)


@pytest.mark.parametrize(
    ("versions", "expected"), [({}, "torch itself"), ({"flash_attn": "2.8"}, "packed attention by flash-attn")]
)
def test_gpus(versions, expected):
    found = {"type": "cuda", "count": 2, "name": "NVIDIA H100 80GB HBM3", "memory": 80 * 2**30}
    lines = said(found, NVIDIA, **versions)
    assert any(expected in line for line in lines)
    assert any("2 x NVIDIA H100" in line and "collectives: nccl" in line for line in lines)


def test_gpus_that_torch_does_not_see():
    assert any("torch does not see the cuda devices" in line for line in said(NO_ACCELERATOR, NVIDIA))


def test_a_process_that_crashes_is_reported(monkeypatch):
    monkeypatch.setattr(doctor, "_PROBE", "import os; os.abort()")
    assert doctor._probe(dict(os.environ))["error"].startswith("the process ended with -")
    monkeypatch.setattr(doctor, "_PROBE", "raise RuntimeError('libhccl.so: cannot open')")
    assert doctor._probe(dict(os.environ)) == {"error": "RuntimeError: libhccl.so: cannot open"}
