"""What the host reads back from the device and waits for: where the shapes of training depend on data.

    lengths of documents     once a micro-batch      attention/documents.py
    rows with a label        once a micro-batch      memory/logprobs.py
    tokens that are real     once a padded forward   memory/unpadded.py
    tokens of images         once a micro-batch      models/internvl/ (twice where ranks share the rows)
    rows between EP ranks    once a layer, early     moe/ep_dispatcher.py

Besides, and in no dry run: documents that are found by positions or a mask (attention/documents.py). Everything else is
queued without waiting. A dry run has no data to read: it answers in the device's place (`answered_by`), and from then
on runs the same code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch

from .device import is_host


class ExpertTraffic(NamedTuple):
    """What an EP dispatcher knows before it asks how many rows travel."""

    num_tokens: int
    top_k: int
    num_ranks: int
    num_experts_here: int
    max_pairs: int  # most experts of one token on one rank


class Pending(Protocol):
    """Numbers on their way to the host."""

    def wait(self) -> list: ...


class HostReads:
    """Reads for real."""

    def lengths(self, cu_seqlens: torch.Tensor) -> list[int]:
        """Tokens of each document, from [documents + 1] boundaries."""
        return cu_seqlens.diff().tolist()

    def true_rows(self, mask_N: torch.Tensor) -> torch.Tensor:
        """int64: where the mask is True."""
        return mask_N.nonzero()[:, 0]

    def image_tokens(self, mask_N: torch.Tensor) -> torch.Tensor:
        """int64: where a token of an image stands."""
        return self.true_rows(mask_N)

    def start_counts(self, counts: torch.Tensor, traffic: ExpertTraffic) -> Pending:
        """Queue the copy of an EP exchange's counts (moe/ep_dispatcher.py) to the host."""
        return HostCopy(counts)


class HostCopy:
    """A tensor on its way to the host: the copy is queued now, `wait` blocks until it has arrived."""

    def __init__(self, tensor: torch.Tensor):
        self._copy = tensor.to("cpu", non_blocking=True)  # into pinned memory, from a device
        self._event = None
        if not is_host(tensor.device):
            self._event = torch.Event(tensor.device.type)
            self._event.record()

    def wait(self) -> list:
        if self._event is not None:
            self._event.synchronize()
        return self._copy.tolist()


_reads = HostReads()


def host_reads() -> HostReads:
    """Who answers now."""
    return _reads


@contextlib.contextmanager
def answered_by(reads: HostReads) -> Iterator[None]:
    """Inside, `reads` answers in the device's place."""
    global _reads
    before, _reads = _reads, reads
    try:
        yield
    finally:
        _reads = before
