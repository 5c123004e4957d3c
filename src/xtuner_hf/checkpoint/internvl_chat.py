"""InternVL's two layouts on the Hub: transformers' (`*-HF` repositories) and that of InternVL's own code
(`InternVLChatModel`), which SGLang and InternVL's tools read. Tensors are renamed, and queries, keys and values of the
vision tower stand in one tensor there: converting is exact, byte by byte, in both directions.

    vision_tower.encoder.layer.0.attention.q_proj.weight   \\
    vision_tower.encoder.layer.0.attention.k_proj.weight    |-  vision_model.encoder.layers.0.attn.qkv.weight
    vision_tower.encoder.layer.0.attention.v_proj.weight   /
    multi_modal_projector.linear_1.weight                    -  mlp1.1.weight
    language_model.model.layers.0.mlp.gate.weight            -  the same

Tensors that are of neither (a tower for another sense) keep their names.

Legend: C hidden size of the vision tower.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from .hub_folder import SINGLE, HubFolder, shard_name, write_index
from .hub_source import quantization_config_of
from .internvl_chat_config import write_chat_files, write_hf_files
from .quantised_format import CheckpointFormatError
from .safetensors_stream import SafetensorsWriter, TensorInfo

_TOWER = ("vision_tower.", "vision_model.")
# (transformers', InternVL's), in this order in both directions.
_IN_TOWER = (
    ("embeddings.cls_token", "embeddings.class_embedding"),
    ("embeddings.position_embeddings", "embeddings.position_embedding"),
    ("embeddings.patch_embeddings.projection.", "embeddings.patch_embedding."),
    ("encoder.layer.", "encoder.layers."),
    (".attention.projection_layer.", ".attn.proj."),
    (".attention.", ".attn."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".lambda_1", ".ls1"),
    (".lambda_2", ".ls2"),
)
_PROJECTOR = (
    ("multi_modal_projector.layer_norm.", "mlp1.0."),
    ("multi_modal_projector.linear_1.", "mlp1.1."),
    ("multi_modal_projector.linear_2.", "mlp1.3."),
)
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_APART = re.compile(r"(vision_tower\..*\.attention\.)(q|k|v)(_proj\.(?:weight|bias))")
_FUSED = re.compile(r"(vision_model\..*\.attn\.)qkv(\.(?:weight|bias))")
DEFAULT_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class _Written:
    """A tensor of the target and the stored ones that it is made of."""

    info: TensorInfo
    sources: tuple[str, ...]
    make: Callable[..., torch.Tensor]


def to_chat_layout(
    source: str | Path,
    target: str | Path,
    *,
    like: str | Path | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write a checkpoint in transformers' layout as one of InternVL's own code.

    Args:
        source: folder with `model_type` "internvl".
        target: a new folder.
        like: a published checkpoint of the same architecture in that layout, whose Python files and `config.json` go
            along. Without it the configuration is put together, and readers without a class of their own need the code.

    Raises:
        CheckpointFormatError: another kind of checkpoint, a quantised one, or `like` is of another size.
    """
    folder = _open(source, "internvl")
    written = [_to_chat(folder, name) for name in folder.names()]
    _write(folder, Path(target), [each for each in written if each is not None], max_shard_bytes)
    write_chat_files(Path(source), Path(target), None if like is None else Path(like))


def to_hf_layout(source: str | Path, target: str | Path, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
    """Write a checkpoint of InternVL's own code (`model_type` "internvl_chat") in transformers' layout.

    Raises:
        CheckpointFormatError: another kind of checkpoint, a quantised one, or one whose images are read in another way.
    """
    folder = _open(source, "internvl_chat")
    written = [each for name in folder.names() for each in _to_hf(folder, name)]
    _write(folder, Path(target), written, max_shard_bytes)
    write_hf_files(Path(source), Path(target))


def _open(path: str | Path, model_type: str) -> HubFolder:
    folder = HubFolder(path)
    config = folder.config()
    if config.get("model_type") != model_type:
        raise CheckpointFormatError(
            f"{path} has model_type {config.get('model_type')!r}; a checkpoint of {model_type!r} was expected."
        )
    if quantization_config_of(config):
        raise CheckpointFormatError(f"{path} is quantised; convert the layout of a checkpoint in bf16.")
    return folder


def chat_name(name: str) -> str:
    """transformers' name -> InternVL's, of all tensors but queries, keys and values of the tower."""
    if name.startswith(_TOWER[0]):
        return _TOWER[1] + _replaced(name.removeprefix(_TOWER[0]), _IN_TOWER)
    return _replaced(name, _PROJECTOR) if name.startswith("multi_modal_projector.") else name


def hf_name(name: str) -> str:
    """InternVL's name -> transformers'."""
    if name.startswith(_TOWER[1]):
        return _TOWER[0] + _replaced(name.removeprefix(_TOWER[1]), [pair[::-1] for pair in _IN_TOWER])
    return _replaced(name, [pair[::-1] for pair in _PROJECTOR]) if name.startswith("mlp1.") else name


def _replaced(name: str, pairs: Iterable[tuple[str, ...]]) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def _to_chat(folder: HubFolder, name: str) -> _Written | None:
    spec = folder.spec(name)
    apart = _APART.fullmatch(name)
    if apart is None:
        return _Written(TensorInfo(chat_name(name), spec.dtype, spec.shape), (name,), lambda tensor: tensor)
    prefix, letter, suffix = apart.groups()
    if letter != "q":
        return None  # stands where the queries do
    sources = tuple(f"{prefix}{each}{suffix}" for each in "qkv")
    for each in sources:
        if each not in folder or folder.spec(each).shape != spec.shape:
            raise CheckpointFormatError(f"{folder.path} holds {name} {spec.shape}, and no {each} of this shape.")
    fused = chat_name(prefix) + "qkv" + suffix.removeprefix("_proj")
    shape = (3 * spec.shape[0], *spec.shape[1:])
    return _Written(TensorInfo(fused, spec.dtype, shape), sources, lambda *parts: torch.cat(parts))


def _to_hf(folder: HubFolder, name: str) -> list[_Written]:
    spec = folder.spec(name)
    fused = _FUSED.fullmatch(name)
    if fused is None:
        return [_Written(TensorInfo(hf_name(name), spec.dtype, spec.shape), (name,), lambda tensor: tensor)]
    prefix, suffix = fused.groups()
    shape = (spec.shape[0] // 3, *spec.shape[1:])

    def part(index: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda tensor: tensor.chunk(3)[index]

    return [
        _Written(TensorInfo(hf_name(prefix) + projection + suffix, spec.dtype, shape), (name,), part(index))
        for index, projection in enumerate(_PROJECTIONS)
    ]


def _write(folder: HubFolder, target: Path, written: list[_Written], max_shard_bytes: int) -> None:
    target.mkdir(parents=True, exist_ok=True)
    files: list[list[_Written]] = [[]]
    for each in written:
        if files[-1] and sum(w.info.num_bytes for w in files[-1]) + each.info.num_bytes > max_shard_bytes:
            files.append([])
        files[-1].append(each)
    names = [SINGLE] if len(files) == 1 else [shard_name(i + 1, len(files)) for i in range(len(files))]
    for name, tensors in zip(names, files, strict=True):
        # Wide dtypes first keeps every tensor of a file aligned.
        tensors.sort(key=lambda each: -each.info.dtype.itemsize)
        writer = SafetensorsWriter(target / name, [each.info for each in tensors])
        for each in tensors:
            writer.write(each.make(*map(folder.read, each.sources)))
        writer.close()
    if len(files) > 1:
        weight_map = {each.info.name: name for name, tensors in zip(names, files, strict=True) for each in tensors}
        write_index(target, weight_map, sum(each.info.num_bytes for each in written))
