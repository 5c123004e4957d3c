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
