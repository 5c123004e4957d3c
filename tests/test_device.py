from __future__ import annotations

import pytest
import torch

from xtuner_hf.device import data_sheet_flops, device_name, measured_matmul_flops


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
    ],
)
def test_a_card_is_found_by_the_longest_name(name, rate):
    assert data_sheet_flops(name) == rate


def test_a_cpu_has_no_data_sheet_and_is_measured():
    cpu = torch.device("cpu")
    assert data_sheet_flops(device_name(cpu)) is None
    assert 1e8 < measured_matmul_flops(cpu, repeats=1) < 1e15
