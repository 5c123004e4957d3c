"""Which kernel is chosen, and what it is called with; no GPU is needed for either."""

from __future__ import annotations

import logging

import pytest
import torch

from xtuner_hf.attention import kernels
from xtuner_hf.attention.by_document import attention_by_document
from xtuner_hf.attention.documents import Documents

DOCUMENTS = Documents(torch.tensor([0, 3, 5], dtype=torch.int32))


@pytest.fixture(autouse=True)
def forget_choices():
    kernels.choose.cache_clear()
    yield
    kernels.choose.cache_clear()


def install(monkeypatch, *versions: int) -> None:
    for version in (2, 3, 4):
        monkeypatch.setattr(kernels, f"is_flash_attn_{version}_available", lambda found=version in versions: found)


def chosen(caplog, device="cuda", dtype=torch.bfloat16, head_size=128, sinks=False, dropout=False) -> str:
    with caplog.at_level(logging.INFO, logger=kernels.__name__):
        kernels.choose(device, dtype, head_size, sinks, dropout)
        kernels.choose(device, dtype, head_size, sinks, dropout)
    assert len(caplog.messages) == 1  # said once
    return caplog.messages[0].removesuffix(".").split(": ")[1]


@pytest.mark.parametrize(
    ("installed", "asked", "expected"),
    [
        ((), {}, "torch.nn.attention.varlen"),
        ((2,), {}, "flash_attention_2"),
        ((2, 3, 4), {}, "flash_attention_4"),
        ((2, 3), {"sinks": True}, "torch's flash attention, with sinks"),
        ((4,), {"sinks": True}, "flash_attention_4"),
        ((4,), {"dtype": torch.float32}, "document by document, scaled_dot_product_attention"),
        ((4,), {"head_size": 512}, "document by document, scaled_dot_product_attention"),
        ((4,), {"dropout": True}, "document by document, scaled_dot_product_attention"),
        ((4,), {"device": "cpu"}, "document by document, scaled_dot_product_attention"),
        ((), {"device": "npu"}, "the device's fused attention"),
        (
            (2,),
            {"device": "npu", "dtype": torch.float32, "dropout": True, "sinks": True},
            "the device's fused attention",
        ),
        ((), {"device": "npu", "head_size": 1024}, "document by document, scaled_dot_product_attention"),
    ],
)
def test_choice(monkeypatch, caplog, installed, asked, expected):
    install(monkeypatch, *installed)
    assert chosen(caplog, **asked) == expected


def inputs(v_size: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((5, 4, 8), (5, 2, 8), (5, 2, v_size))]


def test_flash_attention_gets_boundaries_and_a_window_of_exactly_n_keys(monkeypatch):
    """A flash-attn package of the test's own, behind transformers' interface to them."""
    seen = {}

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale, window_size):
        seen.update(locals())
        window = None if window_size is None else window_size[0] + 1
        documents = Documents(cu_seqlens_q)
        return attention_by_document(q, k, v, documents, scaling=softmax_scale, window=window)

    functions = (None, varlen, None, None, None)
    from transformers import modeling_flash_attention_utils as utils

    monkeypatch.setattr(utils, "_lazy_imports", lambda *_, **__: functions)
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    install(monkeypatch, 3)
    kernel = kernels.choose("cuda", torch.bfloat16, 8, False, False)
    q, k, v = inputs(v_size=6)
    found = kernel(q, k, v, DOCUMENTS, scaling=0.5, window=2, sinks_N=None, dropout=0.0)
    assert torch.equal(found, attention_by_document(q, k, v, DOCUMENTS, scaling=0.5, window=2))
    assert seen["v"].shape == (5, 2, 8)  # padded to the size of a key, and cut again
    assert seen["causal"]
    assert (seen["max_seqlen_q"], seen["window_size"][0]) == (3, 1)


@pytest.mark.parametrize("window", [None, 2])
def test_torchs_kernels_by_their_shapes(window):
    """On the meta device, which checks what a kernel is called with."""
    q, k, v = (tensor.to("meta", torch.bfloat16).requires_grad_() for tensor in inputs(v_size=6))
    sinks = torch.zeros(4, device="meta", requires_grad=True)
    documents = Documents(DOCUMENTS.cu_seqlens.to("meta"))
    documents.__dict__["lengths"] = [3, 2]
    options = {"scaling": 0.5, "window": window, "dropout": 0.0}
    for kernel, sink in ((kernels._torch_varlen, None), (kernels._torch_flash_with_sinks, sinks)):
        output = kernel(q, k, v, documents, sinks_N=sink, **options)
        assert output.shape == (5, 4, 6)
        output.sum().backward()
        assert [tensor.grad.shape for tensor in (q, k, v)] == [q.shape, k.shape, v.shape]
    assert sinks.grad.shape == (4,)


def test_a_window_is_passed_on_as_keys_to_the_left(monkeypatch):
    seen = []

    def varlen(*_, window_size, **__):
        seen.append(window_size)
        return torch.zeros(5, 4, 8)

    monkeypatch.setattr(kernels, "varlen_attn", varlen)
    for window in (None, 4):
        kernels._torch_varlen(*inputs(), DOCUMENTS, scaling=1.0, window=window, sinks_N=None, dropout=0.0)
    assert seen == [(-1, 0), (3, 0)]


@pytest.mark.parametrize("asks", [True, False])
def test_torch_is_told_of_grouped_heads_where_it_asks(monkeypatch, asks):
    """torch 2.11's interface has no such argument: every attention on CUDA failed with a TypeError."""
    seen = []

    def of_2_11(query, *_, scale, window_size):
        return torch.zeros_like(query)

    def of_2_13(query, *_, scale, window_size, enable_gqa=False):
        seen.append(enable_gqa)
        return torch.zeros_like(query)

    monkeypatch.setattr(kernels, "varlen_attn", of_2_13 if asks else of_2_11)
    q, k, v = inputs()
    for keys, values in ((k, v), (q, q)):
        kernels._torch_varlen(q, keys, values, DOCUMENTS, scaling=1.0, window=None, sinks_N=None, dropout=0.0)
    assert seen == ([True, False] if asks else [])
