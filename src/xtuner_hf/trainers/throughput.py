"""Tokens per second and model FLOP/s, over training steps alone: evaluation and saving do not count."""

from __future__ import annotations

import time

import torch
from torch import nn

from ..device import data_sheet_flops, device_name, measured_matmul_flops
from ..models.flops import TrainingFlops


class ThroughputMeter:
    """Collects steps between two logs.

    Args:
        model: for its FLOPs.
        device: of this rank; all ranks have the same kind.
        num_devices: ranks that share the work.
    """

    def __init__(self, model: nn.Module, device: torch.device, num_devices: int):
        self.flops = TrainingFlops.of_model(model)
        self.num_devices = num_devices
        self.peak_flops = data_sheet_flops(device_name(device)) or measured_matmul_flops(device)
        self._started: float | None = None
        self._clear()

    def _clear(self) -> None:
        self._seconds = 0.0
        self._totals: list[torch.Tensor] = []

    def start(self) -> None:
        """A step begins, its data included."""
        self._started = time.perf_counter()

    def stop(self, totals: torch.Tensor) -> None:
        """A step ended; `totals` [4] int64: tokens, documents, squared lengths, tiles of images, over all ranks."""
        if self._started is None:
            return
        self._seconds += time.perf_counter() - self._started
        self._totals.append(totals)
        self._started = None

    def logs(self) -> dict[str, float]:
        """Figures since the last call: tokens/s of the job, and per device tokens/s, model TFLOP/s and MFU.

        MFU is against the data sheet's dense bf16 rate where the device has one, otherwise against the rate of a
        matrix product measured when training began.
        """
        if not self._totals or self._seconds == 0:
            return {}
        tokens, _, squared_lengths, tiles = torch.stack(self._totals).sum(0).tolist()
        flops = self.flops(tokens, squared_lengths, tiles) / self._seconds / self.num_devices
        logs = {
            "tokens_per_second": tokens / self._seconds,
            "tokens_per_second_per_device": tokens / self._seconds / self.num_devices,
            "model_tflops": flops / 1e12,
            "mfu": flops / self.peak_flops,
        }
        self._clear()
        return logs
