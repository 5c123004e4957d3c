"""A Hub checkpoint written by the ranks that own the tensors: no rank ever holds a whole fused expert tensor.

    plan     every rank derives the same list of items (an expert, a dense tensor) from the registered conversions
    assign   an expert is written by a rank that has it, a dense tensor by the one with least to write
    stream   items in one order on all ranks: parts travel to the writer, are converted, and go to its file
    index    rank 0 writes config.json and model.safetensors.index.json

Files and index are named as transformers names them; which tensor is in which file depends on who owned it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .export_plan import Item, cast, convert, plan_export
from .safetensors_stream import SafetensorsWriter, TensorInfo
from .side_files import write_side_files
from .sources import Box, LiveTensors, TensorSource

DEFAULT_SHARD_BYTES = 5 * 10**9
_SHARD_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


@torch.no_grad()
def export_to_hub(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    source: TensorSource | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write weights, index and configuration of a model as the Hub has them. Collective.

    Args:
        model: in any layout; only its names, configuration and conversions are read if there is a `source`.
        folder: on storage that all ranks share. A checkpoint in it is replaced.
        source: where the values are; the model itself by default.
        dtype: of the weights in the files, bf16 of fp32 masters say; None keeps the model's. What the family keeps in
            fp32 stays so.
        max_shard_bytes: a file grows no larger, unless a single tensor is.
        group: a gloo group of all ranks; None in a job of one process.
    """
    folder = Path(folder)
    rank, world_size = (0, 1) if group is None else (dist.get_rank(), dist.get_world_size())
    source = source or LiveTensors(dict(model.state_dict()), group)
    items = plan_export(model, source.meta, dtype)
    if sum(item.num_bytes for item in items) <= max_shard_bytes:
        by_rank = [items, *([] for _ in range(world_size - 1))]  # one file, model.safetensors
    else:
        by_rank = assign_items(items, source, world_size)
    by_rank = [_widest_first(of_rank) for of_rank in by_rank]
    files = _Files(by_rank, max_shard_bytes)
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_weights(folder)
    _barrier(group)
    writer = _Output(folder, files.of_rank[rank])
    for writing_rank, item in schedule(by_rank):
        for _, converted in hub_tensors(model, source, item, writing_rank, dtype):
            for tensor in converted.values():
                writer.write(tensor)
    writer.close()
    _barrier(group)
    if rank == 0:
        _write_index(folder, files)
        write_configs(model, folder, dtype)
    _barrier(group)


def write_configs(model: PreTrainedModel, folder: Path, dtype: torch.dtype | None = None) -> None:
    """What lies beside the weights (side_files.py). Called on one rank."""
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    write_side_files(model, folder, dtype=dtype or model.dtype)


def _barrier(group: dist.ProcessGroup | None) -> None:
    if group is not None:
        dist.barrier(group)


def _remove_weights(folder: Path) -> None:
    for path in folder.glob("model*.safetensors*"):
        if _SHARD_NAME.fullmatch(path.name.removesuffix(".incomplete")) or path.name == SAFE_WEIGHTS_INDEX_NAME:
            path.unlink()


def assign_items(items: list[Item], source: TensorSource, world_size: int) -> list[list[Item]]:
    """The items that each rank writes: it holds as much of each as any other, and all have about as many bytes."""
    by_rank: list[list[Item]] = [[] for _ in range(world_size)]
    load = [0] * world_size
    candidates = []
    for item in items:
        box = Box.whole(source.meta[item.source].shape)
        shares = source.shares(item.source, box.expert(item.experts[0]) if item.experts else box)
        most = max(shares.values())
        candidates.append([rank for rank, share in shares.items() if share == most])
    # Those with the least choice first.
    for index in sorted(range(len(items)), key=lambda i: len(candidates[i])):
        rank = min(candidates[index], key=lambda r: load[r])
        by_rank[rank].append(items[index])
        load[rank] += items[index].num_bytes
    return by_rank


def schedule(by_rank: list[list[Item]]) -> Iterator[tuple[int, Item]]:
    """(writing rank, item) in an order that keeps all writers busy."""
    for row in zip_longest(*by_rank):
        yield from ((rank, item) for rank, item in enumerate(row) if item is not None)


def hub_tensors(
    model: PreTrainedModel, source: TensorSource, item: Item, writing_rank: int, dtype: torch.dtype | None
) -> Iterator[tuple[int | None, dict[str, torch.Tensor]]]:
    """(expert, its tensors by the Hub's names in the item's order) on the writing rank, nothing elsewhere. Collective.

    The expert is None for a tensor that is no expert's; of a tensor that the Hub has fused it is one run of rows.
    """
    for expert in item.experts or (None,):
        box = Box.whole(source.meta[item.source].shape)
        tensor = source.fetch(item.source, box if expert is None else box.expert(expert), writing_rank)
        if tensor is not None:
            converted = convert(model, item, cast(model, item.source, tensor, dtype))
            yield expert, {info.name: converted[name] for name, info in item.outputs.items()}


def _widest_first(items: list[Item]) -> list[Item]:
    # Wide dtypes first keeps every tensor of a file aligned.
    return sorted(items, key=lambda item: -max(tensor.dtype.itemsize for tensor in item.outputs.values()))


class _Files:
    """Each rank's items cut into files, with the names that transformers would give so many files."""

    def __init__(self, by_rank: list[list[Item]], max_shard_bytes: int):
        cut = [_cut(items, max_shard_bytes) for items in by_rank]
        number = sum(len(files) for files in cut)
        counter = iter(range(1, number + 1))
        stem = SAFE_WEIGHTS_NAME.removesuffix(".safetensors")
        # rank -> its files: name and tensors in order
        self.of_rank: list[list[tuple[str, list[TensorInfo]]]] = [
            [
                (SAFE_WEIGHTS_NAME if number == 1 else f"{stem}-{next(counter):05d}-of-{number:05d}.safetensors", file)
                for file in files
            ]
            for files in cut
        ]

    def weight_map(self) -> dict[str, str]:
        return {tensor.name: name for files in self.of_rank for name, file in files for tensor in file}


def _cut(items: list[Item], max_shard_bytes: int) -> list[list[TensorInfo]]:
    files: list[list[TensorInfo]] = []
    size = 0
    for item in items:
        if not files or size + item.num_bytes > max_shard_bytes:
            files.append([])
            size = 0
        files[-1] += item.outputs.values()
        size += item.num_bytes
    return files


class _Output:
    """This rank's files, one open at a time."""

    def __init__(self, folder: Path, files: list[tuple[str, list[TensorInfo]]]):
        self._folder = folder
        self._files = iter(files)
        self._open: SafetensorsWriter | None = None
        self._left = 0

    def write(self, tensor: torch.Tensor) -> None:
        if self._left == 0:
            self.close()
            name, tensors = next(self._files)
            self._open = SafetensorsWriter(self._folder / name, tensors)
            self._left = sum(info.num_bytes for info in tensors)
        assert self._open is not None
        self._open.write(tensor)
        self._left -= tensor.numel() * tensor.element_size()

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None


def _write_index(folder: Path, files: _Files) -> None:
    tensors = [tensor for of_rank in files.of_rank for _, file in of_rank for tensor in file]
    names = files.weight_map()
    if len(set(names.values())) <= 1:
        return
    total = {
        "total_parameters": sum(torch.Size(tensor.shape).numel() for tensor in tensors),
        "total_size": sum(tensor.num_bytes for tensor in tensors),
    }
    text = json.dumps({"metadata": total, "weight_map": names}, indent=2, sort_keys=True) + "\n"
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")
