"""`prepare_dataset`: conversations or texts to the token rows that our trainers take."""

from __future__ import annotations

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from .._compat import global_then_local_main_first
from .packing import fit_rows, pack_rows
from .tokenize import (
    require_chat_template,
    tokenize_conversations,
    tokenize_texts,
    training_chat_template,
    warn_if_no_stop,
)


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    packing: bool = True,
    assistant_only_loss: bool = True,
    on_long_row: str = "error",
    text_column: str = "text",
    num_proc: int | None = None,
    name: str = "dataset",
) -> Dataset | IterableDataset:
    """Token rows for `MoETrainer` and `MoESFTTrainer`.

    Each stage (tokenising in shards of 50,000 rows, cutting, packing) is cached by `datasets` if the data set lies on
    disk, as those of `load_conversations` do: a second run takes it from there, one that was stopped goes on from the
    last finished shard. In a job, the first process works and the others read its cache.

    Args:
        dataset: rows of `messages` (conversations, see `load_conversations`), of text, or of `input_ids` and perhaps
            `labels`. Rows that are packed already (`seq_lengths`) are returned as they are.
        tokenizer: with a chat template for conversations.
        max_length: tokens of a row at most: the window.
        packing: put as many documents as fit into a row, best fit decreasing. The collator must then be
            `PackedCollator(padding_free=True)`, as it is in `MoESFTTrainer` with `packing=True`.
        assistant_only_loss: learn what the assistant says in conversations, not every token. The template must mark
            it, or TRL have a variant that does.
        on_long_row: what to do with documents longer than the window: "error", "split", "truncate" or "skip".
        text_column: of texts.
        num_proc: processes that tokenise.
        name: of the data set in messages.

    Returns:
        Rows of `input_ids`, `labels` and, packed, `seq_lengths`: the lengths of the documents of the row.

    Raises:
        ValueError: an empty data set, a malformed or too long row (its index is named), a tokenizer that lacks what is
            needed; each says what to change.
    """
    if isinstance(dataset, Dataset) and not len(dataset):
        raise ValueError(f"{name} is empty: there is nothing to train on.")
    columns = dataset.column_names or list(next(iter(dataset)))
    if "seq_lengths" in columns:
        return dataset
    with global_then_local_main_first():
        if "input_ids" in columns:
            rows = dataset if "labels" in columns else dataset.map(_label_all, batched=True)
        elif "messages" in columns:
            require_chat_template(tokenizer)
            template = training_chat_template(tokenizer) if assistant_only_loss else None
            if assistant_only_loss:
                warn_if_no_stop(tokenizer, template)
            rows = tokenize_conversations(
                dataset,
                tokenizer,
                assistant_only_loss=assistant_only_loss,
                chat_template=template,
                num_proc=num_proc,
                name=name,
            )
        elif text_column in columns:
            rows = tokenize_texts(dataset, tokenizer, text_column=text_column, num_proc=num_proc, name=name)
        else:
            raise ValueError(
                f"{name} has the columns {', '.join(columns)}; prepare_dataset reads 'messages', {text_column!r} or "
                "'input_ids' (MoESFTTrainer also reads 'prompt' with 'completion')."
            )
        rows = fit_rows(rows, max_length, on_long_row, name=name)
        return pack_rows(rows, max_length, name=name) if packing else rows


def _label_all(batch: dict[str, list]) -> dict[str, list]:
    return {"labels": batch["input_ids"]}
