"""Conversations and texts to packed token rows and batches."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .collator import PackedCollator
    from .load import load_conversations
    from .prepare import prepare_dataset

_HOMES = {"PackedCollator": "collator", "load_conversations": "load", "prepare_dataset": "prepare"}

__all__ = ["PackedCollator", "load_conversations", "prepare_dataset"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
