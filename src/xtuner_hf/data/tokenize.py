"""Conversations and texts to token ids and labels, through the tokenizer's chat template."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from importlib.resources import files
from typing import Any

import datasets
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase
from trl import get_training_chat_template

from .. import __version__
from .._compat import has_generation_markers, is_chat_template_stop_token_trained
from .conversation import PRETRAIN, check_conversation
from .load import holds_json, with_encoded_images
from .malformed import MalformedRow
from .report import warn
from .tiles import IMAGE_REFS, ImageTiler, take_images

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100
# Each shard of this many rows is cached on its own: a run that was stopped goes on behind the last finished one.
ROWS_PER_SHARD = 50_000

TOKEN_FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})
# With images: one value a token, as the others, so that rows are cut and packed alike. 64-bit offsets, because the
# bytes of images may pass 2 GB in a batch of rows.
VISION_FEATURES = Features({**TOKEN_FEATURES, IMAGE_REFS: List(Value("large_string"))})


def token_features(columns: Collection[str]) -> Features:
    """The features of token rows with these columns: with images or without, packed or not."""
    features = VISION_FEATURES if IMAGE_REFS in columns else TOKEN_FEATURES
    return Features({**features, "seq_lengths": List(Value("int64"))}) if "seq_lengths" in columns else features


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises a ValueError for a tokenizer that cannot render a conversation."""
    if tokenizer.chat_template is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no chat template, so conversations cannot be rendered: set "
            "tokenizer.chat_template (a Jinja text; the tokenizer of the chat model of the family has one), or train "
            "on rows of 'text'."
        )


def internvl_template(name: str = "internvl") -> str:
    """The chat template of InternVL's checkpoints in transformers' layout, or "internvl_training", which marks what the
    assistant says."""
    return (files(__package__) / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def training_chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template that marks the assistant's tokens: a training variant of a template that is known here or to TRL, or
    None if the tokenizer's own does.

    Raises:
        ValueError: for a tokenizer without template, or one whose template has no marks and no known variant.
    """
    require_chat_template(tokenizer)
    if tokenizer.chat_template == internvl_template():
        return internvl_template("internvl_training")
    template = None
    if not has_generation_markers(tokenizer.chat_template):
        try:
            template = get_training_chat_template(tokenizer)
        except ValueError:
            raise ValueError(
                f"The chat template of {tokenizer.name_or_path!r} does not mark what the assistant says, and TRL has "
                "no training variant of it: put {% generation %} and {% endgeneration %} around the assistant's turn "
                "in the template, or set assistant_only_loss=False to train on every token of the conversations."
            ) from None
    return template


def warn_if_no_stop(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """TRL's trainer warns of this too: labels that never hold the end of a turn look healthy in training."""
    if not is_chat_template_stop_token_trained(tokenizer, chat_template=template):
        warn(
            logger,
            "The chat template leaves the end-of-turn token out of the assistant's marks: the model may not learn to "
            "stop. Move it in front of {% endgeneration %}.",
        )


def tokenize_conversations(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    assistant_only_loss: bool,
    chat_template: str | None = None,
    tiler: ImageTiler | None = None,
    num_proc: int | None = None,
    name: str = "dataset",
) -> Dataset | IterableDataset:
    """Rows of `messages` to `input_ids` and `labels` (int32 lists of equal length).

    The ids are those of `tokenizer.apply_chat_template` for the whole conversation. Labels are the ids where the
    template marks the assistant (`assistant_only_loss`), but for the turns flagged `loss: false`, and -100 elsewhere.
    A row of one message of role "pretrain" is a text: no template, and every token is learned.

    With a `tiler`, rows may have images (image_parts.py); their tokens stand in the ids, none of them is learned, and
    `image_refs`, one value a token, has what `ImageTiler.cut` takes where an image begins, and None elsewhere.

    Conversations with nothing to learn from (no assistant turn, or all flagged off) are left out, and counted in a
    warning.

    Raises:
        ValueError: names the row that is malformed, or whose flags cannot be applied.
    """
    return _map(
        dataset,
        _tokenize_conversations,
        {
            "tokenizer": tokenizer,
            "chat_template": chat_template,
            "assistant_only_loss": assistant_only_loss,
            "arrow_nulls": not holds_json(dataset),
            "tiler": tiler,
        },
        num_proc,
        name,
    )


def tokenize_texts(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_column: str = "text",
    tiler: ImageTiler | None = None,
    num_proc: int | None = None,
    name: str = "dataset",
) -> Dataset | IterableDataset:
    """Rows of text to `input_ids`, with the end-of-text token behind, and `labels` on all of them.

    Empty texts are left out, and counted in a warning. With a `tiler`, rows may have `images` (or `image`), and their
    text `<image>` where each stands; see `tokenize_conversations`.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no end-of-text token to put behind each text: set "
            "tokenizer.eos_token."
        )
    arguments = {"tokenizer": tokenizer, "text_column": text_column, "tiler": tiler}
    return _map(dataset, _tokenize_texts, arguments, num_proc, name)


def _map(dataset: Any, function: Any, arguments: dict[str, Any], num_proc: int | None, name: str) -> Any:
    """`dataset.map` in shards, so that a part of the work is kept when a run is stopped."""
    features = TOKEN_FEATURES if arguments["tiler"] is None else VISION_FEATURES
    keywords = {"batched": True, "with_indices": True, "features": features}
    dataset = with_encoded_images(dataset)
    # The version belongs to the cache's key: another one may tokenise otherwise.
    arguments = arguments | {"name": name, "version": __version__}
    if isinstance(dataset, IterableDataset):
        columns = dataset.column_names or list(next(iter(dataset)))
        return dataset.map(function, fn_kwargs=arguments | {"first": 0}, remove_columns=columns, **keywords)
    num_shards = max(1, math.ceil(len(dataset) / ROWS_PER_SHARD))
    done, first = [], 0
    for index in range(num_shards):
        shard = dataset.shard(num_shards, index, contiguous=True)
        description = f"Tokenizing {name}" + (f" ({index + 1}/{num_shards})" if num_shards > 1 else "")
        done.append(
            shard.map(
                function,
                fn_kwargs=arguments | {"first": first},
                remove_columns=dataset.column_names,
                num_proc=num_proc,
                desc=description,
                **keywords,
            )
        )
        first += len(shard)
    rows = datasets.concatenate_datasets(done)
    if len(rows) < len(dataset):
        missing = len(dataset) - len(rows)
        warn(logger, f"{name}: left out {missing:,} of {len(dataset):,} rows that have nothing to learn from.")
    if not len(rows):
        raise ValueError(f"{name} has no row to learn from: no assistant turn whose loss is on, or no text.")
    return rows


def _tokenize_conversations(
    batch: dict[str, list],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    assistant_only_loss: bool,
    arrow_nulls: bool,
    tiler: ImageTiler | None,
    name: str,
    first: int,
    version: str,
) -> dict[str, list]:
    result: dict[str, list] = {column: [] for column in (TOKEN_FEATURES if tiler is None else VISION_FEATURES)}
    for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
        row, where = dict(zip(batch, values, strict=True)), f"{name}[{first + index}]"
        try:
            conversation = check_conversation(row, arrow_nulls)
            images, conversation = take_images(conversation, tiler)
            input_ids, labels = tokenize_conversation(conversation, tokenizer, chat_template, assistant_only_loss)
            columns: tuple = (input_ids, labels)
            if tiler is not None:
                columns = tiler.expand(input_ids, labels, tiler.references(images, where), IGNORE_INDEX)
        except MalformedRow as error:
            raise ValueError(f"{where}: {error}") from None
        if any(label != IGNORE_INDEX for label in columns[1]):
            for column, values in zip(result, columns, strict=True):
                result[column].append(values)
    return result


def tokenize_conversation(
    conversation: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    assistant_only_loss: bool,
) -> tuple[list[int], list[int]]:
    """Token ids and labels of one conversation, as `check_conversation` returns it."""
    messages = [dict(message) for message in conversation["messages"]]
    if messages[0]["role"] == PRETRAIN:
        input_ids = _ended(tokenizer([messages[0]["content"]])["input_ids"][0], tokenizer)
        return input_ids, list(input_ids)
    flags = [message.pop("loss", None) for message in messages]
    turns = [flag is not False for message, flag in zip(messages, flags, strict=True) if message["role"] == "assistant"]
    encoded: Any = tokenizer.apply_chat_template(
        messages,
        tools=conversation["tools"],
        chat_template=chat_template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=assistant_only_loss,
        **conversation["chat_template_kwargs"],
    )
    input_ids = encoded["input_ids"]
    if not assistant_only_loss:
        if not all(turns):
            raise MalformedRow(
                "loss flags without marks",
                "a turn is flagged 'loss': false, which needs assistant_only_loss=True; set it, or remove the flags.",
            )
        return input_ids, list(input_ids)
    mask = encoded["assistant_masks"]
    if any(turns) and 1 not in mask:
        raise MalformedRow(
            "no marks",
            "the chat template marks none of the assistant's tokens here, though it has {% generation %}; mend the "
            "template, or set assistant_only_loss=False to train on every token.",
        )
    learned = _apply_flags(mask, turns)
    return input_ids, [token if on else IGNORE_INDEX for token, on in zip(input_ids, learned, strict=True)]


def _apply_flags(mask: list[int], turns: list[bool]) -> list[bool]:
    """The mask without the spans of turns that are off.

    Args:
        mask: 1 on the assistant's tokens.
        turns: for each assistant turn, whether it is learned.
    """
    if all(turns) or not any(turns):
        return [bool(bit) and all(turns) for bit in mask]
    span_of_token, spans = [], 0
    for before, bit in zip([0, *mask], mask, strict=False):
        spans += bit > before
        span_of_token.append(spans - 1)
    if spans != len(turns):
        raise MalformedRow(
            "loss flags without spans",
            f"the chat template marks {spans} spans for {len(turns)} assistant turns, so 'loss' flags cannot be told "
            "apart; join consecutive assistant turns, or give all of them the same flag.",
        )
    return [bool(bit) and turns[span] for bit, span in zip(mask, span_of_token, strict=True)]


def _tokenize_texts(
    batch: dict[str, list],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    text_column: str,
    tiler: ImageTiler | None,
    name: str,
    first: int,
    version: str,
) -> dict[str, list]:
    texts = batch[text_column]
    for index, text in zip(indices, texts, strict=True):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{first + index}]: {text_column!r} is {type(text).__name__}, not text.")
    if tiler is not None:
        # A text with images is a conversation without turns.
        columns: dict[str, list] = {"messages": [[{"role": PRETRAIN, "content": text}] for text in texts]}
        for key in ("images", "image", "width", "height"):
            if key in batch:
                columns[key] = batch[key]
        keep = [number for number, text in enumerate(texts) if text]
        rows = {key: [values[number] for number in keep] for key, values in columns.items()}
        indices = [indices[number] for number in keep]
        return _tokenize_conversations(rows, indices, tokenizer, None, False, True, tiler, name, first, version)
    ids = tokenizer([text for text in texts if text])["input_ids"] if any(texts) else []
    ids = [_ended(tokens, tokenizer) for tokens in ids]
    return {"input_ids": ids, "labels": ids}


def _ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    eos = tokenizer.eos_token_id
    return ids if ids[-1:] == [eos] else [*ids, eos]
