"""Which tensors of the Hub come from which tensor of a model, expert by expert.

Derived from the conversions that transformers has registered for the family: their reverse is run on tensors without
data, once on each whole tensor for the names and shapes that the Hub has, and once on the slice of a single expert. The
reverse of an expert's slice must be that expert's part of the reverse; a conversion of which this is not true is an
error here and never a wrong file.

    Qwen3-MoE   gate_up_proj [E, 2I, H]  ->  experts.0.gate_proj.weight [I, H], experts.0.up_proj.weight, ...
    GPT-OSS     gate_up_proj [E, H, 2I]  ->  gate_up_proj [E, H, 2I], written one expert after the other

Legend: E experts, H hidden size, I expert intermediate size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from .._compat import revert_weight_conversion
from .safetensors_stream import TensorInfo

_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class ExportError(ValueError):
    """A model whose Hub tensors cannot be written without gathering fused experts."""


@dataclass(frozen=True)
class Item:
    """What one rank writes in one go: a tensor, an expert, or a fused tensor that the Hub has fused too.

    Args:
        source: name of the model's tensor.
        experts: of which slices along dimension 0 are converted, one after the other; None for the whole tensor.
        outputs: conversion's name of each result -> the Hub tensor that it is, or (several experts) runs of rows of.
    """

    source: str
    experts: tuple[int, ...] | None
    outputs: dict[str, TensorInfo]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.outputs.values())


def plan_export(
    model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None
) -> list[Item]:
    """All that a Hub checkpoint of the model holds.

    Args:
        model: on any device, sharded or not; names, configuration and conversions are taken from it.
        tensors: name -> tensor on "meta" with the whole shape, of all that a checkpoint of it holds.
        dtype: of the weights in the file; None keeps the model's.

    Raises:
        ExportError: for a conversion that needs several tensors, or all experts, at once.
    """
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ()) | _tied_names(model, tensors)
    tensors = {name: tensor for name, tensor in sorted(tensors.items()) if name not in ignored}
    items = []
    for name in tensors:
        whole = cast(model, name, tensors[name], dtype)
        hub = _convert(model, name, whole)
        if _is_fused_experts(model, name, whole):
            items += _expert_items(model, name, whole, hub)
        else:
            items.append(Item(name, None, {n: TensorInfo(n, t.dtype, tuple(t.shape)) for n, t in hub.items()}))
    _check_separable(model, tensors, items)
    return items


def cast(model: PreTrainedModel, name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """The tensor in the dtype of the file. Left alone: integers, FP8, and what the family keeps in fp32."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype is None or tensor.dtype not in _WEIGHT_DTYPES or not kept.isdisjoint(name.split(".")):
        return tensor
    return tensor.to(dtype)


def convert(model: PreTrainedModel, item: Item, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Hub tensors of a source tensor, or of one expert's slice [1, ...] of it, by the conversion's names."""
    return _convert(model, item.source, tensor)


def _convert(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    try:
        return revert_weight_conversion(model, {name: tensor})
    except Exception as error:  # whatever a conversion raises when a tensor that it needs is not there
        raise ExportError(
            f"The registered conversion of {name} ({model.config.model_type}) does not work on this tensor alone: "
            f"{error}. Save with model.save_pretrained(...), which gathers the whole model on rank 0."
        ) from error


def _tied_names(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """Second names of tied tensors, under which a checkpoint does not hold them."""
    names_of: dict[int, list[str]] = {}
    for name in sorted(tensors):
        names_of.setdefault(id(model.get_parameter_or_buffer(name)), []).append(name)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    dropped: set[str] = set()
    for names in names_of.values():
        second = [name for name in names if name in tied] or names[1:]
        dropped |= set(second[: len(names) - 1]) if len(names) > 1 else set()
    return dropped


def _is_fused_experts(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> bool:
    # The value of `num_experts` is this rank's under expert parallelism.
    return tensor.dim() >= 3 and hasattr(model.get_submodule(name.rpartition(".")[0]), "num_experts")


def _expert_items(model: PreTrainedModel, name: str, whole: torch.Tensor, hub: dict[str, torch.Tensor]) -> list[Item]:
    num_experts = whole.shape[0]
    one = _convert(model, name, whole[:1])
    if set(one) <= set(hub) and all(t.shape[0] == 1 and hub[n].shape[0] == num_experts for n, t in one.items()):
        if len(one) > 1:
            raise ExportError(f"The Hub has {name} as several fused tensors ({', '.join(one)}); one can be written.")
        outputs = {n: TensorInfo(n, t.dtype, tuple(t.shape)) for n, t in hub.items()}
        return [Item(name, tuple(range(num_experts)), outputs)]
    items = []
    templates = {n: _template(n, hub, num_experts) for n in one}
    for expert in range(num_experts):
        names = {n: template.format(expert) for n, template in templates.items()}
        outputs = {n: TensorInfo(names[n], t.dtype, tuple(t.shape)) for n, t in one.items()}
        if any(tuple(hub[names[n]].shape) != tensor.shape for n, tensor in outputs.items()):
            raise ExportError(f"The registered conversion of {name} does not treat experts one by one.")
        items.append(Item(name, (expert,), outputs))
    return items


def _template(name: str, hub: dict[str, torch.Tensor], num_experts: int) -> str:
    """The name of expert 0's tensor with `{}` for the expert."""
    parts = name.split(".")
    for position in (i for i, part in enumerate(parts) if part == "0"):
        template = ".".join((*parts[:position], "{}", *parts[position + 1 :]))
        if all(template.format(expert) in hub for expert in range(num_experts)):
            return template
    raise ExportError(f"{name} is no expert's tensor in the Hub's layout ({next(iter(hub))}, ...).")


def _check_separable(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], items: list[Item]) -> None:
    """Tensor by tensor and expert by expert, the same names and shapes as all at once."""
    expected = revert_weight_conversion(model, dict(tensors))
    found = {tensor.name: tensor.shape for item in items for tensor in item.outputs.values()}
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    if found != wanted:
        differing = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise ExportError(
            f"The conversions of {model.config.model_type} combine tensors: {differing[0]} is "
            f"{found.get(differing[0])} when converted alone and {wanted.get(differing[0])} with all others."
        )
