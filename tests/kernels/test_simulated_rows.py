"""What stands for the Triton kernels in a dry run has their shapes, dtypes and layouts, and no values."""

from __future__ import annotations

import pytest
import torch

from xtuner_hf.device import acting_as
from xtuner_hf.kernels import rows, select, simulated_rows
from xtuner_hf.kernels.swiglu import SwiGLU


def steps(module, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Everything that the functions of a module return for five tokens, two of three experts each."""
    x_TH, ids_TK, weights_TK = torch.ones(5, 8, dtype=dtype), torch.tensor([[0, 2]] * 5), torch.ones(5, 2)
    grouping = module.group_by_expert(ids_TK, 3)
    x_RH = module.take(x_TH, grouping)
    gate_up_RF = module.grouped_mm(x_RH, torch.ones(3, 8, 32, dtype=dtype), grouping.offsets_E)
    bias_EF = torch.ones(3, 32, dtype=dtype)
    gate = (gate_up_RF, bias_EF, ids_TK, weights_TK, grouping, SwiGLU())
    grad_RI = torch.ones(10, 16, dtype=dtype)
    backward = module.gate_backward(grad_RI, *gate)
    return {
        **grouping._asdict(),
        "take": x_RH,
        "grouped_mm": gate_up_RF,
        "grouped_outer": module.grouped_outer(x_RH, gate_up_RF, grouping.offsets_E),
        "gate": module.gate(*gate),
        **{f"gate_backward {place}": tensor for place, tensor in enumerate(backward)},
        "sum_slots": module.sum_slots(x_RH, grouping),
        "sum_slots on top": module.sum_slots(x_RH, grouping, torch.ones(5, 8)),
        "segment_sum": module.segment_sum(gate_up_RF, grouping.offsets_E),
    }


def test_results_are_alike():
    expected, simulated = steps(rows), steps(simulated_rows)
    for name, tensor in expected.items():
        found = simulated[name]
        assert (found.shape, found.dtype, found.stride()) == (tensor.shape, tensor.dtype, tensor.stride()), name


@pytest.mark.parametrize(
    ("kind", "module", "kernel"),
    [("cuda", simulated_rows, "fused"), ("npu", rows, "grouped_mm"), ("cpu", rows, "grouped_mm")],
)
def test_a_dry_run_takes_the_way_of_the_device_that_it_acts_as(kind, module, kernel):
    with acting_as(kind):
        assert select.row_kernels(torch.device("cpu")) is module
    assert select.choose_experts_kernel(kind, torch.bfloat16, (64, 64), None, simulated=True) == kernel
    assert select.row_kernels(torch.device("cpu")) is rows
