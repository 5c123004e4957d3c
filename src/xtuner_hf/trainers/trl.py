"""What our subclasses of TRL's trainers share: arguments by name, one balance loss, no padding, reference models."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn
from transformers import AutoProcessor, Trainer

from ..memory.unpadded import UnpaddedModel, scores_unpadded
from ..parallel.adapters import is_adapted
from ..parallel.shard import is_sharded
from .mixin import MoETrainerMixin
from .setup import prepare_model, shards_with_accelerate

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class TRLTrainerMixin(MoETrainerMixin):
    """`MoETrainerMixin` in front of a trainer of TRL."""

    aux_loss_enabled: bool
    _tp_size: int
    # With what TRL loads the processing class of this trainer.
    processing_options: ClassVar[dict[str, Any]] = {}

    def __init__(self, model: Any = None, args: Any = None, *positional: Any, **keywords: Any):
        if keywords.get("quantization_config") is not None:
            raise ValueError(
                "quantization_config: this package trains weights that are not quantised, and adapters on such ones "
                "(checkpoints in FP8, INT4 and MXFP4 are dequantised as they are read). Leave it out."
            )
        revision = asked_revision(model, args)
        if revision is not None and keywords.get("processing_class") is None:
            # TRL gets a model that is loaded, and would take the tokenizer of the main branch.
            keywords["processing_class"] = AutoProcessor.from_pretrained(
                model, revision=revision, **self.processing_options
            )
        super().__init__(model, args, *positional, **keywords)
        if hasattr(self, "_tp_size"):  # ranks with the same batch, by which TRL divides the tokens it counts
            self._tp_size *= self.args.sp_size

    def _attach_balance(self):
        # TRL would add a Switch loss of its own, per micro-batch and over all layers at once; ours takes its place.
        if self.aux_loss_enabled:
            self.aux_loss_enabled = False
            self.model.config.get_text_config().output_router_logits = False
        return super()._attach_balance()


class UnpaddedMixin(TRLTrainerMixin):
    """For trainers whose batches TRL pads: losses are computed of their real tokens (memory/unpadded.py)."""

    def shared(self, model: Any) -> Any:
        if isinstance(model, UnpaddedModel):
            return model
        model = super().shared(model)
        return UnpaddedModel(model) if scores_unpadded(self.model) else model


class ByKeyword(_Base):
    """Stands behind our mixins: TRL's trainers take other things between the model and the arguments."""

    def __init__(self, model: Any = None, args: Any = None, **keywords: Any):
        super().__init__(model=model, args=args, **keywords)


def given_or_default_args(args: Any, config_class: Any, model: Any) -> Any:
    """The training arguments, by default as TRL has them: with an output folder named after model and algorithm."""
    if args is not None:
        return args
    name = model if isinstance(model, str) else model.config.name_or_path
    algorithm = config_class.__name__.removeprefix("MoE").removesuffix("Config")
    return config_class(f"{name.rpartition('/')[2]}-{algorithm}")


def asked_revision(model: Any, args: Any) -> str | None:
    """The revision of the checkpoint, of which the tokenizer is to be as well; None for a model that is loaded."""
    options: Any = getattr(args, "model_init_kwargs", None) or {}
    return options.get("revision") if isinstance(model, str) else None


def named_arguments(trainer: type, positional: tuple, keywords: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `trainer`, by name."""
    return dict(inspect.signature(trainer).bind(*positional, **keywords).arguments)


def has_adapters(model: Any, arguments: dict[str, Any]) -> bool:
    """Whether the policy is trained through adapters; without them it is its own reference."""
    return is_adapted(model) or arguments.get("peft_config") is not None


def prepare_reference(model: Any, args: Any) -> nn.Module:
    """`prepare_model` for a reference model.

    Raises:
        ValueError: if Accelerate shards the policy, which happens later and knows of one model alone.
    """
    if args.world_size > 1 and shards_with_accelerate(args):
        raise ValueError(
            "The launch config asks Accelerate for FSDP, which shards the policy and no reference model. Launch with "
            "distributed_type MULTI_GPU, MULTI_NPU or MULTI_CPU, as in accelerate_configs/: both are then sharded as "
            "they are read."
        )
    return prepare_model(model, args)


def given_or_own_reference(model: Any, args: Any, arguments: dict[str, Any]) -> Any:
    """The reference of training on preferences: what was given, sharded, or a copy of the policy.

    Args:
        arguments: of the trainer's call, by name.
    """
    given = arguments.get("ref_model")
    if given is not None and given is not model:
        return prepare_reference(given, args)
    if args.precompute_ref_log_probs:
        if args.world_size > 1:
            raise ValueError(
                "precompute_ref_log_probs reads whole parameters, and this job's are sharded over "
                f"{args.world_size} processes. Set it to False, or precompute in one process."
            )
        return given
    return given if has_adapters(model, arguments) or given is model else reference_model(model, args)


def reference_model(model: Any, args: Any) -> nn.Module:
    """A frozen copy of the policy as it is now, sharded as the policy is: layer by layer, experts over `ep_size`.

    (TRL would load transformers' own class from the policy's name, whole on every rank.)

    Args:
        model: what the trainer was given: a model, or the name of a checkpoint.
        args: of one of our trainers.

    Raises:
        ValueError: for a model that is sharded already and has no name to be read from again; see also
            `prepare_reference`.
    """
    if not isinstance(model, str) and is_sharded(model):
        if not model.config.name_or_path:
            raise ValueError(
                "A reference model is needed, but the policy is already sharded and was not loaded from a checkpoint: "
                "give the trainer the unsharded model or a checkpoint's name, or pass ref_model."
            )
        model = model.config.name_or_path
    reference = prepare_reference(model if isinstance(model, str) else copy.deepcopy(model), args)
    return reference.eval().requires_grad_(False)
