"""Where an export reads tensors: from the ranks of a running job, or from a training checkpoint on disk.

A box is the rectangular part of a tensor that a rank, or a chunk on disk, holds: (offset, size) by dimension.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from .._compat import compute_local_shape_and_global_offset
from ..parallel.shard import local_part
from .folder import SHARDS


class Box(NamedTuple):
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: torch.Size | tuple[int, ...]) -> Box:
        return cls((0,) * len(shape), tuple(shape))

    @property
    def volume(self) -> int:
        result = 1
        for size in self.sizes:
            result *= size
        return result

    def expert(self, index: int) -> Box:
        """The slice of that index along dimension 0."""
        return Box((self.offsets[0] + index, *self.offsets[1:]), (1, *self.sizes[1:]))

    def intersect(self, other: Box) -> Box:
        starts = tuple(map(max, self.offsets, other.offsets))
        ends = [min(a + s, b + t) for a, s, b, t in zip(*self, *other, strict=True)]
        return Box(starts, tuple(max(end - start, 0) for start, end in zip(starts, ends, strict=True)))

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Index of this part in a tensor that holds `outer`."""
        starts = [a - b for a, b in zip(self.offsets, outer.offsets, strict=True)]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.sizes, strict=True))


class TensorSource(Protocol):
    """Whole tensors that lie in parts."""

    meta: dict[str, torch.Tensor]
    """Name -> shape and dtype, as a tensor on "meta"."""

    def shares(self, name: str, box: Box) -> dict[int, int]:
        """Rank -> how many elements of the box it can read without asking others."""

    def fetch(self, name: str, box: Box, rank: int) -> torch.Tensor | None:
        """The box in host memory on `rank`, None elsewhere. Collective."""


def local_box(tensor: torch.Tensor) -> Box:
    """What of the whole tensor this rank holds."""
    if not isinstance(tensor, DTensor):
        return Box.whole(tensor.shape)
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Box(tuple(offsets), tuple(sizes))


class LiveTensors:
    """The tensors of a model on the ranks of a job. What another rank writes travels in parts no larger than asked for.

    Args:
        tensors: name -> this rank's tensor: DTensors, or plain tensors that are whole and equal on all ranks.
        group: a gloo group of all ranks; None in a job of one process.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], group: dist.ProcessGroup | None):
        self._tensors = tensors
        self._group = group
        self.meta = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in tensors.items()}
        self._rank = 0 if group is None else dist.get_rank()
        own = {name: local_box(tensor) for name, tensor in tensors.items()}
        boxes: list = [own]
        if group is not None:
            boxes = [None] * dist.get_world_size()
            dist.all_gather_object(boxes, own, group=group)
        # name -> each distinct part -> the ranks that hold it (replicas hold the same)
        self._holders: dict[str, dict[Box, list[int]]] = {name: {} for name in tensors}
        for rank, of_rank in enumerate(boxes):
            for name, box in of_rank.items():
                self._holders[name].setdefault(box, []).append(rank)

    def shares(self, name: str, box: Box) -> dict[int, int]:
        parts = [(ranks, held.intersect(box).volume) for held, ranks in self._holders[name].items()]
        return {rank: volume for ranks, volume in parts for rank in ranks if volume}

    def fetch(self, name: str, box: Box, rank: int) -> torch.Tensor | None:
        result = None
        for held, ranks in self._holders[name].items():
            part = held.intersect(box)
            if not part.volume:
                continue
            sender = rank if rank in ranks else ranks[0]
            if self._rank == rank and part == box and sender == rank:
                return self._part(name, box)
            if self._rank == rank and result is None:
                result = torch.empty(box.sizes, dtype=self.meta[name].dtype)
            if sender == rank:
                if result is not None:
                    result[part.within(box)] = self._part(name, part)
            elif self._rank == sender:
                dist.send(self._part(name, part).contiguous().view(torch.uint8), rank, group=self._group)
            elif result is not None:
                received = torch.empty(part.sizes, dtype=result.dtype)
                dist.recv(received.view(torch.uint8), sender, group=self._group)
                result[part.within(box)] = received
        return result

    def _part(self, name: str, part: Box) -> torch.Tensor:
        tensor = self._tensors[name].detach()
        return local_part(tensor)[part.within(local_box(tensor))].cpu()


class CheckpointTensors:
    """The model's tensors in a training checkpoint, read chunk by chunk as they were written.

    Args:
        folder: `checkpoint-N`.
        rank, world_size: of the converting job; each of its ranks reads what it writes.
    """

    def __init__(self, folder: Path, rank: int = 0, world_size: int = 1):
        self._rank, self._world_size = rank, world_size
        self._reader = dcp.FileSystemReader(folder / SHARDS)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._entries = {
            key.removeprefix("model."): (key, entry)
            for key, entry in metadata.state_dict_metadata.items()
            if key.startswith("model.") and isinstance(entry, dcp.TensorStorageMetadata)
        }
        self.meta = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for name, (_, entry) in self._entries.items()
        }
        self._cached: tuple[str, Box, torch.Tensor] | None = None

    def shares(self, name: str, box: Box) -> dict[int, int]:
        return dict.fromkeys(range(self._world_size), box.volume)

    def fetch(self, name: str, box: Box, rank: int) -> torch.Tensor | None:
        if rank != self._rank:
            return None
        result = torch.empty(box.sizes, dtype=self.meta[name].dtype)
        for chunk in self._entries[name][1].chunks:
            held = Box(tuple(chunk.offsets), tuple(chunk.sizes))
            part = held.intersect(box)
            if part.volume:
                result[part.within(box)] = self._chunk(name, held)[part.within(held)]
        return result

    def _chunk(self, name: str, box: Box) -> torch.Tensor:
        # Experts of a chunk are asked for one after the other; the file has it in one piece.
        if self._cached is None or self._cached[:2] != (name, box):
            self._cached = None  # before the next one is allocated
            key, entry = self._entries[name]
            target = torch.empty(box.sizes, dtype=entry.properties.dtype)
            asked = dcp.ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
            items = create_read_items_for_chunk_list(key, entry, [asked])
            self._reader.read_data(dcp.LoadPlan(items), _Into(target)).wait()
            self._cached = (name, box, target)
        return self._cached[2]


class _Into(dcp.DefaultLoadPlanner):
    """Reads into one tensor."""

    def __init__(self, target: torch.Tensor):
        super().__init__()
        self._target = target

    def lookup_tensor(self, index) -> torch.Tensor:
        return self._target
