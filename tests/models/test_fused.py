"""Fused norms and compiled blocks: the same parameters, the same results."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from tests.families import ALL_FAMILIES, tokens
from xtuner_hf.models.fp8 import use_fp8
from xtuner_hf.models.fused import FusedRMSNorm, compile_blocks, fuse_norms
from xtuner_hf.moe.block import SparseMoEBlock


def step(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    positions = torch.arange(24).repeat(2, 1)
    positions[:, 10:] -= 10  # two documents a row
    loss = model.train()(input_ids=tokens(), labels=tokens(), position_ids=positions, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_fused_norms_compute_the_same(name):
    model = ALL_FAMILIES[name].ours()
    names, before = list(model.state_dict()), step(model)
    count = fuse_norms(model)
    norms = [path for path, module in model.named_modules() if path.endswith("norm")]
    assert count == len(norms) == sum(isinstance(module, FusedRMSNorm) for module in model.modules())
    assert list(model.state_dict()) == names
    for key, value in step(model).items():
        torch.testing.assert_close(value, before[key], rtol=1e-3, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")
    assert fuse_norms(model) == 0, "a second time changes nothing"


def test_a_fused_norm_keeps_the_dtype_under_autocast():
    model = ALL_FAMILIES["qwen3_moe"].ours()
    fuse_norms(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.model.norm(torch.randn(2, 64).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "fp8"), [("qwen3_moe", True), ("deepseek_v3", False)])
def test_compiled_blocks_compute_the_same(name, fp8):
    torch._dynamo.reset()
    model = ALL_FAMILIES[name].ours()
    if fp8:
        use_fp8(model, torch.device("cpu"))
    names, before = list(model.state_dict()), step(model)
    compiled = compile_blocks(model, backend="aot_eager")
    modules = dict(model.named_modules())
    assert not any(isinstance(modules[path], SparseMoEBlock) for path in compiled)
    assert sum(path.endswith("self_attn") for path in compiled) == len(model.model.layers)
    assert list(model.state_dict()) == names
    for key, value in step(model).items():
        # FP8 turns differences of the last bit into ones of its own here and there.
        assert (value - before[key]).norm() <= (0.02 if fp8 else 2e-4) * before[key].norm(), key


def test_layers_share_what_is_compiled_and_lengths_do_too():
    torch._dynamo.reset()
    counters.clear()
    model = ALL_FAMILIES["qwen3_moe"].ours(num_hidden_layers=10, mlp_only_layers=[])
    compile_blocks(model, backend="aot_eager")
    graphs = []
    for length in (24, 16, 20, 12):
        ids = tokens(2, length)
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        graphs.append(counters["stats"]["unique_graphs"])
    # A norm, and attention before and after its kernel; once more when the first other length comes.
    assert graphs == [3, 6, 6, 6]
