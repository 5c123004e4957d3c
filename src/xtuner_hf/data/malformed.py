"""The error of a row that cannot be trained on, and JSON's words for what was found in it."""

from __future__ import annotations

from typing import Any


class MalformedRow(ValueError):
    """A row that cannot be trained on.

    Args:
        reason: a few words, the same for all rows with this fault, to count by.
        problem: a sentence that says what was found in this row and what to change.
    """

    def __init__(self, reason: str, problem: str):
        super().__init__(problem)
        self.reason = reason


def kind(value: Any) -> str:
    """In JSON's words."""
    if value is None:
        return "null"
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), type(value).__name__)
