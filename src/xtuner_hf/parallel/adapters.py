"""Adapters (PEFT) of a model that is sharded with FSDP2 and expert parallelism.

    base weights             as without adapters
    LoRA of fused experts    sharded over all ranks like dense parameters, gathered with their layer; each rank takes
                             the factors of the experts that it computes, and gradients add up
    other adapters           whole on every rank (where Accelerate shards, sharded with their layer)

The factors of fused experts are kept as PEFT has them, [E*Q, A] and [B, Q*E], whatever the layout. So a checkpoint of
one layout is read by any other, and what is saved is what PEFT reads. Gathering those of all experts where a rank needs
its own ones costs little: at rank 16, 6 % of what the experts themselves cost to gather under EP 8 (Kimi K2's sizes).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from .._compat import TransformersDeviceMesh
from .prefetch import set_prefetch
from .shard import ResolvedConfig, copy_from_rank_0, experts_precision, is_sharded, sum_gradients


def is_adapted(model: nn.Module) -> bool:
    """Whether PEFT stands around the model."""
    return hasattr(model, "peft_config")


def base_model(model: Any) -> Any:
    """The model that PEFT stands around, or itself."""
    return model.get_base_model() if is_adapted(model) else model


def is_reference(model: nn.Module) -> bool:
    """Whether an adapted model is at present its own reference: its adapters are off, or TRL's copy "ref" is on."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
    return layer is not None and (layer.disable_adapters or layer.active_adapters == ["ref"])


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, what adapters stand around has its own place and name: plans and conversions find it."""
    covered = []
    if is_adapted(model):
        from peft.tuners.tuners_utils import BaseTunerLayer

        for parent in model.modules():
            if not isinstance(parent, BaseTunerLayer):
                layers = [(name, child) for name, child in parent.named_children() if isinstance(child, BaseTunerLayer)]
                covered += [(parent, name, layer) for name, layer in layers]
    for parent, name, layer in covered:
        setattr(parent, name, layer.get_base_layer())
    try:
        yield
    finally:
        for parent, name, layer in covered:
            setattr(parent, name, layer)


def place_adapters(model: nn.Module, world_size: int) -> None:
    """Put adapters of fused experts where the experts are computed, however PEFT came around the model.

    (Accelerate's door does it when it shards the experts.)
    """
    if not is_adapted(model):
        return
    base = base_model(model)
    if is_sharded(base):
        shard_adapters(model, base.config.distributed_config, base._mesh_manager)
        sum_gradients(model)
        set_prefetch(base)
    elif world_size == 1:
        from ..moe.lora import adopt_wrappers

        adopt_wrappers(model)


def shard_adapters(
    model: nn.Module,
    config: ResolvedConfig,
    mesh: TransformersDeviceMesh,
    offload_policy: OffloadPolicy | None = None,
) -> None:
    """Let the adapters of fused experts be computed where the experts are, and shard them. Rank 0's values count.
    Adapters of other layers stay whole, on the device.

    To be called once the experts are sharded and before the optimizer is made; what is sharded already stays.
    """
    from ..moe.lora import adopt_wrappers

    dense_mesh = mesh.get_mesh(("dp_replicate", "fsdp") if config.dp_replicate_size > 1 else "fsdp")
    for wrapper in adopt_wrappers(model):
        if isinstance(wrapper, FSDPModule):
            continue
        experts: Any = wrapper.get_base_layer()
        inner: Any = wrapper
        while inner is not experts:
            if config.ep_size > 1:
                inner.first_expert = mesh.get_mesh("ep").get_local_rank() * experts.num_experts
            for factors in (inner.lora_A, inner.lora_B):
                copy_from_rank_0(factors, torch.device(dense_mesh.device_type))
            inner = inner.base_layer
        fully_shard(
            wrapper,
            mesh=dense_mesh,
            reshard_after_forward=True,
            mp_policy=experts_precision(config.fsdp_mixed_precision),
            offload_policy=offload_policy or OffloadPolicy(),
        )
    # PEFT has added them in host memory, and a trainer does not move a model that is sharded.
    for parameter in model.parameters():
        if not isinstance(parameter.data, DTensor) and not parameter.is_meta:
            parameter.data = parameter.data.to(dense_mesh.device_type)


def sync_replicated_parameters(model: nn.Module, is_last_micro_batch: Any) -> None:
    """Keep parameters that train and are whole on every rank alike: rank 0's values, and the sum of their gradients.

    Adapters that were added to a sharded model are such parameters. (transformers takes the mean of their gradients;
    here each rank's loss is its share of the global one.)

    Args:
        is_last_micro_batch: called after a parameter's gradient was accumulated.
    """

    def add_up(parameter: torch.Tensor) -> None:
        if is_last_micro_batch():
            dist.all_reduce(parameter.grad)

    for parameter in model.parameters():
        if not parameter.requires_grad or isinstance(parameter.data, DTensor):
            continue
        dist.broadcast(parameter.data, src=0)
        if not getattr(parameter, "_gradients_add_up", False):  # train() may be called again
            parameter.register_post_accumulate_grad_hook(add_up)
            parameter._gradients_add_up = True  # type: ignore[attr-defined]
