"""Writes a safetensors file piece by piece, so that no more than a piece of it is in memory.

The format: 8 bytes with the length of a JSON header, the header, then the tensors' bytes one after the other
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from .folder import fsync

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file, before its values are there."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """One file. Its tensors arrive whole or in runs of rows, in the order announced (`write`) or by name (`append`).

    Args:
        path: of the file; until `close` it has another name.
        tensors: what will come.
    """

    def __init__(self, path: Path, tensors: list[TensorInfo]):
        self._path = path
        self._partial = path.with_name(path.name + ".incomplete")
        header: dict = {"__metadata__": {"format": "pt"}}
        self._end = 0
        self._next: dict[str, int] = {}  # where in the data the next rows of a tensor go
        for tensor in tensors:
            self._next[tensor.name] = self._end
            offsets = [self._end, self._end + tensor.num_bytes]
            header[tensor.name] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": offsets,
            }
            self._end = offsets[1]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors start aligned
        self._file = self._partial.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._data_start = 8 + len(text)
        self._written = 0

    def write(self, tensor: torch.Tensor) -> None:
        """Append the values of the next tensor, or of its next rows."""
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        data.numpy().tofile(self._file)
        self._written += data.numel()

    def append(self, name: str, tensor: torch.Tensor) -> None:
        """The values of this tensor, or its next rows."""
        self._file.seek(self._data_start + self._next[name])
        self._next[name] += tensor.nbytes
        self.write(tensor)

    def close(self) -> None:
        """Sync to disk and give the file its name."""
        self._file.flush()
        self._file.close()
        if self._written != self._end:
            raise RuntimeError(f"{self._path} was announced with {self._end} bytes of tensors and got {self._written}.")
        fsync(self._partial)
        self._partial.rename(self._path)
