"""tests/ranks.py with NPUs: every process finds the stand-in, and they join by HCCL."""

from __future__ import annotations

import os
import sys
from typing import Any

from tests import npu_standin


def run_on_npus(function: str, world_size: int, timeout: float = 180, **kwargs: Any) -> list[Any]:
    """Call `module:function`(**kwargs) on each of `world_size` processes, each with an NPU of its own."""
    from tests.ranks import run_on_ranks

    return run_on_ranks(function, world_size, timeout, launcher="tests.npu.ranks", **kwargs)


if __name__ == "__main__":
    # Messages lie in the folder that is removed with the job, also when its processes are killed.
    os.environ |= {"ACCELERATE_USE_CPU": "false", "STANDIN_MAILBOX": sys.argv[2]}
    os.environ["TORCH_NPU_FALLBACK_CPU_DISABLE"] = "1"
    npu_standin.install()
    from tests.ranks import main

    main()
