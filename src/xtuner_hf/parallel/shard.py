"""Sharding a model over the processes of a job with FSDP2 and transformers' expert parallelism."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from .._compat import (
    TransformersDeviceMesh,
    apply_expert_parallelism,
    apply_fully_sharded_data_parallelism,
    initialize_distributed_mesh,
    register_collectives,
)
from ..device import KINDS
from .prefetch import set_prefetch

logger = logging.getLogger(__name__)

for _kind in KINDS:
    if _kind.collectives is not None:
        register_collectives(_kind.type, _kind.collectives)

# transformers' DistributedConfig, whose sizes are declared optional but are numbers once it is made.
ResolvedConfig = Any


def distribute_model(model: Any, config: ResolvedConfig, mesh: TransformersDeviceMesh) -> None:
    """Shard a model in place, before its weights are read or with them in place.

    What transformers' `maybe_distribute_model` does with FSDP2 and EP, and besides: experts are always a unit of their
    own, sharded without padding (see `shard_experts`); gradients of bf16 parameters are reduced in fp32; prefetch is
    explicit.

    Raises:
        ValueError: for tensor or pipeline parallelism, which this package does not have.
    """
    if config.tp_size > 1 or config.pp_size > 1:
        raise ValueError(
            f"tp_size is {config.tp_size} and pp_size {config.pp_size}; models of xtuner_hf are sharded with FSDP "
            "(fsdp_size, dp_replicate_size) and expert parallelism (ep_size) only."
        )
    if model.dtype == torch.bfloat16:
        config = replace(config, fsdp_mixed_precision=True)
    model.config.distributed_config = config
    model._mesh_manager = mesh
    model._device_mesh = mesh.get_mesh(("pp", "fsdp", "tp"))
    model._is_distributed_loading_by_transformers = True
    model._tp_size, model._fsdp_size = 1, config.fsdp_size
    offload_policy = CPUOffloadPolicy() if config.fsdp_cpu_offload else OffloadPolicy()
    _, _, fsdp_plan = model._resolve_parallel_plans(config)
    shard_experts(model, config, mesh, offload_policy)
    apply_fully_sharded_data_parallelism(model, mesh, fsdp_plan, ep_plan={})
    set_prefetch(model)


def shard_experts(
    model: PreTrainedModel,
    config: ResolvedConfig,
    mesh: TransformersDeviceMesh,
    offload_policy: OffloadPolicy | None = None,
) -> None:
    """Split the experts of each layer over the EP ranks, and shard each part over the ranks that hold the same.

    The gradient convention is transformers' (the mean over all ranks); `sum_gradients` changes it for our trainers.
    """
    ep_plan = model._expand_parallel_plan(model.ep_plan)
    if config.ep_size > 1:
        apply_expert_parallelism(
            model, mesh.get_mesh("ep"), mesh.get_mesh("tp"), ep_plan, ep_implementation=config.ep_implementation
        )
    shard_axis = "efsdp" if config.ep_size > 1 else "fsdp"
    expert_mesh = mesh.get_mesh(("dp_replicate", shard_axis) if config.dp_replicate_size > 1 else shard_axis)
    num_shards = mesh.get_mesh(shard_axis).size()
    for name, style in ep_plan.items():
        if style != "ep_dispatch_experts":
            continue
        experts: Any = model.get_submodule(name)
        fully_shard(
            experts,
            mesh=expert_mesh,
            reshard_after_forward=True,
            shard_placement_fn=expert_placement(experts, num_shards),
            mp_policy=experts_precision(config.fsdp_mixed_precision),
            offload_policy=offload_policy or OffloadPolicy(),
        )
        experts.set_gradient_divide_factor(float(config.dp_size))
        # Without a reduction FSDP divides already, and a forced sum would divide once more.
        if num_shards > 1:
            experts.set_force_sum_reduction_for_comms(True)


def experts_precision(bf16: bool) -> MixedPrecisionPolicy:
    """bf16 computation and fp32 reduction; the routing weights, an input of the experts, stay fp32."""
    if not bf16:
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)


def expert_placement(experts: nn.Module, num_shards: int) -> Callable[[nn.Parameter], Shard]:
    """Which dimension of an expert parameter FSDP shards: one that divides evenly, the expert dimension if possible.

    With fewer experts than ranks, `Shard(0)` pads: 128 experts on 256 ranks would be stored as 256. The hidden
    dimension of both projections takes its place; the intermediate one does not, because checkpoints hold gate and up
    apart, and half of the rows of each is not half of the fused rows.

    Args:
        experts: a module with transformers' gated layout.
        num_shards: ranks that share the parameter.
    """
    is_transposed = getattr(experts, "is_transposed", False)

    def place(parameter: nn.Parameter) -> Shard:
        shape = parameter.to_local().shape if isinstance(parameter, DTensor) else parameter.shape
        if shape[0] % num_shards == 0 or len(shape) < 3:  # biases are too small for their padding to matter
            return Shard(0)
        is_down = parameter is experts.down_proj
        hidden_dim = 1 if is_down != is_transposed else 2
        if shape[hidden_dim] % num_shards == 0:
            return Shard(hidden_dim)
        _log_padding(shape[0], shape[hidden_dim], num_shards)
        return Shard(0)

    return place


@cache
def _log_padding(num_experts: int, hidden_size: int, num_shards: int) -> None:
    padded = -(-num_experts // num_shards) * num_shards
    logger.warning(
        "Neither the %d experts of a rank nor the hidden size %d divide evenly over %d ranks: experts are padded to "
        "%d, %.0f %% more memory. Another ep_size or dp_replicate_size may avoid it.",
        *(num_experts, hidden_size, num_shards, padded, 100 * (padded / num_experts - 1)),
    )


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, sharded or not."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether transformers sharded this model while loading it, or `shard_model` did."""
    return bool(getattr(model, "is_distributed_loading_by_transformers", False))


def shard_model(model: PreTrainedModel, config: DistributedConfig) -> PreTrainedModel:
    """Shard a model that every rank holds whole: rank 0's values count.

    Fit for models made from a config. A large checkpoint is sharded while it is read: pass its name to the trainer,
    or `distributed_config` to `from_pretrained`.
    """
    device, mesh = initialize_distributed_mesh(config)
    assert device is not None  # it is None for a job of one process
    copy_from_rank_0(model, device)
    # FSDP takes tied weights apart; as `from_pretrained` does, they are tied again once they are sharded.
    for name in model.all_tied_weights_keys:
        module, _, attribute = name.rpartition(".")
        tied = model.get_parameter(name)
        setattr(model.get_submodule(module), attribute, nn.Parameter(tied.detach().clone()))
    model = type(model).maybe_distribute_model(model, config, mesh)
    model.tie_weights(recompute_mapping=False)
    return model


@torch.no_grad()
def copy_from_rank_0(model: nn.Module, device: torch.device) -> None:
    """Make all ranks hold rank 0's parameters and buffers.

    Ranks that were seeded differently would train one model made of different ones.

    Args:
        device: where this job's collectives work; tensors elsewhere pass through it.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_meta:  # of a plan (plan/dry_run.py): there are no values
            continue
        on_device = tensor.data.to(device)
        dist.broadcast(on_device, src=0)
        tensor.data.copy_(on_device)


def sum_gradients(model: nn.Module) -> None:
    """Make FSDP add gradients up over ranks and divide by nothing.

    Each rank's loss is its share of the global one, so the sum is the gradient, of a dense parameter and of an expert
    alike: no factor that depends on the mesh, and none to forget. (transformers divides experts by the number of
    ranks; where no copy of an expert exists, torch 2.13 divides fp64 and fp16 gradients twice.)
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # A factor would otherwise travel as PREMUL_SUM, which gloo and HCCL do not know.
            module.set_force_sum_reduction_for_comms(True)
