"""The part of our trainers that places the model: Accelerate's door, the gradient norm, which parameters decay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer

from .._compat import use_fsdp_on_cpu
from ..kernels.fp8_weights import Fp8State
from ..parallel.adapters import base_model, sync_replicated_parameters
from ..parallel.fp8_gather import gather_in_fp8
from ..parallel.grad_norm import clip_grad_norm
from ..parallel.plugin import MoEParallelPlugin
from ..parallel.prefetch import set_prefetch
from ..parallel.shard import sum_gradients
from .setup import reduces_each_micro_batch, shards_with_accelerate

# A mixin: the trainer that it stands in front of is its base for the type checker alone.
if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class ShardingMixin(_Base):
    """Stands in front of a `Trainer` class in the bases of a trainer.

    A model that transformers sharded while loading it passes through untouched. With an FSDP launch config, Accelerate
    shards it, after the experts have been:

        _build_accelerator_args              our plugin in place of Accelerate's; when gradients are reduced
        create_accelerator_and_postprocess   on CPU processes: FSDP for real
        _prepare_for_training                experts first, then the optimizer, then Accelerate's FSDP2 around the rest

    Through either door, the gradient norm is ours (`_mixed_mesh_grad_norm`), and vectors do not decay.
    """

    args: Any
    model: Any
    _parallel_plugin: MoEParallelPlugin | None = None

    def _build_accelerator_args(self, **kwargs):
        kwargs["gradient_accumulation_plugin"].sync_each_batch = reduces_each_micro_batch(self.args)
        if shards_with_accelerate(self.args):
            self._parallel_plugin = kwargs["fsdp_plugin"] = MoEParallelPlugin(
                layout=self.args.parallel_layout,
                ep_implementation=self.args.ep_implementation,
                **(self.args.fsdp_plugin_args or {}),
            )
        accelerator_args = super()._build_accelerator_args(**kwargs)
        # Accelerate refuses a ParallelismConfig on CPU processes; they get it below, together with FSDP.
        if self._parallel_plugin is not None and self.args.distributed_state.distributed_type != "MULTI_CPU":
            parallelism = self._parallel_plugin.parallelism_config()
            if parallelism is not None:
                accelerator_args.setdefault("parallelism_config", parallelism)
        return accelerator_args

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        plugin = self._parallel_plugin
        if plugin is not None and self.accelerator.distributed_type == DistributedType.MULTI_CPU:
            use_fsdp_on_cpu(self.accelerator.state, plugin, plugin.parallelism_config())
            self.is_fsdp_enabled = True
        if plugin is not None:
            plugin.check_parallelism(self.accelerator.parallelism_config)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if self._parallel_plugin is not None:
            self._parallel_plugin.shard_experts(self.model)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self._parallel_plugin is not None:
            sum_gradients(self.model)
            set_prefetch(self.model)
            if self.args.fp8:
                base_model(self.model).fp8 = Fp8State(gather_in_fp8(self.model))
        return prepared

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        # transformers' own takes the mean of their gradients.
        if self.args.world_size > 1:
            sync_replicated_parameters(model, lambda: self.accelerator.sync_gradients)

    def _has_mixed_mesh_grads(self, model: nn.Module) -> bool:
        # Our norm fits a single mesh too, and is the same to the last bit on all ranks.
        if self.args.world_size > 1 and self.accelerator.scaler is None:
            return True
        return super()._has_mixed_mesh_grads(model)

    def _mixed_mesh_grad_norm(self, model: nn.Module, max_norm: float):
        return clip_grad_norm(model.parameters(), max_norm)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As the parent (no norms, no biases), and no vectors: attention sinks are one."""
        vectors = {name for name, parameter in model.named_parameters() if parameter.ndim < 2}
        return [name for name in super().get_decay_parameter_names(model) if name not in vectors]
