"""kernels/npu/attention.py against the definition (attention/reference.py)."""

from __future__ import annotations

import pytest
import torch

from tests.npu.kernels.pairs import DEVICE, assert_same, tensor
from xtuner_hf.attention.documents import Documents
from xtuner_hf.attention.reference import reference_attention
from xtuner_hf.kernels.npu import attention as room
from xtuner_hf.kernels.npu import packed_attention

BOUNDARIES = torch.tensor([0, 3, 4, 16, 21], dtype=torch.int32)


def on(boundaries, device):
    return Documents(boundaries.to(device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_documents_windows_sinks_and_mla_sizes(dtype, window, has_sinks, calls):
    sizes = ((21, 4, 24), (21, 2, 24), (21, 2, 16))  # grouped heads; values smaller than keys, as MLA's are
    q, k, v = (tensor(*size, dtype=dtype, seed=seed) for seed, size in enumerate(sizes))
    sinks = tensor(4, dtype=dtype, seed=3) if has_sinks else None
    options = {"scaling": 0.3, "window": window}

    def fused(q, k, v, sinks):
        return packed_attention(q, k, v, on(BOUNDARIES, DEVICE), sinks_N=sinks, **options)

    def plain(q, k, v, sinks):
        return reference_attention(q, k, v, on(BOUNDARIES, "cpu"), sinks_N=sinks, **options).to(q.dtype)

    assert_same(fused, plain, q, k, v, sinks, dtype=dtype)
    assert calls["npu_fusion_attention"] == calls["npu_fusion_attention_grad"] == 1


def test_more_documents_than_one_call_takes(monkeypatch, calls):
    monkeypatch.setattr(room, "MAX_DOCUMENTS", 3)
    q, k, v = (tensor(21, 2, 8, seed=seed) for seed in range(3))
    assert_same(
        lambda *qkv: packed_attention(*qkv, on(BOUNDARIES, DEVICE), scaling=0.3),
        lambda *qkv: reference_attention(*qkv, on(BOUNDARIES, "cpu"), scaling=0.3),
        *(q, k, v),
    )
    assert calls["npu_fusion_attention"] == 2


def test_one_mask_for_all_calls_of_a_device():
    q, k, v = (tensor(21, 2, 8, seed=seed).to(DEVICE) for seed in range(3))
    room._triangle.cache_clear()
    for window in (None, 4):
        packed_attention(q, k, v, on(BOUNDARIES, DEVICE), scaling=0.3, window=window)
    assert room._triangle.cache_info().misses == 1


def test_the_ends_are_read_from_the_device_once(monkeypatch):
    reads = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self.shape) or original(self))
    documents = on(BOUNDARIES, DEVICE)
    q, k, v = (tensor(21, 2, 8, seed=seed).to(DEVICE) for seed in range(3))
    for _ in range(3):
        packed_attention(q, k, v, documents, scaling=0.3)
    assert documents.lengths == [3, 1, 12, 5]
    assert reads.count(torch.Size([4])) == 1


@pytest.mark.parametrize("mask", [torch.ones(21, 21), torch.ones(2048, 2048).tril()])
def test_a_mask_that_is_not_the_compressed_triangle_is_refused(mask):
    q = tensor(21, 2, 8).to(DEVICE)
    with pytest.raises(RuntimeError, match=r"NPU restriction: the (compressed )?mask"):
        torch.ops.npu.npu_fusion_attention(
            *(q, q, q, 2, "TND"),
            atten_mask=mask.bool().to(DEVICE),
            sparse_mode=3,
            actual_seq_qlen=[21],
            actual_seq_kvlen=[21],
        )
