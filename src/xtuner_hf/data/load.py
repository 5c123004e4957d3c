"""`load_conversations`: files and Hub data sets of conversations, checked row by row."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, Image, Json, List, Value
from datasets.exceptions import DatasetGenerationError

from .conversation import check_conversation
from .images import image_size
from .malformed import MalformedRow
from .report import warn

logger = logging.getLogger(__name__)

_SUFFIXES = (".jsonl", ".json", ".parquet")
# Tools and tool calls are kept as JSON text: as structs, Arrow would give each the keys of all the others, and the JSON
# type of `datasets` rounds some numbers (0.3 becomes 0.30000000000000004).
_FEATURES = Features(
    {
        "messages": List(Json()),
        "tools": Value("string"),
        "chat_template_kwargs": Json(),
        "where": Value("string"),
        "reason": Value("string"),
        "problem": Value("string"),
    }
)
_FORMAT = 2  # of the cached rows: raise it when the checks or the features change


def load_conversations(
    source: str | Path | list[str | Path], on_bad_row: str = "error", split: str = "train"
) -> Dataset:
    """Conversations, each row checked.

    A row has `messages`: turns with `role` (system, developer, user, assistant, tool) and `content` (text or text
    parts), the assistant's perhaps with `tool_calls`. A turn with `"loss": false` (or `"weight": 0`) is read by the
    model but not learned. `tools` (JSON schemas) and `chat_template_kwargs` are handed to the template. Other columns
    are left out. The ShareGPT shape (`conversations` of from/value) is taken too.

    Images stand in parts of `content`, or in the row's `images` with `<image>` in the text where each belongs
    (docs/vision-data.md). Relative paths are looked for from the folder of the file. Images are not decoded here; where
    a row does not give `width` and `height`, the header of the file is read, and a missing or broken file is a bad row.

    The rows are cached by `datasets`, per file, until the file changes.

    Args:
        source: one or more files (`.jsonl`, `.json`: a list or lines, `.parquet`), a folder of such files, or the name
            of a data set on the Hub.
        on_bad_row: "error" raises at the first malformed row; "skip" leaves malformed rows out and logs how many for
            which reason.
        split: of a data set on the Hub.

    Returns:
        A data set with the columns `messages`, and `tools` and `chat_template_kwargs` if any row has them. The calls
        of a turn (`tool_calls`) and `tools` are JSON text, as our trainers and `prepare_dataset` read them.

    Raises:
        FileNotFoundError: for a path that does not exist.
        ValueError: for a source without rows, a malformed row ("error"), or no good row at all.
    """
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"on_bad_row is {on_bad_row!r}; use 'error' or 'skip'.")
    sources = source if isinstance(source, list) else [source]
    parts = [part for one in sources for part in _read(one, split)]
    rows = datasets.concatenate_datasets(parts)
    return _drop_bookkeeping(_judge(rows, on_bad_row))


def _judge(rows: Dataset, on_bad_row: str) -> Dataset:
    reasons = rows.select_columns("reason")["reason"][:]
    bad = [index for index, reason in enumerate(reasons) if reason is not None]
    if not bad:
        return rows
    first = f"{rows[bad[0]]['where']}: {rows[bad[0]]['problem']}"
    if on_bad_row == "error":
        more = f" (and {len(bad) - 1:,} more malformed rows of {len(rows):,})" if len(bad) > 1 else ""
        raise ValueError(f"{first}{more} Set on_bad_row='skip' to leave such rows out.")
    counts = Counter(reasons[index] for index in bad)
    summary = ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
    if len(bad) == len(rows):
        raise ValueError(f"All {len(rows):,} rows are malformed ({summary}). The first, {first}")
    warn(logger, f"Left out {len(bad):,} of {len(rows):,} rows: {summary}. The first, {first}")
    left_out = set(bad)
    return rows.select([index for index in range(len(rows)) if index not in left_out])


def _drop_bookkeeping(rows: Dataset) -> Dataset:
    optional = ["tools", "chat_template_kwargs"]
    table = rows.select_columns(optional).with_format("arrow")[:]
    unused = [name for name in optional if table[name].null_count == len(rows)]
    return rows.remove_columns(["where", "reason", "problem", *unused])


def _read(source: str | Path, split: str) -> list[Dataset]:
    """The rows of a source, malformed ones with `reason` and `problem` in place of their messages."""
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
        if not files:
            raise FileNotFoundError(f"The folder {str(path)!r} holds no {', '.join(_SUFFIXES)} file.")
        return [_read_file(file) for file in files]
    if path.is_file():
        return [_read_file(path)]
    if path.suffix in (*_SUFFIXES, ".txt", ".csv", ".gz", ".zst") or path.is_absolute():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    return [_check_table(datasets.load_dataset(str(source), split=split), f"{source} ({split})")]


def _read_file(path: Path) -> Dataset:
    if path.suffix == ".parquet":
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train")
        return _check_table(rows, str(path), path.resolve().parent)
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{str(path)!r} is of a kind that is not read here; convert it to {' or '.join(_SUFFIXES)}.")
    stat = path.stat()
    # The cache goes by the arguments of the generator: size and time change when the file does.
    key = {"path": str(path.resolve()), "name": str(path), "changed": (stat.st_size, stat.st_mtime_ns, _FORMAT)}
    try:
        return Dataset.from_generator(_json_rows, features=_FEATURES, gen_kwargs=key)
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None


def _json_rows(path: str, name: str, changed: tuple) -> Iterator[dict[str, Any]]:
    is_list = path.endswith(".json") and _starts_with_bracket(path)
    lines = enumerate(_items(path, name), 1) if is_list else _lines(path)
    number = 0
    for number, line in lines:
        where = f"{name}, {'row' if is_list else 'line'} {number}"
        try:
            yield _checked(_parse(line, path, is_list), where, image_root=Path(path).parent)
        except MalformedRow as error:
            yield _malformed(where, error)
    if not number:
        raise ValueError(f"{name} is empty: there is no conversation in it.")


def _starts_with_bracket(path: str) -> bool:
    with open(path, "rb") as file:
        return next((line.lstrip(b"\xef\xbb\xbf \t")[:1] for line in file if line.strip()), b"") == b"["


def _items(path: str, name: str) -> list[Any]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file, parse_constant=_no_constant)
    except ValueError as error:
        # Rows behind the fault cannot be told apart: not one to skip.
        raise ValueError(
            f"{name} is a JSON list that cannot be read ({error}); mend it, or write one row a line."
        ) from None


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def _parse(line: Any, path: str, is_list: bool) -> Any:
    if is_list:
        return line
    try:
        return json.loads(line.decode("utf-8-sig"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise MalformedRow("not UTF-8", f"the line is not UTF-8 ({error}); convert the file.") from None
    except (ValueError, RecursionError) as error:
        if line.endswith(b"\n"):
            raise MalformedRow(
                "invalid JSON", f"the line is not JSON ({error}); write one JSON object a line."
            ) from None
        raise MalformedRow(
            "cut-off last line",
            f"the last line is not JSON ({error}) and has no end: the file seems cut off; copy it anew.",
        ) from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _check_table(rows: Dataset, name: str, image_root: Path | None = None) -> Dataset:
    """Checks rows that are in Arrow already."""
    if not len(rows):
        raise ValueError(f"{name} is empty: there is no conversation in it.")
    rows = with_encoded_images(rows)

    return rows.map(
        _check_table_row,
        with_indices=True,
        fn_kwargs={"name": name, "arrow_nulls": not holds_json(rows), "image_root": image_root, "version": _FORMAT},
        features=_FEATURES,
        remove_columns=rows.column_names,
        desc="Checking conversations",
    )


def _check_table_row(
    row: dict, index: int, name: str, arrow_nulls: bool, image_root: Path | None, version: int
) -> dict[str, Any]:
    where = f"{name}, row {index + 1}"
    try:
        return _checked(row, where, arrow_nulls, image_root)
    except MalformedRow as error:
        return _malformed(where, error)


def holds_json(rows: Any) -> bool:
    """Whether messages are of the JSON type of `datasets`, which adds no keys, and not structs."""
    feature = (rows.features or {}).get("messages")
    return isinstance(getattr(feature, "feature", feature), Json)


def with_encoded_images(rows: Any) -> Any:
    """Rows whose columns of images give files instead of pixels: nothing is decoded before a batch needs it."""
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            rows = rows.cast_column(name, List(Image(decode=False)))
    return rows


def _checked(row: Any, where: str, arrow_nulls: bool = False, image_root: Path | None = None) -> dict[str, Any]:
    conversation = check_conversation(row, arrow_nulls, image_root)
    messages, tools = conversation["messages"], conversation["tools"]
    for message in messages:
        for image in message.get("images", ()):
            image["width"], image["height"] = image_size(image)
        if "tool_calls" in message:
            message["tool_calls"] = json.dumps(message["tool_calls"], ensure_ascii=False)
    stored = {
        # As text, which `datasets` keeps as it is: a dict would go through its rounding.
        "messages": [json.dumps(message, ensure_ascii=False) for message in messages],
        "tools": None if tools is None else json.dumps(tools, ensure_ascii=False),
        "chat_template_kwargs": json.dumps(conversation["chat_template_kwargs"])
        if conversation["chat_template_kwargs"]
        else None,
    }
    try:
        json.dumps(stored, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise MalformedRow("not Unicode", f"the text has half of a surrogate pair ({error}); repair it.") from None
    return stored | {"where": where, "reason": None, "problem": None}


def _malformed(where: str, error: MalformedRow) -> dict[str, Any]:
    problem = str(error).encode("utf-8", "replace").decode()
    return dict.fromkeys(("messages", "tools", "chat_template_kwargs")) | {
        "where": where,
        "reason": error.reason,
        "problem": problem,
    }
