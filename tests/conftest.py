"""What holds for every test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

_LAUNCH_VARIABLES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")


_TESTS = Path(__file__).parent
_LONGEST_FIRST = ("engines", "trainers", "parallel")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: two workers then end at nearly the same time."""
    rank = {name: place for place, name in enumerate(_LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.relative_to(_TESTS).parts[0], len(rank)))


@pytest.fixture(autouse=True)
def launch_variables_restored() -> Iterator[None]:
    """Training arguments with `fsdp` set variables that the next test's processes would take for a launch config."""
    before = {name: value for name, value in os.environ.items() if name.startswith(_LAUNCH_VARIABLES)}
    yield
    for name in [name for name in os.environ if name.startswith(_LAUNCH_VARIABLES)]:
        if name not in before:
            del os.environ[name]
    os.environ.update(before)
