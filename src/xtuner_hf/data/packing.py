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
from .tokenize import IGNORE_INDEX, TOKEN_FEATURES

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
) -> Dataset | IterableDataset:
    """Deal with rows of more than `max_length` tokens.

    Args:
        dataset: rows of `input_ids` and `labels`.
        on_long_row: "error", "split" (into rows of at most `max_length`, nothing is lost), "truncate" or "skip". What
            is done to how many rows is logged, for a streamed data set without the number.
        keep: "start" or "end", of a truncated row. Rows of which no label is left are left out.

    Raises:
        ValueError: for a long row ("error") or a row without tokens.
    """
    if on_long_row not in LONG_ROW_POLICIES:
        raise ValueError(f"on_long_row is {on_long_row!r}; use one of {', '.join(map(repr, LONG_ROW_POLICIES))}.")
    cut = {
        "batched": True,
        "fn_kwargs": {"max_length": max_length, "on_long_row": on_long_row, "keep": keep, "name": name},
        "features": TOKEN_FEATURES,
    }
    if isinstance(dataset, IterableDataset):
        if on_long_row != "error":
            warn(logger, f"{name}: rows of more than max_length={max_length} tokens: {on_long_row}.")
        return dataset.map(_cut, remove_columns=dataset.column_names or list(next(iter(dataset))), **cut)
    lengths = row_lengths(dataset)
    if not lengths.all():
        raise ValueError(f"{name}[{int(np.argmin(lengths))}] has no tokens; remove such rows.")
    long_rows = int((lengths > max_length).sum())
    if not long_rows:
        return dataset
    found = f"{long_rows:,} of {len(lengths):,} rows have more than max_length={max_length} tokens"
    first = int(np.argmax(lengths > max_length))
    if on_long_row == "error":
        raise ValueError(
            f"{name}: {found} (the longest {lengths.max():,}; the first is {name}[{first}]). Raise max_length, or set "
            "on_long_row to 'split', 'truncate' or 'skip'."
        )
    rows = dataset.map(_cut, remove_columns=dataset.column_names, desc=f"Cutting {name}", **cut)
    lost = int(lengths.sum() - row_lengths(rows).sum())
    warn(logger, f"{name}: {found}; {on_long_row}: {len(rows):,} rows remain, {lost:,} tokens are left out.")
    return rows


def _cut(batch: dict[str, list], max_length: int, on_long_row: str, keep: str, name: str) -> dict[str, list]:
    result: dict[str, list] = {"input_ids": [], "labels": []}
    for input_ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        length = len(input_ids)
        if length <= max_length:
            pieces = [slice(None)]
        elif on_long_row == "split":
            pieces = [slice(start, start + max_length) for start in range(0, length, max_length)]
        elif on_long_row == "truncate":
            pieces = [slice(max_length) if keep == "start" else slice(-max_length, None)]
        elif on_long_row == "skip":
            continue
        else:
            raise ValueError(
                f"{name}: a row has {length:,} tokens, more than max_length={max_length}. Raise max_length, or set "
                "on_long_row to 'split', 'truncate' or 'skip'."
            )
        for piece in pieces:
            is_cut = length > max_length and on_long_row == "truncate"
            if not is_cut or any(label != IGNORE_INDEX for label in labels[piece]):
                result["input_ids"].append(input_ids[piece])
                result["labels"].append(labels[piece])
    return result


def pack_rows(
    dataset: Dataset | IterableDataset, max_length: int, *, strategy: str = "bfd", name: str = "dataset"
) -> Dataset | IterableDataset:
    """Pack rows into rows of up to `max_length` tokens with TRL's best-fit-decreasing packing.

    Args:
        dataset: rows of `input_ids` and `labels`, none longer than `max_length`.
        strategy: "bfd" keeps documents whole and notes their lengths. "wrapped" cuts them anywhere and notes nothing:
            documents then see each other.

    Returns:
        Rows of `input_ids`, `labels` and ("bfd") `seq_lengths`, the lengths of the documents of a row in order.
        `PackedCollator` keeps them apart.
    """
    options: dict[str, Any] = {"batch_size": 10_000}
    if isinstance(dataset, Dataset):
        num_batches = math.ceil(row_lengths(dataset).sum() / TOKENS_PER_BATCH)
        options = {"batch_size": max(1_000, math.ceil(len(dataset) / num_batches)), "desc": f"Packing {name}"}
    return pack_dataset(dataset.select_columns(["input_ids", "labels"]), max_length, strategy, options)


def row_lengths(dataset: Dataset) -> np.ndarray:
    """[rows] int64: tokens of each row."""
    batches = dataset.select_columns("input_ids").with_format("arrow").iter(batch_size=10_000)
    return np.concatenate([pc.list_value_length(batch["input_ids"]).to_numpy() for batch in batches] or [np.empty(0)])
