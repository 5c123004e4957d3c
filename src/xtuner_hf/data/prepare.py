"""`prepare_dataset`: conversations or texts, with or without images, to the token rows that our trainers take."""

from __future__ import annotations

import copy
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .._compat import global_then_local_main_first
from .packing import fit_rows, pack_rows
from .tiles import ImageTiler
from .tokenize import (
    require_chat_template,
    tokenize_conversations,
    tokenize_texts,
    training_chat_template,
    warn_if_no_stop,
)


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    max_length: int,
    *,
    packing: bool = True,
    assistant_only_loss: bool = True,
    on_long_row: str = "error",
    text_column: str = "text",
    max_row_tiles: int | None = None,
    num_proc: int | None = None,
    name: str = "dataset",
) -> Dataset | IterableDataset:
    """Token rows for `MoETrainer` and `MoESFTTrainer`.

    Each stage (tokenising in shards of 50,000 rows, cutting, packing) is cached by `datasets` if the data set lies on
    disk, as those of `load_conversations` do: a second run takes it from there, one that was stopped goes on from the
    last finished shard. In a job, the first process works and the others read its cache.

    Args:
        dataset: rows of `messages` (conversations, see `load_conversations`), of text, or of `input_ids` and perhaps
            `labels`. Rows that are packed already (`seq_lengths`) are returned as they are, but for those that are
            longer than the window.
        tokenizer: with a chat template for conversations. Rows with images need the processor of their model instead
            (`InternVLProcessor`); `VisionCollator` then reads the images.
        max_length: tokens of a row at most: the window.
        packing: put as many documents as fit into a row, best fit decreasing. The collator must then be
            `PackedCollator(padding_free=True)`, as it is in `MoESFTTrainer` with `packing=True`.
        assistant_only_loss: learn what the assistant says in conversations, not every token. The template must mark
            it, or TRL have a variant that does.
        on_long_row: what to do with documents longer than the window: "error", "split", "truncate" or "skip"; packed
            rows are split between documents.
        text_column: of texts.
        max_row_tiles: of all images of a conversation together; see `ImageTiler`.
        num_proc: processes that tokenise.
        name: of the data set in messages.

    Returns:
        Rows of `input_ids`, `labels`, with a processor `image_refs`, and, packed, `seq_lengths`: the lengths of the
        documents of the row.

    Raises:
        ValueError: an empty data set, a malformed or too long row (its index is named), a tokenizer that lacks what is
            needed; each says what to change.
    """
    if isinstance(dataset, Dataset) and not len(dataset):
        raise ValueError(f"{name} is empty: there is nothing to train on.")
    columns = dataset.column_names or list(next(iter(dataset)))
    if "seq_lengths" in columns:
        with global_then_local_main_first():
            return fit_rows(dataset, max_length, on_long_row, name=name)
    tiler = ImageTiler(tokenizer, max_row_tiles) if isinstance(tokenizer, ProcessorMixin) else None
    with global_then_local_main_first():
        rows = tokenize_rows(
            dataset,
            text_tokenizer(tokenizer),
            tiler=tiler,
            assistant_only_loss=assistant_only_loss,
            text_column=text_column,
            num_proc=num_proc,
            name=name,
        )
        rows = fit_rows(rows, max_length, on_long_row, name=name)
        return pack_rows(rows, max_length, name=name) if packing else rows


def tokenize_rows(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tiler: ImageTiler | None,
    assistant_only_loss: bool,
    text_column: str,
    num_proc: int | None,
    name: str,
) -> Dataset | IterableDataset:
    """The first stage of `prepare_dataset`: rows of `messages`, text or `input_ids` to tokens and labels."""
    columns = dataset.column_names or list(next(iter(dataset)))
    if "input_ids" in columns:
        return dataset if "labels" in columns else dataset.map(_label_all, batched=True)
    if "messages" in columns:
        require_chat_template(tokenizer)
        template = training_chat_template(tokenizer) if assistant_only_loss else None
        if assistant_only_loss:
            warn_if_no_stop(tokenizer, template)
        return tokenize_conversations(
            dataset,
            tokenizer,
            assistant_only_loss=assistant_only_loss,
            chat_template=template,
            tiler=tiler,
            num_proc=num_proc,
            name=name,
        )
    if text_column in columns:
        return tokenize_texts(dataset, tokenizer, text_column=text_column, tiler=tiler, num_proc=num_proc, name=name)
    raise ValueError(
        f"{name} has the columns {', '.join(columns)}; prepare_dataset reads 'messages', {text_column!r} or "
        "'input_ids' (MoESFTTrainer also reads 'prompt' with 'completion', of text alone)."
    )


def text_tokenizer(processor: Any) -> PreTrainedTokenizerBase:
    """A processor's tokenizer, with the processor's chat template; a tokenizer as it is."""
    if not isinstance(processor, ProcessorMixin):
        return processor
    tokenizer = processor.tokenizer
    if processor.chat_template and tokenizer.chat_template != processor.chat_template:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = processor.chat_template
    return tokenizer


def _label_all(batch: dict[str, list]) -> dict[str, list]:
    return {"labels": batch["input_ids"]}
