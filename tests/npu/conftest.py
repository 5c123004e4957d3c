"""Everything in this folder runs on the real torch_npu over a stand-in for CANN (tests/npu_standin): `make test-npu`.

In an environment without torch_npu or a C++ compiler nothing of it is collected, and the summary says why.
"""

from __future__ import annotations

import os
import sys

import pytest

from tests import npu_standin

_not_run = npu_standin.missing()
if _not_run is None and "torch" in sys.modules and "torch_npu" not in sys.modules:
    _not_run = "torch was imported without its NPU backend; run `pytest tests/npu` alone"

if _not_run is None:
    # An operator without an NPU kernel is an error and not computed by the CPU. Read when torch_npu is loaded.
    os.environ["TORCH_NPU_FALLBACK_CPU_DISABLE"] = "1"
    npu_standin.install()
else:
    collect_ignore_glob = ["*test_*.py"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _not_run is not None:
        terminalreporter.write_line(f"tests/npu not run: {_not_run}")


@pytest.fixture
def calls():
    """Counts the fused operators of torch_npu that a test runs."""
    from tests.npu_standin.fused import CALLS

    CALLS.clear()
    return CALLS
