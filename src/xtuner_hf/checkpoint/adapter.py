"""Adapters (PEFT's LoRA) on disk: as PEFT has them, for each expert apart, or merged into a Hub checkpoint.

    adapter_model.safetensors           PEFT's layout for `target_parameters`: all experts of a layer in one matrix
      ...mlp.experts.base_layer.lora_A.weight    gate_up_proj [E*Q, H]
      ...mlp.experts.base_layer.lora_B.weight                 [2I, Q*E]
      ...mlp.experts.lora_A.weight               down_proj    [E*Q, I]
      ...mlp.experts.lora_B.weight                            [H, Q*E]
    per expert                          what engines and PEFT read for checkpoints that hold experts one by one
      ...mlp.experts.0.gate_proj.lora_A.weight   [Q, H]       the same for gate and up
      ...mlp.experts.0.gate_proj.lora_B.weight   [I, Q]       the upper half of gate_up_proj's, up_proj the lower
      ...mlp.experts.0.down_proj.lora_A.weight   [Q, I]

Legend: E experts, H hidden size, I expert intermediate size, Q rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from peft.tuners.lora import Linear, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from .._compat import get_checkpoint_conversion_mapping
from ..parallel.adapters import base_model, without_adapters
from .export import export_to_hub
from .export_plan import ExportError
from .folder import read_facts
from .sources import Box, CheckpointTensors, LiveTensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PROJECTIONS = ("gate_up_proj", "down_proj")


# ---- PEFT's layout ----


@torch.no_grad()
def write_adapter(model: Any, folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Write what PEFT's `save_pretrained` does, of a model in any layout. Collective.

    Each rank holds one whole tensor of the adapter at a time, rank 0 keeps them in host memory.
    """
    is_writer = group is None or dist.get_rank() == 0
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.requires_grad or model.base_model.prefix in name:
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if is_writer:
                state[name] = whole.detach().cpu()
    if is_writer:
        model.save_pretrained(folder, state_dict=state)
    if group is not None:
        dist.barrier(group)


def write_adapter_config(model: Any, folder: Path) -> None:
    """`adapter_config.json` of the active adapter alone. Called on one rank."""
    config = model.peft_config[model.active_adapter]
    was, config.inference_mode = config.inference_mode, True
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode = was


def convert_adapter(source: Path, out: Path, per_expert: bool) -> None:
    """Make PEFT's files of a training checkpoint with adapters.

    Args:
        source: `checkpoint-N`.
        per_expert: a tensor for each expert in place of PEFT's fused ones.

    Raises:
        ExportError: for a layout that has no such tensors.
    """
    config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    state = _read_shards(source)
    if per_expert:
        _check_hub_layout((read_facts(source) or {}).get("model_type"))
        state, config = per_expert_layout(state, config)
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, out / WEIGHTS, metadata={"format": "pt"})
    (out / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_hub_layout(model_type: str | None) -> None:
    conversions = get_checkpoint_conversion_mapping(model_type) or []
    sources = [pattern for conversion in conversions for pattern in conversion.source_patterns]
    if not any(pattern.endswith("experts.*.gate_proj.weight") for pattern in sources):
        raise ExportError(f"Checkpoints of {model_type} do not hold experts one by one: its adapters have one layout.")


def _read_shards(checkpoint: Path) -> dict[str, torch.Tensor]:
    source = CheckpointTensors(checkpoint)
    state: dict[str, Any] = {}
    for name, tensor in source.meta.items():
        match = re.fullmatch(r"(.*\.lora_(?:A|B|embedding_A|embedding_B))\.[^.]+(\.weight)?", name)
        saved = re.fullmatch(r"(.*)\.modules_to_save\.[^.]+(\..*)", name)
        found = match or saved
        if found:
            state["".join(part or "" for part in found.groups())] = source.fetch(name, Box.whole(tensor.shape), 0)
    return state


# ---- for each expert apart ----


def per_expert_layout(state: dict[str, torch.Tensor], config: dict[str, Any]) -> tuple[dict, dict]:
    """The same adapter with the factors of each expert apart, as for a model whose experts are modules of their own.

    Raises:
        ExportError: where ranks differ between parameters.
    """
    adapted = [name for name in _PROJECTIONS if any(t.endswith(name) for t in config.get("target_parameters") or ())]
    if not adapted:
        raise ExportError("The adapter has no target_parameters of fused experts: it has one layout only.")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise ExportError("rank_pattern and alpha_pattern of fused experts have no counterpart for single experts.")
    result = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(.*\.experts)(\.base_layer)?\.lora_([AB])\.weight", name)
        if match is None:
            result[name] = tensor
            continue
        prefix, is_inner, factor = match.groups()
        projection = adapted[0] if is_inner or len(adapted) == 1 else adapted[1]
        result |= dict(_single_experts(prefix, projection, factor, tensor, config["r"]))
    modules = {"gate_up_proj": ["gate_proj", "up_proj"], "down_proj": ["down_proj"]}
    targets = [*(config["target_modules"] or []), *(module for name in adapted for module in modules[name])]
    return result, config | {"target_modules": sorted(set(targets)), "target_parameters": None}


def _single_experts(
    prefix: str, projection: str, factor: str, tensor: torch.Tensor, rank: int
) -> Iterator[tuple[str, torch.Tensor]]:
    num_experts = tensor.shape[0 if factor == "A" else 1] // rank
    for expert in range(num_experts):
        part = tensor[expert * rank : (expert + 1) * rank] if factor == "A" else tensor[:, expert::num_experts]
        if projection == "down_proj":
            parts = {"down_proj": part}
        elif factor == "A":
            parts = {"gate_proj": part.clone(), "up_proj": part.clone()}
        else:
            parts = dict(zip(("gate_proj", "up_proj"), part.chunk(2), strict=True))
        for module, values in parts.items():
            yield f"{prefix}.{expert}.{module}.lora_{factor}.weight", values


# ---- merged ----


class Adapter(NamedTuple):
    """The LoRA factors of one tensor of the model; `num_experts` is 0 for a plain matrix."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float
    num_experts: int
    is_transposed: bool


def export_merged(
    model: Any, folder: Path, *, dtype: torch.dtype | None = None, group: dist.ProcessGroup | None = None
) -> None:
    """`export_to_hub` of the model with its active adapters merged into the weights. Collective.

    No rank holds a whole fused tensor, and the running model is not changed.

    Raises:
        ExportError: for adapters that are not plain LoRA on linear layers or expert parameters.
    """
    source = merged_tensors(model, group)
    with without_adapters(model):
        export_to_hub(base_model(model), folder, source=source, dtype=dtype, group=group)


def merged_tensors(model: Any, group: dist.ProcessGroup | None = None) -> MergedTensors:
    """The tensors of an adapted model, with its active adapters merged into what is fetched of them. Collective.

    Raises:
        ExportError: for adapters that are not plain LoRA on linear layers or expert parameters.
    """
    base = base_model(model)
    adapters = dict(_adapters(base))
    with without_adapters(model):
        tensors = dict(base.state_dict())
    return MergedTensors(tensors, adapters, group)


def _adapters(base: Any) -> Iterator[tuple[str, list[Adapter]]]:
    """Name of a tensor of the model without adapters -> the adapters on it."""
    for path, module in base.named_modules():
        if hasattr(module, "modules_to_save"):
            raise ExportError(f"{path} is trained as a whole (modules_to_save): merge with PEFT's merge_and_unload().")
        if not isinstance(module, BaseTunerLayer):
            continue
        is_plain = isinstance(module, (Linear, ParamWrapper))
        layer: Any = module
        names = [name for name in layer.active_adapters if is_plain and name in layer.lora_A]
        if not is_plain or any(layer.use_dora.get(name) or layer.lora_bias.get(name) for name in names):
            raise ExportError(f"{path} has a {type(layer).__name__} that is not plain LoRA: merge with PEFT.")
        tensor = f"{path.replace('.base_layer', '')}.{getattr(layer, 'parameter_name', 'weight')}"
        yield tensor, [] if layer.merged else [_adapter(layer, name) for name in names]


def _adapter(layer: Any, name: str) -> Adapter:
    num_experts = getattr(layer, "num_experts", 1)
    is_transposed = num_experts > 1 and getattr(layer.get_base_layer(), "is_transposed", False)
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    return Adapter(down, up, layer.scaling[name], num_experts if num_experts > 1 else 0, is_transposed)


class MergedTensors:
    """The tensors of a model with adapters merged into the parts that are asked for.

    Args:
        tensors: of the model without adapters, by its own names.
        adapters: on which of them.
        group: a gloo group of all ranks; None in a job of one process.
    """

    def __init__(
        self, tensors: dict[str, torch.Tensor], adapters: dict[str, list[Adapter]], group: dist.ProcessGroup | None
    ):
        factors: dict[str, torch.Tensor] = {}
        for name, of_tensor in adapters.items():
            for index, adapter in enumerate(of_tensor):
                down, up = adapter.down, adapter.up
                # PEFT interleaves the experts' columns: by this view, an expert's are a box.
                up = up.view(up.shape[0], -1, adapter.num_experts) if adapter.num_experts else up
                factors |= {f"{name}.down.{index}": down, f"{name}.up.{index}": up}
        self._adapters = adapters
        self._live = LiveTensors(tensors | factors, group)
        self.meta = {name: self._live.meta[name] for name in tensors}

    def shares(self, name: str, box: Box) -> dict[int, int]:
        return self._live.shares(name, box)

    def fetch(self, name: str, box: Box, rank: int) -> torch.Tensor | None:
        result = self._live.fetch(name, box, rank)
        for index, adapter in enumerate(self._adapters.get(name, [])):
            parts = [self._live.meta[f"{name}.{which}.{index}"].shape for which in ("down", "up")]
            boxes = [Box.whole(shape) for shape in parts]
            if adapter.num_experts:
                boxes = self._of_expert(box.offsets[0], adapter.num_experts, *parts)
            down, up = (
                self._live.fetch(f"{name}.{which}.{index}", part, rank)
                for which, part in zip(("down", "up"), boxes, strict=True)
            )
            if result is None or down is None or up is None:
                continue
            delta = adapter.scale * (up.squeeze(-1) if adapter.num_experts else up) @ down
            delta = delta.t() if adapter.is_transposed else delta
            result = result + delta.to(result.dtype).view(result.shape)
        return result

    @staticmethod
    def _of_expert(expert: int, num_experts: int, down_shape: torch.Size, up_shape: torch.Size) -> list[Box]:
        rank = down_shape[0] // num_experts
        return [
            Box((expert * rank, 0), (rank, down_shape[1])),
            Box((0, 0, expert), (up_shape[0], up_shape[1], 1)),
        ]
