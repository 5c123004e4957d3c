"""That the stand-in is the real torch_npu where it says so, and strict where an NPU is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch_npu

DEVICE = torch.device("npu:0")


def test_the_device_layer_is_torch_npus_own():
    assert torch.npu.device_count() == 8
    assert torch.accelerator.current_accelerator().type == "npu"
    before = torch.npu.memory_allocated()
    tensor = torch.empty(1 << 20, device=DEVICE)
    assert torch.npu.memory_allocated() - before >= tensor.nbytes
    with pytest.raises(torch.OutOfMemoryError, match="NPU out of memory"):
        torch.empty(1 << 34, dtype=torch.uint8, device=DEVICE)


def test_random_numbers_follow_the_generators_state():
    torch.npu.manual_seed(1)
    state = torch.npu.get_rng_state()
    first, second = torch.rand(5, device=DEVICE), torch.rand(5, device=DEVICE)
    assert not torch.equal(first, second)
    torch.npu.set_rng_state(state)
    assert torch.equal(torch.rand(5, device=DEVICE), first)


def test_streams_and_events_order_work_and_measure_time():
    stream, start, end = torch.npu.Stream(), *(torch.npu.Event(enable_timing=True) for _ in range(2))
    with torch.npu.stream(stream):
        start.record()
        tensor = torch.ones(4, device=DEVICE) * 2
        end.record()
    torch.npu.current_stream().wait_stream(stream)
    assert tensor.sum().item() == 8
    assert start.elapsed_time(end) >= 0


def test_operators_give_views_in_place_results_and_copies_as_on_a_cpu():
    x = torch.arange(12.0).view(3, 4)
    for function in (
        lambda t: t.t()[1:],
        lambda t: t.clone().mul_(2),
        lambda t: t[:, ::2] + 1,
        lambda t: torch.stack([t, t]).sum(0),
        lambda t: t.sort(dim=1, descending=True).values,
        lambda t: torch.where(t > 3, t, 0),
        lambda t: torch.cat(t.split([1, 3], dim=1), dim=1),
        lambda t: torch.add(t, 1, out=torch.empty(0, device=t.device)),
    ):
        assert torch.equal(function(x.to(DEVICE)).cpu(), function(x))


def test_torchs_attention_goes_to_the_fused_operator(calls):
    q, k, v = (torch.randn(2, 4, 6, 8, requires_grad=True) for _ in range(3))
    on_npu = [tensor.detach().to(DEVICE).requires_grad_() for tensor in (q, k, v)]
    output = F.scaled_dot_product_attention(*on_npu, is_causal=True)
    assert "NpuFusionAttention" in str(output.grad_fn)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(output.cpu(), expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in zip(on_npu, (q, k, v), strict=True):
        torch.testing.assert_close(ours.grad.cpu(), theirs.grad)
    assert calls["npu_fusion_attention_v3"] == calls["npu_fusion_attention_grad_v3"] == 1


def test_an_operator_without_an_npu_kernel_is_an_error():
    with pytest.raises(RuntimeError, match="CPU fallback is disabled"):
        torch.linalg.ldl_factor(torch.eye(3, device=DEVICE))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: x.topk(2, sorted=False), "topk"),
        (lambda x: torch.histc(x.long(), 4), "histc of integers"),
        (lambda x: x.to(torch.float8_e4m3fn), "float8"),
        (lambda x: torch_npu.npu_swiglu(x.t()), "non-contiguous"),
        (lambda x: torch_npu.npu_swiglu(x[:0]), "empty"),
    ],
)
def test_documented_restrictions_are_errors(call, message):
    with pytest.raises(RuntimeError, match=f"NPU restriction: .*{message}"):
        call(torch.ones(4, 6, device=DEVICE))
