"""A stand-in for `CopyStream` whose copies happen as late as they may, so that reading too early shows."""

from __future__ import annotations

import torch


class LateCopies:
    """Copies when waited for, not before; until then the target is NaN.

    Attributes:
        log: ("copy" or "wait", number of the copy), in order.
    """

    def __init__(self):
        self.device = torch.device("cpu")
        self.log: list[tuple[str, int]] = []
        self._pending: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._copies = 0

    def host_like(self, tensor, dtype=None):
        return torch.empty_like(tensor, dtype=dtype)

    def copy_(self, target, source) -> int:
        target.fill_(float("nan"))
        self._copies += 1
        self._pending[self._copies] = (target, source)
        self.log.append(("copy", self._copies))
        return self._copies

    def wait(self, done: int) -> None:
        self.log.append(("wait", done))
        if done in self._pending:
            target, source = self._pending.pop(done)
            target.copy_(source)

    def synchronize(self) -> None:
        for done in list(self._pending):
            self.wait(done)

    @property
    def under_way(self) -> int:
        return len(self._pending)
