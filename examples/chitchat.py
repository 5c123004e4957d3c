"""Conversations to train on: the 4,013 real dialogues between two people in the package `chitchat-dataset`."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import chitchat_dataset


def write_conversations(folder: Path, eval_share: float = 0.02, seed: int = 0) -> tuple[Path, Path]:
    """Write `train.jsonl` and `eval.jsonl` into `folder`; which conversation goes where depends on the seed alone.

    Who speaks first is the user, the other one the assistant. What one of them says in a row is one turn, its messages
    on lines of their own. Of the package's 7,168 records, 3,151 are an opening line without an answer, which is
    nothing to learn from, and four are copies of others.

    Args:
        eval_share: of the conversations, held out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = list(dict.fromkeys(json.dumps(row, ensure_ascii=False) + "\n" for row in _conversations()))
    random.Random(seed).shuffle(lines)
    num_eval = round(len(lines) * eval_share)
    paths = folder / "train.jsonl", folder / "eval.jsonl"
    for path, part in zip(paths, (lines[num_eval:], lines[:num_eval]), strict=True):
        path.write_text("".join(part), encoding="utf-8")
    return paths


def _conversations() -> Iterator[dict]:
    for record in chitchat_dataset.Dataset().values():
        messages: list[dict] = []
        speakers: list[str] = []
        for message in (message for block in record["messages"] for message in block):
            text = message["text"].strip()
            if not text:
                continue
            if message["sender"] not in speakers:
                speakers.append(message["sender"])
            role = ("user", "assistant")[speakers.index(message["sender"])]
            if messages and messages[-1]["role"] == role:
                messages[-1]["content"] += "\n" + text
            else:
                messages.append({"role": role, "content": text})
        if len(speakers) == 2:
            yield {"messages": messages}
