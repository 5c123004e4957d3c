"""What goes wrong on NPUs without an error, or only there. Others stand beside what avoids them, in tests/npu/kernels:
the gradient of the grouped product, one local expert, ranks without tokens, histc, contiguity, the compressed mask."""

from __future__ import annotations

import logging

import pytest
import torch

from tests.families import FAMILIES, tokens
from tests.npu.kernels.pairs import DEVICE
from tests.npu.ranks import run_on_npus
from xtuner_hf.memory.recompute import is_attention
from xtuner_hf.moe.router import SigmoidGroupRouter


def test_float64_becomes_float32_and_only_warns():
    """Why a trainer refuses it, and why nothing here computes in it on a device."""
    assert torch.ones(2, device=DEVICE).double().dtype == torch.float32


def test_groups_bound_to_a_device_have_no_meshes_and_no_group_reduces_float64():
    """HCCL cannot split a communicator: `device_id` of init_process_group must stay away."""
    for result in run_on_npus("tests.npu.meshes:make_meshes", 2):
        assert "does not support splitting" in result["bound"]
        assert result["ours"] == "[3.0, 3.0, 3.0]"
        assert "Unsupported data type at::kDouble" in result["float64"]


def test_routers_take_sorted_experts_where_there_are_no_others():
    router = SigmoidGroupRouter(8, 16, 4, num_groups=4, topk_groups=2).to(DEVICE)
    torch.nn.init.normal_(router.weight)
    routing = router(torch.randn(5, 8, device=DEVICE))
    assert torch.equal(routing.weights_TK, routing.weights_TK.sort(dim=1, descending=True).values)


def test_selective_recompute_knows_the_fused_attention():
    assert is_attention(torch.ops.npu.npu_fusion_attention.default)
    assert not is_attention(torch.ops.npu.npu_fusion_attention_grad.default)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_with_a_cache_equal_the_cpu_s(name):
    model = FAMILIES[name].ours().eval()
    arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(tokens(1, 6), **arguments)
    assert torch.equal(model.to(DEVICE).generate(tokens(1, 6).to(DEVICE), **arguments).cpu(), expected)


def test_one_line_says_which_attention_computes(caplog):
    from xtuner_hf.attention import kernels

    kernels.choose.cache_clear()
    with caplog.at_level(logging.INFO, logger=kernels.__name__):
        FAMILIES["qwen3_moe"].ours().to(DEVICE)(tokens().to(DEVICE))
    assert caplog.messages == ["Attention on npu in torch.float32: the device's fused attention."]
