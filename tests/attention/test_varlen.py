"""`xtuner_varlen` as models use it: the same as transformers' masks, packed and padded, with a cache and without."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface

from tests.families import FAMILIES, tokens
from tests.tiny import build, dense_config, moe_config
from xtuner_hf import Qwen3ForCausalLM
from xtuner_hf.attention import varlen
from xtuner_hf.attention.varlen import VARLEN_ATTENTION

LENGTHS = (4, 9, 1, 10)
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
# What masks made by transformers' rules and our trunk give; GPT-OSS's eager softmax is in the model's dtype.
MASKED = {"gpt_oss": "xtuner_sinks"}


def outputs(family: str, attention: str, batch: dict) -> list[torch.Tensor]:
    model = FAMILIES[family].ours(torch.float64, "xtuner_reference", attention).train()
    logits = model(**batch, use_cache=False).logits
    real = batch.get("attention_mask", torch.ones(logits.shape[:2])).bool()
    logits = logits * real[..., None]
    logits.square().mean().backward()
    return [logits, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


BATCHES = {
    "packed": {"input_ids": tokens(2), "position_ids": POSITIONS.expand(2, -1)},
    "padded": {
        "input_ids": tokens(2),
        "attention_mask": torch.tensor([[0] * 3 + [1] * 21, [1] * 17 + [0] * 7]),
    },
}


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_masks(family, kind):
    """fp64 weights; rotary angles and what transformers keeps in fp32 are the same in both."""
    found = outputs(family, VARLEN_ATTENTION, BATCHES[kind])
    expected = outputs(family, MASKED.get(family, "sdpa"), BATCHES[kind])
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 1e-10 * max(1.0, other.abs().max())


def test_it_is_the_default_and_without_packing_the_same_bits_as_transformers_sdpa():
    ours = FAMILIES["qwen3_moe"].ours()
    assert ours.config._attn_implementation == VARLEN_ATTENTION
    found = ours(tokens()).logits
    ours.set_attn_implementation("sdpa")
    assert torch.equal(found, ours(tokens()).logits)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_generation_with_a_cache(family):
    model = FAMILIES[family].ours().eval()
    prompt = {"input_ids": tokens(2, 7), "attention_mask": torch.tensor([[0, 0] + [1] * 5, [1] * 7])}
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    found = model.generate(**prompt, **options)
    model.set_attn_implementation(MASKED.get(family, "sdpa"))
    assert torch.equal(found, model.generate(**prompt, **options))


def test_a_mask_of_ones_own():
    model = FAMILIES["qwen3_moe"].ours()
    mask = torch.ones(24, 24, dtype=torch.bool).tril()[None, None].clone()
    mask[..., 10:, 3] = False
    found = model(tokens(1), attention_mask=mask, use_cache=False).logits
    model.set_attn_implementation("sdpa")
    assert torch.equal(found, model(tokens(1), attention_mask=mask, use_cache=False).logits)


class TestKernelsThatWouldDropPacking:
    @pytest.fixture
    def model(self):
        AttentionInterface.register("no_mask_at_all", AttentionInterface()["sdpa"])
        config = dense_config()
        config._attn_implementation = "no_mask_at_all"
        return build(Qwen3ForCausalLM, config)

    def test_without_masks(self, model):
        with pytest.raises(ValueError, match=r"'no_mask_at_all' would let packed documents.*with 'xtuner_varlen'"):
            model(tokens(1), position_ids=POSITIONS)
        model(tokens(1), position_ids=torch.arange(24)[None])  # not packed

    def test_flash_attention_of_transformers_finds_documents_in_a_single_row(self):
        from xtuner_hf.attention.masks import masks_without_cache

        config = moe_config()
        config._attn_implementation = "flash_attention_2"
        masks_without_cache(config, torch.zeros(1, 24, 8), None, POSITIONS)
        with pytest.raises(ValueError, match=r"'flash_attention_2' would let packed .*in batches of several rows"):
            masks_without_cache(config, torch.zeros(2, 24, 8), None, POSITIONS.expand(2, -1))


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_autocast_chooses_the_kernel_of_its_dtype(family, monkeypatch):
    """RoPE makes fp32 of queries and keys: the kernel for fp32 was chosen, or refused their mixture with values."""
    asked = []

    def choose(device_type, dtype, *rest, original=varlen.choose):
        asked.append(dtype)
        return original(device_type, dtype, *rest)

    monkeypatch.setattr(varlen, "choose", choose)
    model = FAMILIES[family].ours(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        model(**BATCHES["packed"], use_cache=False).logits.float().sum().backward()
    assert set(asked) == {torch.bfloat16}
