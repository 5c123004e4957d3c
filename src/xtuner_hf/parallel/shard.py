"""Sharding a model over the processes of a job with transformers' own FSDP2 and expert parallelism."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from .._compat import initialize_distributed_mesh


def check_ep_size(ep_size: int, world_size: int, num_experts: int | None) -> None:
    """One sentence for an expert-parallel size that cannot be.

    Args:
        num_experts: experts of an MoE layer, None for a dense model.
    """
    if ep_size < 1:
        raise ValueError(f"ep_size is {ep_size}; it is the number of ranks that share a layer's experts, 1 or more.")
    if ep_size == 1:
        return
    if num_experts is None:
        raise ValueError(f"ep_size is {ep_size}, but the model has no experts; leave ep_size at 1.")
    if world_size % ep_size:
        raise ValueError(
            f"ep_size {ep_size} does not divide the {world_size} processes of this job; choose a divisor of "
            f"{world_size}, or launch with --num_processes a multiple of {ep_size}."
        )
    if num_experts % ep_size:
        raise ValueError(
            f"ep_size {ep_size} does not divide the model's {num_experts} experts; every rank must hold as many."
        )


def distributed_config(ep_size: int, world_size: int, *, bf16: bool = False) -> DistributedConfig:
    """transformers' layout: parameters sharded over all ranks, experts over efsdp x ep with ep innermost.

    Args:
        bf16: compute in bf16 from the parameters' own dtype; gradients are reduced in fp32.
    """
    return DistributedConfig(fsdp_size=world_size, ep_size=ep_size, fsdp_mixed_precision=bf16)


def is_sharded(model: nn.Module) -> bool:
    """Whether transformers sharded this model while loading it, or `shard_model` did."""
    return bool(getattr(model, "is_distributed_loading_by_transformers", False))


def shard_model(model: PreTrainedModel, config: DistributedConfig) -> PreTrainedModel:
    """Shard a model that every rank holds whole: rank 0's values count.

    Fit for models made from a config. A large checkpoint is sharded while it is read: pass its name to the trainer,
    or `distributed_config` to `from_pretrained`.
    """
    # Ranks that were seeded differently would train one model made of different ones.
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor, src=0)
    # FSDP takes tied weights apart; as `from_pretrained` does, they are tied again once they are sharded.
    for name in model.all_tied_weights_keys:
        module, _, attribute = name.rpartition(".")
        tied = model.get_parameter(name)
        setattr(model.get_submodule(module), attribute, nn.Parameter(tied.detach().clone()))
    _, mesh = initialize_distributed_mesh(config)
    model = type(model).maybe_distribute_model(model, config, mesh)
    model.tie_weights(recompute_mapping=False)
    return model


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
