"""The planner: one rank's training step on fake tensors, with the code that will really run (docs/planner.md).

from xtuner_hf.plan import plan

plan("qwen3-235b-a22b", gpus=256, device="h800", seq_len=4096).verdict
"""

from __future__ import annotations

import importlib
from typing import Any

# Imported when first used: the command's `--help` needs no torch.
_HOMES = {
    "Job": "job",
    "Plan": "planning",
    "PlanError": "devices",
    "make_job": "planning",
    "page": "page",
    "plan": "planning",
    "plan_job": "planning",
    "search": "search",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
