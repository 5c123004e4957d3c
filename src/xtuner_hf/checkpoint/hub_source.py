"""A checkpoint folder seen by the names and shapes of its plain tensors, whatever it stores them as.

Everything about scales is checked when the folder is opened, from the file headers: a checkpoint that cannot be
dequantised is refused before a model is built.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .formats import quantised_format
from .hub_folder import HubFolder
from .quantised_format import CheckpointFormatError, QuantisedFormat, Region, TensorSpec, describe


def quantization_config_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The `quantization_config` of a `config.json`, also where a vision-language one keeps it, in `text_config`."""
    return config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")


class HubSource:
    """A checkpoint folder and the format of its tensors.

    Raises:
        CheckpointFormatError: a format that we do not know, a scale that is missing or has another shape, quantised
            weights under a `config.json` that does not say so.
    """

    def __init__(self, path: str | Path):
        self.folder = HubFolder(path)
        quantization_config = quantization_config_of(self.folder.config())
        self.format: QuantisedFormat | None = quantised_format(quantization_config) if quantization_config else None
        self.quantised: dict[str, tuple[int, ...]] = {}
        """Plain name -> plain shape of the tensors that are stored in parts."""
        if self.format is None:
            self._refuse_fp8()
        else:
            self.quantised = self._find_quantised(self.format)

    def _refuse_fp8(self) -> None:
        for name in self.folder.names():
            if self.folder.slice(name).get_dtype().startswith("F8"):
                raise CheckpointFormatError(
                    f"{self.folder.path} holds {name} in FP8, but its config.json has no quantization_config, so its "
                    "scales would be left out; take config.json from the repository that these weights come from."
                )

    def _find_quantised(self, fmt: QuantisedFormat) -> dict[str, tuple[int, ...]]:
        found: dict[str, dict[str, TensorSpec]] = defaultdict(dict)
        for name in self.folder.names():
            spec = self.folder.spec(name)
            part = fmt.part_of(spec)
            if part is not None:
                found[part[0]][part[1]] = spec
        missing = [name + s for name, parts in found.items() for s in fmt.suffixes if s not in parts]
        if missing:
            raise CheckpointFormatError(self._missing_parts(fmt, missing, found))
        return {name: fmt.plain_shape(parts) for name, parts in found.items()}

    def _missing_parts(self, fmt: QuantisedFormat, missing: list[str], found: dict) -> str:
        name = missing[0]
        have = next(iter(parts for plain, parts in found.items() if name in [plain + s for s in fmt.suffixes]))
        others = " and ".join(f"{part.name} ({describe(part)})" for part in have.values())
        state = f"has it as {describe(self.folder.spec(name))}" if name in self.folder else "does not have it"
        more = f" ({len(missing) - 1} more like it)" if len(missing) > 1 else ""
        return (
            f"{others} needs the tensor {name} to be dequantised, and {self.folder.path} {state}{more}; the checkpoint "
            "is incomplete, download it again."
        )

    def __contains__(self, name: str) -> bool:
        return name in self.quantised or name in self.folder

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a plain tensor."""
        return self.quantised[name] if name in self.quantised else self.folder.spec(name).shape

    def stored_names(self, name: str) -> list[str]:
        """The tensors of the folder that a plain one is stored in."""
        if name not in self.quantised or self.format is None:
            return [name]
        return [name + suffix for suffix in self.format.suffixes]

    def plain_names(self) -> list[str]:
        """Every tensor's plain name, in the folder's order."""
        parts = {part for name in self.quantised for part in self.stored_names(name)}
        return [*self.quantised, *(name for name in self.folder.names() if name not in parts)]

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """A plain tensor or a region of it; quantised ones dequantised, fp32 or exactly in bf16."""
        if name not in self.quantised or self.format is None:
            return self.folder.read(name, region)
        region = region or whole(self.quantised[name])
        wanted = self.format.part_regions(region)
        parts = {suffix: self.folder.read(name + suffix, part) for suffix, part in wanted.items()}
        return self.format.dequantise(parts, region)

    def read_scale(self, name: str, region: Region) -> torch.Tensor:
        """The scales of a region of a quantised tensor, as stored."""
        assert self.format is not None
        suffix = self.format.suffixes[1]
        return self.folder.read(name + suffix, self.format.part_regions(region)[suffix])

    def lazy_tensors(self) -> dict[str, Any]:
        """Plain name -> a view that reads what is indexed, for `from_pretrained(None, state_dict=...)`.

        transformers slices each view to the shard of this rank, so that a rank reads and dequantises that alone.
        """
        return {
            name: DequantisedView(self, name) if name in self.quantised else self.folder.slice(name)
            for name in self.plain_names()
        }


class DequantisedView:
    """A quantised tensor behind the face of safetensors' lazy views: shape, dtype and indexing by slices."""

    def __init__(self, source: HubSource, name: str):
        self._source = source
        self._name = name

    def get_shape(self) -> list[int]:
        return list(self._source.shape(self._name))

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, index: Any) -> torch.Tensor:
        """`view[...]`, or one slice of step 1 for each of the first dimensions."""
        shape = self._source.shape(self._name)
        slices = () if index is Ellipsis else index if isinstance(index, tuple) else (index,)
        bounds = [part.indices(size)[:2] for part, size in zip(slices, shape, strict=False)]
        region = (*((start, max(start, stop)) for start, stop in bounds), *whole(shape)[len(bounds) :])
        if any(start == stop for start, stop in region):
            return torch.empty([stop - start for start, stop in region])
        return self._source.read(self._name, region)


def whole(shape: tuple[int, ...]) -> Region:
    return tuple((0, size) for size in shape)
