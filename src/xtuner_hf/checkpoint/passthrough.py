"""Tensors of a trained model back in the format that they came in.

A block that did not change keeps its source's scale and with it its bytes; that takes reading the scales alone
(1 / 4096 of an FP8 checkpoint's bytes), not the source's weights.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .formats import part_specs
from .hub_source import HubSource, whole
from .quantised_format import CheckpointFormatError, Region, TensorSpec

# Buffers that old exports left in published checkpoints (Kimi K2); nobody reads them.
_STALE = ".rotary_emb.inv_freq"


class SourceEncoder:
    """Turns plain tensors under Hub names into what a checkpoint like its source stores.

    Args:
        source: the checkpoint that the model was loaded from.
        quantise: write what the source stores quantised that way again; otherwise write it as `dtype`.
        dtype: of tensors that the source stores quantised, with `quantise=False`.

    Raises:
        CheckpointFormatError: `quantise` for a format that we only read.
    """

    def __init__(self, source: HubSource, *, quantise: bool, dtype: torch.dtype = torch.bfloat16):
        if quantise and source.format is not None and not source.format.writable:
            raise CheckpointFormatError(
                f"xtuner_hf reads {type(source.format).__name__} checkpoints and does not write them; export in bf16."
            )
        self.source = source
        self.quantise = quantise
        self.dtype = dtype

    def specs(self, plain: TensorSpec) -> list[TensorSpec]:
        """What `encode` returns for this tensor; known before there are values."""
        if plain.name not in self.source:
            return [plain]
        if plain.name not in self.source.quantised:
            return [plain._replace(dtype=self.source.folder.spec(plain.name).dtype)]
        fmt = self.source.format
        if not self.quantise or fmt is None:
            return [plain._replace(dtype=self.dtype)]
        scale = plain.name + fmt.suffixes[1]
        scale_dtype = self.source.folder.spec(scale).dtype
        return [spec._replace(dtype=scale_dtype) if spec.name == scale else spec for spec in part_specs(fmt, plain)]

    def encode(self, name: str, tensor: torch.Tensor, rows: tuple[int, int] | None = None) -> dict[str, torch.Tensor]:
        """The stored tensors, by name; of those that did not change since they were read, the source's bytes.

        Args:
            tensor: the plain values, on any device, not a DTensor.
            rows: (start, stop) along the first dimension, where `tensor` is that part of the whole: some experts of
                a fused MXFP4 tensor, or whole blocks of rows in FP8 (multiples of `format.row_multiple`).

        Raises:
            ValueError: a weight that holds NaN or infinity, by name.
        """
        if name not in self.source:
            return {name: tensor}
        region = self._region(name, tensor, rows)
        if name not in self.source.quantised:
            return {name: self._as_stored(name, tensor, region)}
        fmt = self.source.format
        if not self.quantise or fmt is None:
            return {name: tensor.to(self.dtype)}
        scale = None if region is None else self.source.read_scale(name, region).to(tensor.device)
        try:
            parts = fmt.quantise(tensor, scale)
        except ValueError as error:
            raise ValueError(f"{name} cannot be quantised: {error}.") from error
        return {name + suffix: part for suffix, part in parts.items()}

    def left_over(self, written: Iterable[str]) -> list[str]:
        """Stored tensors of the source that the model does not hold, to be copied as they are (an MTP layer, say).

        Args:
            written: the plain names that were encoded.
        """
        done = {part for name in written for part in self.source.stored_names(name)}
        return [name for name in self.source.folder.names() if name not in done and not name.endswith(_STALE)]

    def _region(self, name: str, tensor: torch.Tensor, rows: tuple[int, int] | None) -> Region | None:
        """Where the tensor lies in the source's; None if it has another shape now, as a resized embedding has."""
        shape = self.source.shape(name)
        region = whole(shape) if rows is None else (rows, *whole(shape)[1:])
        if rows is not None and self.source.format is not None and name in self.source.quantised:
            multiple = self.source.format.row_multiple
            if rows[0] % multiple or (rows[1] % multiple and rows[1] != shape[0]):
                raise ValueError(f"rows {rows} of {name} cut through a block of {multiple} rows.")
        return region if tuple(tensor.shape) == tuple(stop - start for start, stop in region) else None

    def _as_stored(self, name: str, tensor: torch.Tensor, region: Region | None) -> torch.Tensor:
        stored_dtype = self.source.folder.spec(name).dtype
        is_rounded = torch.promote_types(tensor.dtype, stored_dtype) != tensor.dtype
        if is_rounded and region is not None:
            # The model holds fewer bits than the source: only the source knows the others.
            original = self.source.folder.read(name, region).to(tensor.device)
            if torch.equal(original.to(tensor.dtype), tensor):
                return original
        return tensor.to(stored_dtype)
