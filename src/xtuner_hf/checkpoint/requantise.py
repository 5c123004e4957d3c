"""A bf16 checkpoint of a trained model, rewritten in the quantised format of the one that it was trained from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, GenerationConfig

from .hub_folder import HubFolder, shard_name, write_index
from .hub_source import HubSource
from .passthrough import SourceEncoder
from .quantised_format import CheckpointFormatError
from .side_files import copy_side_files, write_config_like, write_generation_config_like


def requantise_folder(
    trained: str | Path, source: str | Path, target: str | Path, *, shard_bytes: int = 5_000_000_000
) -> None:
    """Write `trained` to `target` as `source` stores it; what did not change, byte for byte.

    Needs the memory of one shard, no GPU and no model. Tensors that the source has and the trained checkpoint lacks
    (an MTP layer that was not trained) are copied.

    Args:
        trained: a checkpoint folder under Hub names, in bf16 or fp32.
        source: the quantised folder that the model was loaded from.
        shard_bytes: a file is closed once it has this many.

    Raises:
        CheckpointFormatError: the source is not quantised, or in a format that we only read.
    """
    trained_folder, target = HubFolder(trained), Path(target)
    encoder = SourceEncoder(HubSource(source), quantise=True)
    if encoder.source.format is None:
        raise CheckpointFormatError(f"{source} is not quantised; {trained} is in its format already.")
    target.mkdir(parents=True, exist_ok=True)
    shards = _Shards(target, shard_bytes)
    for name, tensor in _encoded(trained_folder, encoder):
        shards.add(name, tensor)
    shards.finish()
    _write_side_files(trained_folder.path, encoder.source.folder.path, target)


def _encoded(trained: HubFolder, encoder: SourceEncoder) -> Iterator[tuple[str, torch.Tensor]]:
    for name in trained.names():
        yield from encoder.encode(name, trained.read(name)).items()
    for name in encoder.left_over(trained.names()):
        yield name, encoder.source.folder.read(name)


def _write_side_files(trained: Path, source: Path, target: Path) -> None:
    write_config_like(source, target, AutoConfig.from_pretrained(trained), quantised=True)
    if (trained / "generation_config.json").exists():
        write_generation_config_like(source, target, GenerationConfig.from_pretrained(trained))
    for folder in (trained, source):
        copy_side_files(folder, target)


class _Shards:
    """Safetensors files of about the same size, and their index; as many as it takes, not known before."""

    def __init__(self, folder: Path, shard_bytes: int):
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.closed: list[list[str]] = []
        self.pending: dict[str, torch.Tensor] = {}
        self.pending_bytes = 0
        self.total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self.pending[name] = tensor.contiguous()
        self.pending_bytes += tensor.nbytes
        if self.pending_bytes >= self.shard_bytes:
            self._close()

    def finish(self) -> None:
        if self.pending:
            self._close()
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self.closed, start=1):
            file = shard_name(number, len(self.closed))
            self._unnamed(number).rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        write_index(self.folder, weight_map, self.total_bytes)

    def _close(self) -> None:
        self.closed.append(list(self.pending))
        save_file(self.pending, self._unnamed(len(self.closed)), metadata={"format": "pt"})
        self.total_bytes += self.pending_bytes
        self.pending, self.pending_bytes = {}, 0

    def _unnamed(self, number: int) -> Path:
        return self.folder / f"shard-{number}.tmp"
