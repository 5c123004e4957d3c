"""What holds for every test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

_LAUNCH_VARIABLES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")


@pytest.fixture(autouse=True)
def launch_variables_restored() -> Iterator[None]:
    """Training arguments with `fsdp` set variables that the next test's processes would take for a launch config."""
    before = {name: value for name, value in os.environ.items() if name.startswith(_LAUNCH_VARIABLES)}
    yield
    for name in [name for name in os.environ if name.startswith(_LAUNCH_VARIABLES)]:
        if name not in before:
            del os.environ[name]
    os.environ.update(before)
