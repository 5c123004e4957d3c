"""What tests/npu/test_launch.py launches: one step of training, and where it ran."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from accelerate import PartialState

from tests.trainers.scenario import train

if __name__ == "__main__":
    run = train(dtype=torch.float32, batch=4, steps=1, use_cpu=False, ep_size=2, experts_kernel="grouped_mm")
    state = PartialState()
    run["where"] = (str(state.distributed_type), state.device.type, dist.get_backend(), dist.get_world_size())
    if state.is_main_process:
        torch.save(run, sys.argv[1])
