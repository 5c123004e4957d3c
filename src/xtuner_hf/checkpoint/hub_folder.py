"""The tensors of a checkpoint folder by name: shapes from the file headers, values read where they are asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .quantised_format import CheckpointFormatError, Region, TensorSpec

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# safetensors' names of dtypes.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def shard_name(number: int, total: int) -> str:
    """Of the `number`-th of `total` files, counted from 1."""
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def write_index(folder: Path, file_of: dict[str, str], num_bytes: int) -> None:
    """Say which tensor is in which file.

    Args:
        num_bytes: of all tensors.
    """
    index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(file_of.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class HubFolder:
    """A folder with `config.json` and `model.safetensors`, or shards with their index.

    Attributes:
        file_of: tensor -> name of the file that holds it.

    Raises:
        CheckpointFormatError: no weights, a shard that the index names and that is not there, or a tensor that the
            index places in a file that does not hold it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.file_of = self._read_index()
        files = {name: self._open(name) for name in sorted(set(self.file_of.values()))}
        held = {name: set(file.keys()) for name, file in files.items()}
        for tensor, file in self.file_of.items():
            if tensor not in held[file]:
                raise CheckpointFormatError(f"{self.path / INDEX} places {tensor} in {file}, which does not hold it.")
        self._files = files

    def _read_index(self) -> dict[str, str]:
        if (self.path / INDEX).exists():
            return json.loads((self.path / INDEX).read_text(encoding="utf-8"))["weight_map"]
        if (self.path / SINGLE).exists():
            return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        raise CheckpointFormatError(f"{self.path} holds neither {INDEX} nor {SINGLE}; xtuner_hf reads safetensors.")

    def _open(self, file: str) -> Any:
        if not (self.path / file).exists():
            raise CheckpointFormatError(f"{self.path / INDEX} names {file}, which is not there; download it again.")
        return safe_open(self.path / file, framework="pt")

    def config(self) -> dict[str, Any]:
        """`config.json` as it stands."""
        return json.loads((self.path / "config.json").read_text(encoding="utf-8"))

    def __contains__(self, name: str) -> bool:
        return name in self.file_of

    def names(self) -> list[str]:
        return list(self.file_of)

    def slice(self, name: str) -> Any:
        """safetensors' lazy view of a tensor; indexing it reads."""
        return self._files[self.file_of[name]].get_slice(name)

    def spec(self, name: str) -> TensorSpec:
        view = self.slice(name)
        if view.get_dtype() not in _DTYPES:
            raise CheckpointFormatError(f"{name} has dtype {view.get_dtype()}, which xtuner_hf does not read.")
        return TensorSpec(name, _DTYPES[view.get_dtype()], tuple(view.get_shape()))

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """The tensor as stored, or a region of it."""
        view = self.slice(name)
        return view[...] if region is None else view[tuple(slice(start, stop) for start, stop in region)]
