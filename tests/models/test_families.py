"""Every family against transformers' own eager implementation, or another reference where that one is wrong."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.families import ALL_FAMILIES, FAMILIES, tokens
from xtuner_hf import AutoModelForCausalLM, IncompleteCheckpointError
from xtuner_hf.models.auto import causal_lm_class
from xtuner_hf.models.kimi_k2.modeling import DeepseekV3ForCausalLM as KimiK2ForCausalLM
from xtuner_hf.moe.router import Router

everywhere = pytest.mark.parametrize("name", ALL_FAMILIES)
with_experts = pytest.mark.parametrize("name", FAMILIES)
LENGTHS = (9, 1, 14)


def logits_and_grads(model, input_ids, **kwargs):
    logits = model(input_ids, use_cache=False, **kwargs).logits
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_same(found: dict, expected: dict, tolerance: float) -> None:
    """Relative to each tensor's largest entry, if that is above 1."""
    assert found.keys() == expected.keys()
    for name in expected:
        error = (found[name] - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1)
        assert error < tolerance, (name, error)


@everywhere
def test_fp64_logits_and_gradients_equal_stock_eager(name):
    stock, ours = ALL_FAMILIES[name].pair()
    expected, expected_grads = logits_and_grads(stock, tokens())
    found, found_grads = logits_and_grads(ours, tokens())
    assert (found - expected).abs().max() < 1e-10
    for parameter, grad in expected_grads.items():
        assert grad.abs().max() > 0, f"{parameter} has no gradient: the case says nothing of it"
    assert_same(found_grads, expected_grads, 1e-10)


@everywhere
def test_fp32_grouped_mm_equals_fp64_but_for_rounding(name):
    family = ALL_FAMILIES[name]
    exact, ours = family.ours(torch.float64, "xtuner_reference"), family.ours()
    expected, expected_grads = logits_and_grads(exact, tokens())
    found, found_grads = logits_and_grads(ours, tokens())
    assert (found - expected).abs().max() < 1e-4
    assert_same(found_grads, expected_grads, 1e-4)


@everywhere
def test_packed_documents_equal_separate_ones(name):
    """Logits and gradients, with the cache left on as it is by default. One document is a single token."""
    ours = ALL_FAMILIES[name].ours(torch.float64, "xtuner_reference")
    documents = [tokens(1, length, seed=length) for length in LENGTHS]
    logits = torch.cat([ours(document, use_cache=False).logits for document in documents], 1)
    logits.square().mean().backward()
    expected = {parameter: p.grad.clone() for parameter, p in ours.named_parameters()}
    ours.zero_grad()
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    packed = ours(torch.cat(documents, 1), position_ids=positions).logits
    packed.square().mean().backward()
    # Attention is fp32 inside where transformers' is.
    assert (packed - logits).abs().max() < 1e-5
    assert_same({parameter: p.grad for parameter, p in ours.named_parameters()}, expected, 1e-6)


@pytest.mark.parametrize(("name", "use_cache"), [("gpt_oss", False), *((name, True) for name in ALL_FAMILIES)])
def test_transformers_own_classes_let_packed_documents_see_each_other(name, use_cache):
    """Why the masks are ours, and why a packed row is compared with separate ones: this fails when they are mended."""
    stock, _ = ALL_FAMILIES[name].pair(torch.float32)
    documents = [tokens(1, length, seed=length) for length in LENGTHS]
    logits = torch.cat([stock(document, use_cache=False).logits for document in documents], 1)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    packed = stock(torch.cat(documents, 1), position_ids=positions, use_cache=use_cache).logits
    assert (packed - logits).abs().max() > 1


@everywhere
def test_padded_rows_equal_rows_without_padding(name):
    ours = ALL_FAMILIES[name].ours()
    row = tokens(1, 11)
    padded = torch.cat([row, torch.zeros(1, 5, dtype=torch.int64)], 1)
    found = ours(padded, attention_mask=(padded != 0).long()).logits[:, :11]
    assert (found - ours(row).logits).abs().max() < 2e-5


@everywhere
def test_chunked_loss_equals_the_loss_over_full_logits(name):
    ours = ALL_FAMILIES[name].ours().train()
    labels = tokens().clone()
    labels[0, :9] = -100
    ours(tokens(), labels=labels).loss.backward()
    expected = {parameter: p.grad.clone() for parameter, p in ours.named_parameters()}
    ours.zero_grad()
    ours(tokens(), labels=labels, chunked_loss=True).loss.backward()
    assert_same({parameter: p.grad for parameter, p in ours.named_parameters()}, expected, 1e-5)


@everywhere
def test_greedy_tokens_equal_stock_eager(name):
    stock, ours = ALL_FAMILIES[name].pair(torch.float32, "xtuner_grouped_mm")
    arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = stock.eval().generate(tokens(1, 6), **arguments)
    assert torch.equal(ours.eval().generate(tokens(1, 6), **arguments), expected)


@everywhere
def test_checkpoints_go_both_ways(name, tmp_path):
    """Ours -> transformers: equal logits. transformers -> ours -> disk: the same tensors again."""
    family = ALL_FAMILIES[name]
    ours = family.ours().eval()
    ours.save_pretrained(tmp_path / "ours")
    experts = {"experts_implementation": "grouped_mm"} if name in FAMILIES else {}
    stock = family.stock_class.from_pretrained(tmp_path / "ours", attn_implementation="eager", **experts)
    assert (stock.eval()(tokens()).logits - ours(tokens()).logits).abs().max() < 2e-5
    stock.save_pretrained(tmp_path / "stock")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again) is causal_lm_class(ours.config)
    assert type(again).__name__ == family.stock_class.__name__ == again.config.architectures[0]
    again.save_pretrained(tmp_path / "again")
    tensors = [load_file(tmp_path / folder / "model.safetensors") for folder in ("ours", "stock", "again")]
    assert tensors[0].keys() == tensors[1].keys() == tensors[2].keys()
    for tensor_name, tensor in tensors[0].items():
        assert torch.equal(tensors[1][tensor_name], tensor)
        assert torch.equal(tensors[2][tensor_name], tensor)


@everywhere
def test_bf16_checkpoints_keep_the_correction_bias_in_fp32(name, tmp_path):
    config = ALL_FAMILIES[name].make_config()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    is_fp32 = {tensor_name.endswith("e_score_correction_bias"): tensor.dtype for tensor_name, tensor in tensors.items()}
    assert is_fp32[False] == torch.bfloat16
    assert is_fp32.get(True, torch.float32) == torch.float32
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert all(buffer.dtype == torch.float32 for buffer in again.buffers())
    assert again(tokens()).logits.isfinite().all()


@everywhere
def test_a_cast_leaves_the_correction_bias_and_the_rotary_frequencies_in_fp32(name):
    """Their values too: a cast there and back would round them."""
    ours = ALL_FAMILIES[name].ours()
    before = {buffer_name: buffer.clone() for buffer_name, buffer in ours.named_buffers()}
    assert len(before) > 1
    ours.to(torch.bfloat16).half().float().bfloat16()
    assert ours.dtype == torch.bfloat16
    for buffer_name, buffer in ours.named_buffers():
        assert torch.equal(buffer, before[buffer_name]), buffer_name
        assert buffer.dtype == torch.float32


@with_experts
def test_router_logits_are_recorded(name):
    ours = ALL_FAMILIES[name].ours()
    found = ours.model(tokens(), output_router_logits=True).router_logits
    assert len(found) == sum(isinstance(module, Router) for module in ours.modules())
    assert all(logits.shape == (48, ours.config.num_local_experts) for logits in found)


def test_kimi_k2_is_read_through_our_configuration(tmp_path):
    ALL_FAMILIES["kimi_k2"].ours().save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(config).__name__ == "KimiK2Config"
    assert config.model_type == "kimi_k2"
    assert config.architectures == ["DeepseekV3ForCausalLM"]
    assert type(KimiK2ForCausalLM.from_pretrained(tmp_path).config) is type(config)


def test_a_checkpoint_that_lacks_an_expert_is_refused(tmp_path):
    ALL_FAMILIES["kimi_k2"].ours().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.mlp.experts.5.down_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IncompleteCheckpointError, match=r"experts\.down_proj \(23, 64, 32\) instead of \(24, 64, 32\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
