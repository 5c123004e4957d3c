"""The fused MoE path, which computes its own gradients, against autograd through one product per expert."""

from __future__ import annotations

import logging

import pytest
import torch

from tests.kernels.layers import EXPERTS, HIDDEN, ROUTINGS, make_experts, step
from xtuner_hf.kernels import rows, select
from xtuner_hf.moe.experts import expert_weights, run_experts


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("kind", ["swiglu", "gpt_oss"])
def test_equals_autograd_in_fp64(kind, routing):
    experts = make_experts(kind)
    reference, ours = (step(kernel, experts, ROUTINGS[routing]) for kernel in ("reference", "fused"))
    assert ours.keys() == reference.keys()
    for name, expected in reference.items():
        torch.testing.assert_close(
            ours[name], expected, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("kind", ["swiglu", "gpt_oss"])
def test_bf16_is_as_close_to_fp64_as_the_step_by_step_path(kind):
    routing = ROUTINGS["many"]
    exact = step("reference", make_experts(kind), routing)
    halves = make_experts(kind, torch.bfloat16)
    stepwise, ours = (step(kernel, halves, routing, torch.bfloat16) for kernel in ("grouped_mm", "fused"))
    for name, expected in exact.items():
        errors = [((run[name].double() - expected).norm() / expected.norm()).item() for run in (stepwise, ours)]
        assert errors[1] < max(1.1 * errors[0], 2e-3), (name, errors)


def test_frozen_parts_get_no_gradient_and_change_none_of_the_others():
    experts = make_experts("gpt_oss")
    whole = step("fused", experts, ROUTINGS["random"])
    experts.gate_up_proj.requires_grad_(False)
    experts.down_proj_bias.requires_grad_(False)
    partly = step("fused", experts, ROUTINGS["random"])
    assert set(whole) - set(partly) == {"gate_up_proj", "down_proj_bias"}
    for name, value in partly.items():
        assert torch.equal(value, whole[name]), name


def test_gradients_lie_as_their_parameters_do():
    for kind in ("swiglu", "gpt_oss"):
        experts = make_experts(kind)
        step("fused", experts, ROUTINGS["random"])
        for name, parameter in experts.named_parameters():
            assert parameter.grad.stride() == parameter.stride(), name


def test_keeps_the_tokens_and_one_projection_of_rows():
    experts, ids_TK = make_experts("swiglu", torch.float32), ROUTINGS["many"]
    parameters = {parameter.untyped_storage().data_ptr() for parameter in experts.parameters()}

    def kept(kernel: str) -> int:
        sizes: dict[int, int] = {}
        hidden_TH = torch.randn(len(ids_TK), HIDDEN, requires_grad=True)
        weights_TK = torch.rand(ids_TK.shape, requires_grad=True)

        def note(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = run_experts(kernel, experts, hidden_TH, ids_TK, weights_TK)
        assert output.requires_grad
        return sum(sizes.values())

    tokens, top_k = ids_TK.shape
    values = tokens * HIDDEN + tokens * top_k * experts.gate_up_proj.shape[1]
    indices = 2 * 4 * tokens * top_k + (8 + 4) * tokens * top_k  # both orders; the ids and weights of the router
    assert kept("fused") == 4 * values + indices + 4 * EXPERTS
    assert kept("fused") < 0.45 * kept("grouped_mm")


def test_under_autocast_products_run_in_its_dtype():
    experts, ids_TK = make_experts("swiglu", torch.float32), ROUTINGS["random"]
    hidden_TH, weights_TK = torch.randn(len(ids_TK), HIDDEN), torch.rand(ids_TK.shape)
    with torch.autocast("cpu", torch.bfloat16):
        output_TH = run_experts("fused", experts, hidden_TH, ids_TK, weights_TK)
    assert output_TH.dtype == torch.bfloat16
    halves = make_experts("swiglu", torch.bfloat16)
    assert torch.equal(output_TH, run_experts("fused", halves, hidden_TH.bfloat16(), ids_TK, weights_TK))


def test_refuses_what_it_does_not_know():
    experts = make_experts("swiglu")
    experts.act_fn = torch.nn.GELU()
    with pytest.raises(ValueError, match="activation is none of the SwiGLU family"):
        step("fused", experts, ROUTINGS["random"])
    reference, auto = (
        step(kernel, experts.float(), ROUTINGS["random"], torch.float32) for kernel in ("grouped_mm", "auto")
    )
    assert torch.equal(auto["output"], reference["output"])


def test_auto_says_what_it_took_and_why(caplog, monkeypatch):
    monkeypatch.setattr(select, "has_triton", lambda: True)
    select.choose_experts_kernel.cache_clear()
    with caplog.at_level(logging.INFO, "xtuner_hf"):
        assert select.choose_experts_kernel("cpu", torch.bfloat16, (2048, 768), None) == "grouped_mm"
        assert select.choose_experts_kernel("cuda", torch.bfloat16, (2048, 768), "they have adapters") == "grouped_mm"
    assert "Experts on cpu in torch.bfloat16: grouped_mm (the device is cpu)." in caplog.text
    assert "grouped_mm (they have adapters)" in caplog.text
    select.choose_experts_kernel.cache_clear()


def test_auto_on_a_gpu(monkeypatch):
    select.choose_experts_kernel.cache_clear()
    monkeypatch.setattr(select, "has_triton", lambda: True)
    assert select.choose_experts_kernel("cuda", torch.bfloat16, (2048, 768), None) == "fused"
    assert select.choose_experts_kernel("cuda", torch.bfloat16, (2048, 770), None) == "grouped_mm"
    assert select.choose_experts_kernel("cuda", torch.float32, (2048, 768), None) == "grouped_mm"
    select.choose_experts_kernel.cache_clear()


@pytest.mark.parametrize("align", [1, 4])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_grouping(routing, align):
    ids_TK = ROUTINGS[routing]
    grouping = rows.group_by_expert(ids_TK, EXPERTS, align)
    ids_R, begin, seen = ids_TK.reshape(-1), 0, []
    for expert, end in enumerate(grouping.offsets_E.tolist()):
        slots = [slot for slot in grouping.slot_of_row_R[begin:end].tolist() if slot >= 0]
        assert begin % align == end % align == 0
        assert slots == (ids_R == expert).nonzero()[:, 0].tolist(), "in the order of the tokens"
        assert end - begin == -(-len(slots) // align) * align
        begin, seen = end, seen + slots
    assert sorted(seen) == list(range(ids_R.numel()))
    assert (grouping.slot_of_row_R[begin:] == -1).all()
    back_R = grouping.slot_of_row_R[grouping.row_of_slot_TK.reshape(-1)]
    assert back_R.tolist() == list(range(ids_R.numel()))


@torch.no_grad()
def test_padding_takes_part_in_nothing():
    experts, ids_TK = make_experts("gpt_oss"), ROUTINGS["random"]
    weights, weights_TK = expert_weights(experts), torch.rand(ids_TK.shape, dtype=torch.float64)
    results = []
    for align in (1, 8):
        grouping = rows.group_by_expert(ids_TK, EXPERTS, align)
        generator = torch.Generator().manual_seed(0)
        by_slot_RF = torch.randn(ids_TK.numel(), 32, generator=generator, dtype=torch.float64)
        # What lies in rows of padding may be anything.
        gate_up_RF = by_slot_RF.new_full((grouping.slot_of_row_R.numel(), 32), torch.nan)
        gate_up_RF[grouping.row_of_slot_TK.reshape(-1)] = by_slot_RF
        arguments = (gate_up_RF, weights.gate_up_bias_EF, ids_TK, weights_TK, grouping, weights.swiglu)
        gated_RI = rows.gate(*arguments)
        again_RI, grad_RF, grad_weights_TK = rows.gate_backward(gated_RI.clone(), *arguments)
        assert torch.equal(gated_RI, again_RI)
        padding = grouping.slot_of_row_R < 0
        assert (gated_RI[padding] == 0).all()
        assert (grad_RF[padding] == 0).all()
        bias_grad = rows.segment_sum(grad_RF, grouping.offsets_E)
        results.append(
            (rows.sum_slots(gated_RI, grouping), rows.sum_slots(grad_RF, grouping), grad_weights_TK, bias_grad)
        )
    for plain, padded in zip(*results, strict=True):
        torch.testing.assert_close(plain, padded, rtol=1e-13, atol=1e-13)
