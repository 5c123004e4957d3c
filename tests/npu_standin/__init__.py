"""The real torch_npu on a machine without an Ascend NPU.

    from tests import npu_standin; npu_standin.install()      # before anything imports torch
    torch.ones(2, device="npu:0") + 1

torch_npu's wheel needs the shared libraries of CANN, Ascend's driver and operator stack. Here they are some hundred
lines of C++ over host memory (cann/), and the arithmetic is the CPU's: operators of torch run their CPU kernels
(kernels.cpp), torch_npu's own fused operators have references in Python (fused.py).

Real, executed from the wheel: the dispatcher's registrations, every operator's schema, torch_npu's autograd formulas,
its caching allocator, streams, events and generators, autocast, the routing of scaled_dot_product_attention,
ProcessGroupHCCL, and its patches of torch. Under TORCH_NPU_FALLBACK_CPU_DISABLE=1 an operator without an NPU kernel is
an error. Restrictions that Ascend documents are errors too ("NPU restriction: ...").

Not real: an NPU's rounding, its speed, and that it computes while Python goes on, so a missing wait for a stream is not
seen.

Environment: STANDIN_DEVICES (8), STANDIN_MEMORY_MB (8192 for all of them), STANDIN_SOC (Ascend910B1), STANDIN_MAILBOX
(where messages between ranks lie, /dev/shm), STANDIN_TIMEOUT (seconds, 100).
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from .build import EMPTY, build, missing

__all__ = ["install", "missing", "program_environment"]

HERE = Path(__file__).parent


def program_environment() -> dict[str, str]:
    """Variables under which any Python program finds the stand-in."""
    path = [str(HERE / "site"), str(HERE.parent.parent), str(HERE.parent.parent / "src")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def install() -> None:
    """Let `import torch` find NPUs in this process."""
    if "torch_npu" in sys.modules:
        return
    if "torch" in sys.modules:
        raise RuntimeError("npu_standin.install() comes too late: torch is imported already")
    libraries = build()
    # torch_npu looks for the folders of an installation.
    home = libraries / "home"
    for name in ("runtime", "compiler", "opp"):
        (home / name).mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "ASCEND_HOME_PATH": str(home),
        "ASCEND_OPP_PATH": str(home / "opp"),
        "TASK_QUEUE_ENABLE": "0",  # kernels run where they are called
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "1",
    }
    for name in ("ascendcl", *EMPTY):  # a library that is loaded is found by its name
        ctypes.CDLL(str(libraries / f"lib{name}.so"), ctypes.RTLD_GLOBAL)
    import torch  # noqa: F401  # loads torch_npu by its entry point

    ctypes.CDLL(str(libraries / "libkernels.so"), ctypes.RTLD_GLOBAL).install_kernels()
    from . import fused

    fused.register()
