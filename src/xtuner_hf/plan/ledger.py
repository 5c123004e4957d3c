"""Which tensors are alive: bytes by category and by memory pool, their peak, and their course over the step."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

# What memory is for, in the order in which pictures stack it.
PARAMETERS, OPTIMIZER, GRADIENTS = "parameters", "optimizer states", "gradients"
GATHERED, REDUCED = "gathered parameters", "gradients to reduce"
ACTIVATIONS, BACKWARD, STEP, INPUTS = "activations", "backward", "optimizer step", "inputs"
HOST = "host"
CATEGORIES = (PARAMETERS, OPTIMIZER, GRADIENTS, INPUTS, ACTIVATIONS, GATHERED, REDUCED, BACKWARD, STEP)

# Caching allocators hand out multiples of this.
BLOCK = 512


@dataclass(eq=False, slots=True)
class Block:
    """One storage."""

    size: int
    category: str
    pool: str
    made_by: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    alive: object = None  # a weak reference to the storage


class Sample(NamedTuple):
    """Bytes by category at a moment, in seconds since the step began."""

    time: float
    bytes: dict[str, int]


class Alike(NamedTuple):
    """What tensors have in common that are listed together."""

    category: str
    made_by: str
    shape: tuple[int, ...]
    dtype: str


@dataclass
class Held:
    """How many tensors alike there are, and their bytes together."""

    number: int = 0
    bytes: int = 0


@dataclass
class Peak:
    """The most memory in one region of a step, in bytes."""

    total: int = 0
    by_category: dict[str, int] = field(default_factory=dict)
    pools: dict[str, int] = field(default_factory=dict)  # each pool's own peak
    holders: dict[Alike, Held] = field(default_factory=dict)  # the largest


class Ledger:
    """Follows storages from their making to their end.

    Args:
        block: sizes are rounded up to multiples of it.
    """

    def __init__(self, block: int = BLOCK):
        self.block = block
        self._live: dict[int, Block] = {}
        self.total = self.host = 0
        self.by_category: Counter[str] = Counter()
        self._by_pool: Counter[str] = Counter()
        self.begin_step()

    def begin_step(self) -> None:
        self.regions: dict[str, Peak] = {}
        self.host_peak = self.host
        self.samples: list[Sample] = []
        self._rising, self._region, self._time = False, "", 0.0
        self._sampled = 0

    # ---- storages ----

    def add(
        self,
        tensor: torch.Tensor,
        category: str,
        *,
        pool: str = "",
        made_by: str = "",
        region: str = "",
        time: float = 0,
    ) -> None:
        """A tensor exists; nothing happens if its storage is known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        block = Block(self._rounded(storage.nbytes()), category, pool, made_by, tuple(tensor.shape), tensor.dtype)
        block.alive = weakref.ref(storage, lambda _: self._end(key))
        self._live[key] = block
        self._count(block, block.size, region, time)

    def resize(
        self, storage: torch.UntypedStorage, category: str, *, pool: str = "", region: str = "", time: float = 0
    ) -> None:
        """A storage has another size; one that grows from nothing begins a new life in this category and pool."""
        key = storage._cdata
        block = self._live.get(key)
        if block is None:
            block = Block(0, category, pool, "resize_", (), torch.uint8)
            block.alive = weakref.ref(storage, lambda _: self._end(key))
            self._live[key] = block
        size = self._rounded(storage.nbytes())
        if size > block.size:
            self._count(block, -block.size)
            block.size, block.category, block.pool = 0, category, pool
        change, block.size = size - block.size, size
        self._count(block, change, region, time)

    def assign(self, tensor: torch.Tensor, category: str) -> None:
        """This memory turns out to be for something else."""
        block = self._live.get(tensor.untyped_storage()._cdata)
        if block is None:
            self.add(tensor, category)
        elif block.category != category:
            self.by_category[block.category] -= block.size
            self.by_category[category] += block.size
            block.category = category

    def pass_through(self, size: int, category: str, *, pool: str = "", region: str = "", time: float = 0) -> None:
        """Bytes are taken and given back at once."""
        block = Block(self._rounded(size), category, pool, "", (), torch.uint8)
        if size:
            self._count(block, block.size, region, time)
            self._count(block, -block.size)

    def forget(self, tensor: torch.Tensor) -> None:
        """Stop counting a storage that lives on."""
        self._end(tensor.untyped_storage()._cdata)

    def is_on_host(self, tensor: torch.Tensor) -> bool:
        block = self._live.get(tensor.untyped_storage()._cdata)
        return block is not None and block.category == HOST

    def _rounded(self, size: int) -> int:
        return -(-size // self.block) * self.block

    def _end(self, key: int) -> None:
        block = self._live.pop(key, None)
        if block is not None:
            self._count(block, -block.size)

    def _count(self, block: Block, change: int, region: str = "", time: float = 0) -> None:
        if block.category == HOST:
            self.host += change
            self.host_peak = max(self.host_peak, self.host)
            return
        if self._rising and (change <= 0 or region != self._region):
            self._note_top()
        self.total += change
        self.by_category[block.category] += change
        self._by_pool[block.pool] += change
        if change > 0:
            if region not in self.regions:
                self.regions[region] = Peak(pools=dict(self._by_pool))
            pools = self.regions[region].pools
            pools[block.pool] = max(pools.get(block.pool, 0), self._by_pool[block.pool])
            if not self._rising:
                self._sample()
            self._rising, self._region, self._time = True, region, time

    def _note_top(self) -> None:
        """Memory has stopped rising. Only now, and not where it was allocated, is it known what all of it is for."""
        self._rising = False
        peak = self.regions[self._region]
        if self.total > peak.total:
            if self.total > peak.total * 1.003:  # the list of tensors is long: not at each small rise
                peak.holders = self._holders()
            peak.total, peak.by_category = self.total, dict(self.by_category)
        self._sample()

    def _sample(self) -> None:
        if abs(self.total - self._sampled) > self.total * 0.002:
            self._sampled = self.total
            self.samples.append(Sample(self._time, dict(self.by_category)))

    def end_step(self) -> None:
        if self._rising:
            self._note_top()

    def _holders(self, number: int = 12) -> dict[Alike, Held]:
        alike: defaultdict[Alike, Held] = defaultdict(Held)
        for block in self._live.values():
            if block.category != HOST and block.size > self.total / 1000:
                held = alike[Alike(block.category, block.made_by, block.shape, str(block.dtype)[6:])]
                held.number += 1
                held.bytes += block.size
        return dict(sorted(alike.items(), key=lambda item: -item[1].bytes)[:number])
