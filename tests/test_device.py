from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest
import torch

import xtuner_hf
from xtuner_hf.device import data_sheet_flops, device_name, kind_of, measured_matmul_flops, with_index

PACKAGE = Path(xtuner_hf.__file__).parent
DEVICE_NAME = re.compile(r"\b(cuda|npu|xpu|mps|hccl|nccl|gloo)\b")


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Ascend910B3", 313e12),
        ("Ascend910_9391", 376e12),
    ],
)
def test_a_card_is_found_by_the_longest_name(name, rate):
    assert data_sheet_flops(name) == rate


def test_a_cpu_has_no_data_sheet_and_is_measured():
    cpu = torch.device("cpu")
    assert data_sheet_flops(device_name(cpu)) is None
    assert 1e8 < measured_matmul_flops(cpu, repeats=1) < 1e15


def named_devices(source: str) -> list[str]:
    """Names of devices and of their collectives in code, and comparisons with "cpu"; what only people read does not
    count: comments and docstrings."""
    found = []
    before = ["", ""]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_docstring = token.type == tokenize.STRING and token.string.startswith('"""')
        if token.type in (tokenize.NAME, tokenize.STRING) and not is_docstring:
            compares = before[-1] in ("==", "!=") and token.string == '"cpu"'
            if compares or DEVICE_NAME.search(token.string):
                found.append(f"line {token.start[0]}: {token.string}")
        if token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT):
            before.append(token.string)
    return found


def test_nothing_but_its_room_names_a_device():
    """And a device's own kernels."""
    kernels = PACKAGE / "kernels"
    rooms = {PACKAGE / "device.py", kernels / "fp8_weights.py"}
    rooms |= {*(kernels / "npu").glob("*.py"), *kernels.glob("triton_*.py")}
    found = {
        str(path.relative_to(PACKAGE)): named_devices(path.read_text())
        for path in PACKAGE.rglob("*.py")
        if path not in rooms
    }
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "code",
    ['x.to("cuda:0")', "torch.npu.synchronize()", 'if device.type == "cpu": pass', 'dist.new_group(backend="gloo")'],
)
def test_a_name_would_be_seen(code):
    assert len(named_devices(code)) == 1


def test_a_kind_that_is_unknown_is_plain_torch():
    assert kind_of("maia").fused is None
    assert kind_of(torch.device("meta")).float64


def test_measuring_the_matrix_rate_draws_no_random_numbers_of_the_run():
    """It did, and GRPO then sampled other answers than TRL from the same seed."""
    before = torch.get_rng_state()
    assert measured_matmul_flops(torch.device("cpu"), repeats=1) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_a_device_without_a_number_is_the_present_one(monkeypatch):
    """Layer inputs on cuda:0 were not offloaded by a store for `cuda`, which is another device to torch."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert with_index(torch.device("cuda")) == torch.device("cuda:3")
    assert with_index(torch.device("cuda:1")) == torch.device("cuda:1")
    assert with_index(torch.device("cpu")) == torch.device("cpu")
