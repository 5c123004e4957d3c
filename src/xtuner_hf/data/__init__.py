"""Conversations and texts, with images or without, to packed token rows and batches."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .collator import PackedCollator, VisionCollator
    from .load import load_conversations
    from .prepare import prepare_dataset
    from .processor import InternVLProcessor
    from .tiles import ImageTiler

_HOMES = {
    "ImageTiler": "tiles",
    "InternVLProcessor": "processor",
    "PackedCollator": "collator",
    "VisionCollator": "collator",
    "load_conversations": "load",
    "prepare_dataset": "prepare",
}

__all__ = [
    "ImageTiler",
    "InternVLProcessor",
    "PackedCollator",
    "VisionCollator",
    "load_conversations",
    "prepare_dataset",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
