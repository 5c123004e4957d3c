"""`MoEParallelPlugin`: the second door, where Accelerate's FSDP2 shards what is not an expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import PreTrainedModel

from .._compat import initialize_distributed_mesh, launched_fsdp_version
from .adapters import base_model, is_adapted, shard_adapters, without_adapters
from .layout import ParallelLayout
from .shard import shard_experts


@dataclass
class MoEParallelPlugin(FullyShardedDataParallelPlugin):
    """Accelerate's FSDP plugin with a layout that knows experts.

    Takes what its parent takes. Its own defaults are FSDP2, wrapping by decoder layer, gradients reduced in fp32, and
    full state dicts (with Accelerate's default, sharded ones, `Trainer.save_model` writes no model at all). Trainers of
    this package make one when the launch config says `distributed_type: FSDP`. In a loop of your own:

        plugin = MoEParallelPlugin(layout=ParallelLayout(world_size=16, ranks_per_node=8, ep_size=8))
        accelerator = Accelerator(fsdp_plugin=plugin, parallelism_config=plugin.parallelism_config())
        plugin.shard_experts(model)  # before the optimizer is made
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        sum_gradients(model)  # if each rank's loss is its share of the global one

    Args:
        layout: sizes of the groups of ranks; required.
        ep_implementation: a name in transformers' `EPImplementationInterface`.

    Raises:
        ValueError: for FSDP 1, loading on rank 0 only, FSDP's own activation checkpointing, or nothing to shard.
    """

    layout: ParallelLayout | None = None
    ep_implementation: str = "auto"

    def __post_init__(self):
        if self.layout is None:
            raise ValueError("MoEParallelPlugin needs layout=ParallelLayout(...): it says which ranks share experts.")
        if self.layout.fsdp_size == 1 and self.layout.world_size > 1:
            raise ValueError(
                f"dp_replicate_size {self.layout.dp_replicate_size} leaves every rank with all parameters and "
                "Accelerate's FSDP with nothing to shard; choose a smaller one, or launch without FSDP in the config."
            )
        if self.fsdp_version is None:
            self.fsdp_version = launched_fsdp_version()
        if self.state_dict_type is None:
            self.state_dict_type = "FULL_STATE_DICT"
        super().__post_init__()
        if self.fsdp_version != 2:
            raise ValueError(
                "The launch config asks for FSDP 1, which cannot shard experts apart from the rest; write "
                "fsdp_version: 2 in its fsdp_config."
            )
        if self.cpu_ram_efficient_loading:
            raise ValueError(
                "fsdp_cpu_ram_efficient_loading sends every parameter whole from rank 0, which experts that are "
                "already sharded cannot take; set it to false, or launch without FSDP in the config: each rank then "
                "reads its own shard only."
            )
        if self.activation_checkpointing:
            raise ValueError(
                "fsdp_activation_checkpointing would wrap layers whose experts are already sharded; set it to false "
                "and pass --gradient_checkpointing."
            )
        if self.auto_wrap_policy is None:  # one unit for the whole model would gather all of it at once
            self.auto_wrap_policy = transformer_auto_wrap_policy

    def set_mixed_precision(self, mixed_precision, buffer_autocast=False, override=False):
        """As the parent, but unless a policy was given, gradients are reduced in fp32 and outputs keep their dtype."""
        is_given = self.mixed_precision_policy is not None and not override
        super().set_mixed_precision(mixed_precision, buffer_autocast, override)
        if not is_given:
            self.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=self.mixed_precision_policy.param_dtype, reduce_dtype=torch.float32
            )

    def parallelism_config(self) -> ParallelismConfig | None:
        """What `Accelerator` needs to know of the layout; None for plain FSDP, which it does by itself."""
        assert self.layout is not None
        if self.layout.dp_replicate_size == 1:
            return None
        return ParallelismConfig(dp_replicate_size=self.layout.dp_replicate_size, dp_shard_size=self.layout.fsdp_size)

    def check_parallelism(self, found: ParallelismConfig | None) -> None:
        """Whether what Accelerate was told, by its launch config say, is this layout."""
        assert self.layout is not None
        if found is None:
            return
        if found.non_data_parallel_size > 1:
            raise ValueError(
                f"The launch config's parallelism_config has tp_size {found.tp_size}, cp_size {found.cp_size} and "
                f"sp_size {found.sp_size}; trainers of xtuner_hf know none of Accelerate's. Leave them at 1."
            )
        if found.dp_replicate_size != self.layout.dp_replicate_size:
            raise ValueError(
                f"The launch config's parallelism_config has dp_replicate_size {found.dp_replicate_size}, the training "
                f"arguments say {self.layout.dp_replicate_size}; give both the same, or the launch config none."
            )

    def shard_experts(self, model: PreTrainedModel) -> None:
        """Apply expert parallelism and shard the experts; `Accelerator.prepare` leaves sharded modules alone.

        To be called once, before the optimizer is made; on a model that is sharded already it does nothing.

        Args:
            model: of this package, or PEFT around one.
        """
        assert self.layout is not None
        if any(isinstance(module, FSDPModule) for module in model.modules()):
            return
        policy = self.mixed_precision_policy
        if policy is None and model.dtype == torch.bfloat16:
            policy = self.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32
            )
        elif policy is not None:  # fp32 master weights, as Accelerate makes them of the other parameters
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        config = self.layout.distributed_config(
            bf16=policy is not None and policy.param_dtype == torch.bfloat16, ep_implementation=self.ep_implementation
        )
        _, mesh = initialize_distributed_mesh(config)
        if mesh is None:
            return
        with without_adapters(model):
            shard_experts(base_model(model), config, mesh, self.cpu_offload or None)
        if is_adapted(model):
            shard_adapters(model, config, mesh, self.cpu_offload or None)
