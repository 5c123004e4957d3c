"""Batches: documents of a packed row do not learn from each other, and padding is no token."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import build, moe_config
from xtuner_hf import Qwen3MoeForCausalLM
from xtuner_hf.data import PackedCollator
from xtuner_hf.moe.tokens import TokenLayout

ROWS = [
    {"input_ids": [11, 12, 13, 21, 22], "labels": [11, 12, 13, 21, 22], "seq_lengths": [3, 2]},
    {"input_ids": [31, 32], "labels": [-100, 32], "seq_lengths": [2]},
]


def test_packed():
    batch = PackedCollator(pad_token_id=0, padding_free=True)(ROWS)
    assert batch["input_ids"].tolist() == [[11, 12, 13, 21, 22, 31, 32]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 12, 13, -100, 22, -100, 32]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 7]
    assert "attention_mask" not in batch
    assert "token_mask" not in batch


@pytest.mark.parametrize("rows", [ROWS, [{"input_ids": [11, 12, 13]}, {"input_ids": [21, 22, 31, 32]}]])
def test_packed_and_padded(rows):
    batch = PackedCollator(pad_token_id=0, padding_free=True, pad_to_multiple_of=4)(rows)
    plain = PackedCollator(pad_token_id=0, padding_free=True)(rows)
    for key, padding in {"input_ids": [0], "labels": [-100], "position_ids": [0]}.items():
        assert batch[key].tolist() == [plain[key][0].tolist() + padding]
    assert batch["token_mask"].tolist() == [[True] * 7 + [False]]
    assert batch["cu_seq_lens_q"].tolist() == [*plain["cu_seq_lens_q"].tolist(), 8], "padding is a document"
    layouts = [TokenLayout.of_batch(b).totals().tolist() for b in (batch, plain)]
    assert layouts[0] == layouts[1]


def test_padding_is_one_document():
    batch = PackedCollator(pad_token_id=0, padding_free=True, pad_to_multiple_of=16)(ROWS)
    assert batch["position_ids"][0, 7:].tolist() == list(range(9))
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 7, 16]
    assert batch["max_length_q"] == 9


def test_nothing_to_pad():
    batch = PackedCollator(pad_token_id=0, padding_free=True, pad_to_multiple_of=7)(ROWS)
    assert batch["token_mask"].tolist() == [[True] * 7]


def test_padded():
    rows = [{"input_ids": [11, 12, 13]}, {"input_ids": [21], "labels": [-100]}]
    rows[0]["labels"] = [-100, 12, 13]
    batch = PackedCollator(pad_token_id=0, pad_to_multiple_of=4)(rows)
    assert batch["input_ids"].tolist() == [[11, 12, 13, 0], [21, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 12, 13, -100], [-100] * 4]


def test_packed_rows_are_not_padded():
    with pytest.raises(ValueError, match=r"packed \('seq_lengths'\).*padding_free=True"):
        PackedCollator(pad_token_id=0)(ROWS)


def test_a_packed_batch_costs_what_its_documents_cost():
    """Loss and gradients of a packed and padded row are the sums over its documents alone."""
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(2, 128, (n,), generator=generator).tolist() for n in (9, 4, 14)]
    packed = [{"input_ids": documents[0] + documents[1], "seq_lengths": [9, 4]}, {"input_ids": documents[2]}]
    packed[1]["seq_lengths"] = [14]
    model = build(Qwen3MoeForCausalLM, moe_config(), dtype=torch.float64)
    model.set_experts_implementation("xtuner_reference")

    def gradients(batches):
        model.zero_grad()
        loss = sum(model(**batch, use_cache=False, chunked_loss=True, num_items_in_batch=1).loss for batch in batches)
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    together = gradients([PackedCollator(pad_token_id=0, padding_free=True, pad_to_multiple_of=32)(packed)])
    alone = gradients([PackedCollator(pad_token_id=0)([{"input_ids": document}]) for document in documents])
    assert abs(together[0] - alone[0]) < 1e-5 * alone[0]
    assert torch.allclose(together[1], alone[1], rtol=0, atol=1e-6 * alone[1].abs().max().item())
