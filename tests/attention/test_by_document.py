"""Attention document by document against its plain definition, in fp64: values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xtuner_hf.attention import by_document
from xtuner_hf.attention.by_document import attention_by_document
from xtuner_hf.attention.documents import Documents
from xtuner_hf.attention.reference import reference_attention

LENGTHS = (4, 9, 9, 1, 30)
SCALING = 0.3
HEADS = 4


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that the longest document has several."""
    monkeypatch.setattr(by_document, "MIN_BLOCK", 4)


def documents(lengths=LENGTHS) -> Documents:
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return Documents.of_batch(1, positions.shape[1], positions.device, position_ids=positions)


def inputs(kv_heads: int = HEADS, v_size: int = 8, lengths=LENGTHS, sinks: bool = True) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    num_tokens = sum(lengths)
    shapes = [(num_tokens, HEADS, 8), (num_tokens, kv_heads, 8), (num_tokens, kv_heads, v_size), (HEADS,)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes[: 3 + sinks]]


def values_and_grads(attention, tensors, **options) -> list[torch.Tensor]:
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    q, k, v, *sinks = tensors
    output = attention(q, k, v, documents(), scaling=SCALING, sinks_N=sinks[0] if sinks else None, **options)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    (output * weights).sum().backward()
    return [output, *(tensor.grad for tensor in tensors)]


@pytest.mark.parametrize("window", [None, 1, 3, 5, 9, 100])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("kv_heads", "v_size"), [(4, 8), (2, 8), (1, 8), (4, 5)])
def test_equals_the_reference(window, sinks, kv_heads, v_size):
    tensors = inputs(kv_heads, v_size, sinks=sinks)
    found = values_and_grads(attention_by_document, tensors, window=window)
    expected = values_and_grads(reference_attention, tensors, window=window)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 1e-12


def test_the_reference_is_the_definition():
    q, k, v, sinks = inputs()
    found = reference_attention(q, k, v, documents(), scaling=SCALING, window=3, sinks_N=sinks)
    start = 0
    for length in LENGTHS:
        for token in range(start, start + length):
            seen = slice(max(start, token - 2), token + 1)
            weights = (torch.einsum("nk,tnk->nt", q[token], k[seen]) * SCALING).exp()
            expected = torch.einsum("nt,tnv->nv", weights, v[seen]) / (weights.sum(1) + sinks.exp())[:, None]
            assert (found[token] - expected).abs().max() < 1e-12
        start += length


@pytest.mark.parametrize("window", [2, 5])
def test_a_window_is_exactly_that_many_keys(window):
    q, k, v = inputs(sinks=False)
    k.requires_grad_()
    output = attention_by_document(q, k, v, documents(), scaling=SCALING, window=window)
    last = sum(LENGTHS) - 1
    (grad,) = torch.autograd.grad(output[last].sum(), k)
    assert grad.abs().sum((1, 2)).nonzero()[:, 0].tolist() == list(range(last - window + 1, last + 1))


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.numel = max(
            [self.numel, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))]
        )
        return result


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("v_size", [8, 5])
def test_nothing_grows_with_the_square_of_the_length(window, v_size):
    length = 512
    tensors = [tensor.requires_grad_() for tensor in inputs(v_size=v_size, lengths=(length,))]
    with LargestTensor() as largest:
        output = attention_by_document(
            *tensors[:3], documents((length,)), scaling=1.0, window=window, sinks_N=tensors[3]
        )
        output.sum().backward()
    assert largest.numel <= 2 * length * HEADS * 8


class TestDocuments:
    MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])

    def test_of_padded_rows(self):
        found = Documents.of_batch(3, 5, self.MASK.device, attention_mask=self.MASK)
        assert found.lengths == [2, 3, 4, 1, 5]
        assert found.index_T.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 4, 4, 4, 4, 4]
        assert found.max_length == 5

    def test_of_packed_rows(self):
        positions = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 2]])
        found = Documents.of_batch(2, 4, positions.device, position_ids=positions)
        assert found.lengths == [2, 2, 1, 3]
        assert found.runs == [(2, 2), (1, 1), (1, 3)]

    def test_of_plain_rows(self):
        positions = torch.arange(4)[None]
        assert Documents.of_batch(2, 4, positions.device, position_ids=positions).lengths == [4, 4]
        assert Documents.of_batch(2, 4, positions.device).lengths == [4, 4]

    def test_of_the_collators_boundaries(self):
        ends = torch.tensor([0, 3, 4])
        found = Documents.of_batch(1, 4, ends.device, position_ids=torch.zeros(1, 4), cu_seq_lens_q=ends)
        assert found.lengths == [3, 1]
        assert found.cu_seqlens.dtype == torch.int32

    def test_padding_within_a_row_is_refused(self):
        mask = torch.tensor([[1, 0, 1, 1]])
        with pytest.raises(ValueError, match=r"padding between the tokens of a row.*attn_implementation='sdpa'"):
            Documents.of_batch(1, 4, mask.device, attention_mask=mask)
