"""Packing fills the window, keeps documents whole, and nothing is cut that the user did not say to cut."""

from __future__ import annotations

import logging

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, IterableDataset

from xtuner_hf.data import packing
from xtuner_hf.data.packing import fit_rows, pack_rows, row_lengths


def rows_of(*lengths: int) -> Dataset:
    """Rows whose tokens tell row and place, with labels on the second half."""
    ids = [[1000 * row + place for place in range(length)] for row, length in enumerate(lengths)]
    return Dataset.from_list(
        [{"input_ids": row, "labels": [-100] * (len(row) // 2) + row[len(row) // 2 :], "extra": 1} for row in ids]
    )


def documents(packed: Dataset) -> list[tuple[list[int], list[int]]]:
    found = []
    for row in packed:
        start = 0
        for length in row["seq_lengths"]:
            found.append((row["input_ids"][start : start + length], row["labels"][start : start + length]))
            start += length
        assert start == len(row["input_ids"]) == len(row["labels"])
    return sorted(found)


@pytest.mark.parametrize("window", [8192, 32768])
@pytest.mark.parametrize("median", [665, 2981])
def test_log_normal_lengths_fill_the_window(median, window):
    generator = np.random.default_rng(0)
    lengths = np.exp(generator.normal(np.log(median), 1.0, size=10_000)).astype(int).clip(1, window)
    offsets = pa.array(np.concatenate([[0], lengths.cumsum()]), pa.int64())
    tokens = pa.LargeListArray.from_arrays(offsets, pa.array(np.zeros(lengths.sum(), np.int8)))
    dataset = Dataset(pa.table({"input_ids": tokens, "labels": tokens}))
    packed = pack_rows(dataset, window)
    packed_lengths = row_lengths(packed)
    assert packed_lengths.sum() == lengths.sum()
    assert packed_lengths.max() <= window
    fill = lengths.sum() / (len(packed) * window)
    assert fill >= 0.995, fill


def test_documents_stay_whole():
    lengths = np.random.default_rng(1).integers(1, 50, size=200)
    dataset = rows_of(*lengths)
    packed = pack_rows(dataset, 64)
    assert packed.column_names == ["input_ids", "labels", "seq_lengths"]
    assert row_lengths(packed).max() <= 64
    assert documents(packed) == sorted(zip(dataset["input_ids"][:], dataset["labels"][:], strict=True))


def test_rows_are_packed_in_batches_of_bounded_size(monkeypatch):
    monkeypatch.setattr(packing, "TOKENS_PER_BATCH", 1_000)
    sizes = []
    monkeypatch.setattr(packing, "pack_dataset", lambda rows, length, strategy, options: sizes.append(options))
    pack_rows(rows_of(*[10] * 3_000), 64)
    pack_rows(rows_of(*[1000] * 5), 1024)
    assert [size["batch_size"] for size in sizes] == [1_000, 1_000]
    monkeypatch.setattr(packing, "TOKENS_PER_BATCH", 16_000)
    pack_rows(rows_of(*[10] * 3_000), 64)
    assert sizes[-1]["batch_size"] == 1_500


def test_a_long_row_is_an_error():
    dataset = rows_of(5, 12, 3, 20)
    message = (
        r"^train: 2 of 4 rows have more than max_length=10 tokens \(the longest 20; the first is train\[1\]\)\. Raise"
    )
    with pytest.raises(ValueError, match=message):
        fit_rows(dataset, 10, "error", name="train")
    with pytest.raises(ValueError, match="on_long_row is 'cut'"):
        fit_rows(dataset, 10, "cut")
    assert fit_rows(dataset, 20, "error") is dataset


@pytest.mark.parametrize(
    ("policy", "keep", "expected", "lost"),
    [
        ("split", "start", [(0, 0, 5), (1, 0, 10), (1, 10, 12), (2, 0, 3), (3, 0, 10), (3, 10, 20), (3, 20, 21)], 0),
        # Nothing is left to learn from the first half of the last row.
        ("truncate", "start", [(0, 0, 5), (1, 0, 10), (2, 0, 3)], 23),
        ("truncate", "end", [(0, 0, 5), (1, 2, 12), (2, 0, 3), (3, 11, 21)], 13),
        ("skip", "start", [(0, 0, 5), (2, 0, 3)], 33),
    ],
)
def test_what_the_user_chose_is_done_and_counted(caplog, policy, keep, expected, lost):
    dataset = rows_of(5, 12, 3, 21)
    with caplog.at_level(logging.WARNING):
        rows = fit_rows(dataset, 10, policy, keep=keep, name="train")
    for column in ("input_ids", "labels"):
        assert rows[column][:] == [dataset[row][column][start:end] for row, start, end in expected]
    (record,) = caplog.records
    assert record.message == (
        f"train: 2 of 4 rows have more than max_length=10 tokens; {policy}: {len(rows)} rows remain, {lost} tokens are "
        "left out."
    )


def test_a_row_without_tokens_is_an_error():
    with pytest.raises(ValueError, match=r"train\[2\] has no tokens"):
        fit_rows(rows_of(5, 12, 0), 20, "error", name="train")


def test_streamed_rows(caplog):
    dataset = rows_of(5, 12, 3, 21)
    streamed = IterableDataset.from_generator(lambda: iter(dataset))
    for policy in ("split", "skip"):
        assert list(fit_rows(streamed, 10, policy)) == list(fit_rows(dataset, 10, policy))
    assert "rows of more than max_length=10 tokens: split" in caplog.text
    with pytest.raises(ValueError, match="train: a row has 12 tokens, more than max_length=10"):
        list(fit_rows(streamed, 10, "error", name="train"))
    assert documents(pack_rows(streamed, 32)) == documents(pack_rows(dataset, 32))


def test_packed_rows_are_split_between_documents():
    """12 documents in rows of up to 64 tokens, for a window of 30: documents stay whole, but for one of 40 tokens."""
    dataset = rows_of(*[9, 14, 7, 21, 40, 3, 11, 11, 8, 2, 25, 5])
    packed = pack_rows(dataset, 64)
    split = fit_rows(packed, 30, "split")
    assert row_lengths(split).max() <= 30
    assert [token for row in split["input_ids"] for token in row] == [t for row in packed["input_ids"] for t in row]
    pieces = [ids for ids, _ in documents(split)]
    whole = [ids for ids in dataset["input_ids"] if len(ids) <= 30]
    assert [ids for ids in pieces if ids in whole] == sorted(whole)
    assert [len(ids) for ids in pieces if ids not in whole] == [30, 10]
    skipped = fit_rows(packed, 30, "skip")
    assert {len(row) > 30 for row in packed["input_ids"]} == {True, False}
    assert skipped["input_ids"][:] == [row for row in packed["input_ids"] if len(row) <= 30]
    assert fit_rows(packed, 64, "error") is packed


def test_packed_rows_that_do_not_fit_are_named():
    packed = pack_rows(rows_of(9, 14, 30), 64)
    with pytest.raises(ValueError, match=r"1 of 1 rows have more than max_length=30 tokens \(the longest 53"):
        fit_rows(packed, 30, "error")
    with pytest.raises(ValueError, match="dataset is packed: set on_long_row to 'split', which cuts between"):
        fit_rows(packed, 30, "truncate")
