"""Tensors of a checkpoint that our model has no place for (a tower for another sense), out as they came in.

They are copied from the source's files into one more shard, byte by byte, behind what was saved of the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .._compat import revert_weight_conversion
from .hub_folder import INDEX, SINGLE, HubFolder, shard_name, write_index
from .safetensors_stream import SafetensorsWriter, TensorInfo


def copy_unknown_tensors(model: Any, source: Path, target: Path) -> list[str]:
    """Copy what loading found no place for; returns the names. Called on one rank, when the weights are written.

    Args:
        model: its `unknown_tensors` are the names that loading reported.
        source: the folder that it was loaded from.
        target: the folder that it was saved to. Nothing is done where there are no weights (an adapter's).
    """
    if not model.unknown_tensors or not any((target / name).exists() for name in (SINGLE, INDEX)):
        return []
    given = HubFolder(source)
    # Loading renames before it reports.
    placeholders = {name: torch.empty(0, device="meta") for name in model.unknown_tensors}
    stored = {*placeholders, *revert_weight_conversion(model, placeholders)}
    written = HubFolder(target)
    missing = sorted(name for name in stored if name in given and name not in written)
    if missing:
        _append_shard(target, written, given, missing)
    return missing


def _append_shard(target: Path, written: HubFolder, given: HubFolder, names: list[str]) -> None:
    old_files = sorted(set(written.file_of.values()))
    number = len(old_files) + 1
    new_names = {old: shard_name(i, number) for i, old in enumerate(old_files, start=1)}
    extra = shard_name(number, number)
    infos = [_info(given, name) for name in names]
    infos.sort(key=lambda info: -info.dtype.itemsize)  # wide dtypes first keeps every tensor aligned
    writer = SafetensorsWriter(target / extra, infos)
    for info in infos:
        writer.write(given.read(info.name))
    writer.close()
    weight_map = {name: new_names[file] for name, file in written.file_of.items()} | dict.fromkeys(names, extra)
    total = sum(info.num_bytes for info in (*infos, *(_info(written, name) for name in written.names())))
    for old, new in new_names.items():
        (target / old).rename(target / new)
    write_index(target, weight_map, total)


def _info(folder: HubFolder, name: str) -> TensorInfo:
    spec = folder.spec(name)
    return TensorInfo(name, spec.dtype, spec.shape)
