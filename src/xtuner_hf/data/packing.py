"""Token rows to the window: rows that are too long, and best-fit-decreasing packing."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from trl import pack_dataset

from .report import warn
from .tiles import IMAGE_REFS, image_spans
from .tokenize import IGNORE_INDEX, token_features

logger = logging.getLogger(__name__)

LONG_ROW_POLICIES = ("error", "split", "truncate", "skip")
# Packing is within batches of about this many tokens (256 MB of ids and labels). One bin a batch stays partly empty, so
# there must be hundreds of them: TRL's batches of 1,000 rows fill only 0.984 of 32k windows with rows of median 665.
TOKENS_PER_BATCH = 2**25


def fit_rows(
    dataset: Dataset | IterableDataset,
    max_length: int,
    on_long_row: str,
    *,
    keep: str = "start",
    name: str = "dataset",
    window: str = "max_length",
) -> Dataset | IterableDataset:
    """Deal with rows of more than `max_length` tokens.

    Args:
        dataset: rows of `input_ids` and `labels`, and perhaps `image_refs`; of packed ones also `seq_lengths`.
        on_long_row: "error", "split" (into rows of at most `max_length`, nothing is lost), "truncate" or "skip". What
            is done to how many rows is logged, for a streamed data set without the number. No image is cut. Packed rows
            are split between documents, and a document only where it is longer than `max_length` itself; they are not
            truncated.
        window: what `max_length` is called where the user set it.
        keep: "start" or "end", of a truncated row. Rows of which no label is left are left out.

    Raises:
        ValueError: for a long row ("error"), a row without tokens, or an image that is longer than the window.
    """
    if on_long_row not in LONG_ROW_POLICIES:
        raise ValueError(f"on_long_row is {on_long_row!r}; use one of {', '.join(map(repr, LONG_ROW_POLICIES))}.")
    columns = dataset.column_names or list(next(iter(dataset)))
    is_packed = "seq_lengths" in columns
    if is_packed and on_long_row == "truncate":
        raise ValueError(f"{name} is packed: set on_long_row to 'split', which cuts between documents, or to 'skip'.")
    cut: dict[str, Any] = {
        "function": _cut_packed if is_packed else _cut,
        "batched": True,
        "fn_kwargs": {"max_length": max_length, "on_long_row": on_long_row, "name": name},
        "features": token_features(columns),
        "remove_columns": columns,
    }
    if not is_packed:
        cut["fn_kwargs"]["keep"] = keep
    if isinstance(dataset, IterableDataset):
        if on_long_row != "error":
            warn(logger, f"{name}: rows of more than {window}={max_length} tokens: {on_long_row}.")
        return dataset.map(**cut)
    lengths = row_lengths(dataset)
    if not lengths.all():
        raise ValueError(f"{name}[{int(np.argmin(lengths))}] has no tokens; remove such rows.")
    long_rows = int((lengths > max_length).sum())
    if not long_rows:
        return dataset
    found = f"{long_rows:,} of {len(lengths):,} rows have more than {window}={max_length} tokens"
    first = int(np.argmax(lengths > max_length))
    if on_long_row == "error":
        raise ValueError(
            f"{name}: {found} (the longest {lengths.max():,}; the first is {name}[{first}]). Raise {window}, or set "
            "on_long_row to 'split', 'truncate' or 'skip'."
        )
    rows = dataset.map(desc=f"Cutting {name}", **cut)
    lost = int(lengths.sum() - row_lengths(rows).sum())
    warn(logger, f"{name}: {found}; {on_long_row}: {len(rows):,} rows remain, {lost:,} tokens are left out.")
    return rows


def _cut(batch: dict[str, list], max_length: int, on_long_row: str, keep: str, name: str) -> dict[str, list]:
    columns = [column for column in ("input_ids", "labels", IMAGE_REFS) if column in batch]
    result: dict[str, list] = {column: [] for column in columns}
    for values in zip(*(batch[column] for column in columns), strict=True):
        row = dict(zip(columns, values, strict=True))
        length = len(row["input_ids"])
        is_cut = length > max_length and on_long_row == "truncate"
        if length > max_length and on_long_row == "error":
            raise _row_too_long(name, length, max_length)
        if length > max_length and on_long_row == "skip":
            continue
        for piece in _pieces(length, max_length, on_long_row, keep, image_spans(row.get(IMAGE_REFS)), name):
            if not is_cut or any(label != IGNORE_INDEX for label in row["labels"][piece]):
                for column in columns:
                    result[column].append(row[column][piece])
    return result


def _pieces(
    length: int, max_length: int, on_long_row: str, keep: str, images: list[tuple[int, int]], name: str
) -> list[slice]:
    """What of a row stays, in pieces of at most `max_length`; a place within an image gives way to its edge."""
    if length <= max_length:
        return [slice(None)]
    if on_long_row == "truncate" and keep == "end":
        place = length - max_length
        return [slice(next((end for start, end in images if start < place < end), place), None)]
    pieces, begin = [], 0
    while begin < length:
        place = min(begin + max_length, length)
        place = next((start for start, end in images if start < place < end), place)
        if place <= begin:
            raise ValueError(
                f"{name}: a row has an image of more than max_length={max_length} tokens, which cannot be cut. Raise "
                "max_length, or let images have fewer tiles."
            )
        pieces.append(slice(begin, place))
        begin = place
    return pieces[:1] if on_long_row == "truncate" else pieces


def _cut_packed(batch: dict[str, list], max_length: int, on_long_row: str, name: str) -> dict[str, list]:
    columns = [column for column in ("input_ids", "labels", IMAGE_REFS) if column in batch]
    result: dict[str, list] = {column: [] for column in (*columns, "seq_lengths")}
    for index, lengths in enumerate(batch["seq_lengths"]):
        if sum(lengths) > max_length and on_long_row == "error":
            raise _row_too_long(name, sum(lengths), max_length)
        if sum(lengths) > max_length and on_long_row == "skip":
            continue
        images = image_spans(batch[IMAGE_REFS][index] if IMAGE_REFS in batch else None)
        start = 0
        for row in _split_between(lengths, max_length, images, name):
            end = start + sum(row)
            for column in columns:
                result[column].append(batch[column][index][start:end])
            result["seq_lengths"].append(row)
            start = end
    return result


def _split_between(lengths: list[int], max_length: int, images: list[tuple[int, int]], name: str) -> list[list[int]]:
    """Lengths of documents in order -> rows of at most `max_length`; only a longer document is cut itself."""
    rows: list[list[int]] = [[]]
    begin = 0
    for length in lengths:
        inside = [(start - begin, end - begin) for start, end in images if begin <= start < begin + length]
        for piece in _pieces(length, max_length, "split", "start", inside, name):
            size = len(range(length)[piece])
            if sum(rows[-1]) + size > max_length:
                rows.append([])
            rows[-1].append(size)
        begin += length
    return rows


def _row_too_long(name: str, length: int, max_length: int) -> ValueError:
    return ValueError(
        f"{name}: a row has {length:,} tokens, more than max_length={max_length}. Raise max_length, or set on_long_row "
        "to 'split', 'truncate' or 'skip'."
    )


def pack_rows(
    dataset: Dataset | IterableDataset, max_length: int, *, strategy: str = "bfd", name: str = "dataset"
) -> Dataset | IterableDataset:
    """Pack rows into rows of up to `max_length` tokens with TRL's best-fit-decreasing packing.

    Args:
        dataset: rows of `input_ids`, `labels` and perhaps `image_refs`, none longer than `max_length`.
        strategy: "bfd" keeps documents whole and notes their lengths. "wrapped" cuts them anywhere and notes nothing:
            documents then see each other.

    Returns:
        The same columns and ("bfd") `seq_lengths`, the lengths of the documents of a row in order. `PackedCollator`
        keeps them apart.
    """
    columns = list(token_features(dataset.column_names or ()))
    if IMAGE_REFS in columns and strategy == "wrapped":
        raise ValueError(f"{name} has images, and packing_strategy='wrapped' would cut through them: use 'bfd'.")
    options: dict[str, Any] = {"batch_size": 10_000}
    if isinstance(dataset, Dataset):
        num_batches = math.ceil(row_lengths(dataset).sum() / TOKENS_PER_BATCH)
        options = {"batch_size": max(1_000, math.ceil(len(dataset) / num_batches)), "desc": f"Packing {name}"}
    return pack_dataset(dataset.select_columns(columns), max_length, strategy, options)


def row_lengths(dataset: Dataset) -> np.ndarray:
    """[rows] int64: tokens of each row."""
    batches = dataset.select_columns("input_ids").with_format("arrow").iter(batch_size=10_000)
    return np.concatenate([pc.list_value_length(batch["input_ids"]).to_numpy() for batch in batches] or [np.empty(0)])
