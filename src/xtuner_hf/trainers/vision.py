"""What our trainers do to models that read images: freeze parts, give each its learning rate, set up the tower."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from ..memory.recompute import set_recompute
from ..parallel.adapters import base_model
from .vision_arguments import VisionArguments


def prepare_vision(model: nn.Module, args: Any) -> None:
    """Stochastic depth and recompute of the vision tower.

    Raises:
        ValueError: arguments about a vision tower for a model that has none.
    """
    base: Any = base_model(model)
    if not hasattr(base, "parts"):
        if args.asked_of_vision:
            raise ValueError(
                f"{', '.join(args.asked_of_vision)} speak of a vision tower, and {base.config.model_type} has none: "
                "leave them out."
            )
        return
    tower = base.model.vision_tower
    if args.drop_path_rate is not None and not args.freeze_vision:
        tower.set_drop_path_rate(args.drop_path_rate)
    _prepare_recompute(base, tower, args)


def _prepare_recompute(base: Any, tower: Any, args: Any) -> None:
    policy, language = args.vision_recompute, args.recompute or "full"
    language_recomputes = bool(getattr(args, "activation_checkpointing", False))
    offload = args.vision_activation_offload
    if offload is None:
        offload = args.activation_offload and policy != "none"
    if policy is None and offload == args.activation_offload:
        return
    if policy is None:
        policy = language if language_recomputes else "none"
    if offload and policy == "none":
        raise ValueError(
            "vision_activation_offload moves the inputs of recomputed layers, and the vision tower recomputes none: "
            "set vision_recompute='full' or 'selective', or vision_activation_offload=False."
        )
    base.vision_recompute = policy
    set_recompute(tower, "full" if policy == "none" else policy, offload=offload, device=args.device)
    if policy != "none" and not language_recomputes:  # otherwise it is switched on with the language model's
        tower.activation_checkpointing_enable()


def freeze_parts(model: nn.Module, args: VisionArguments) -> None:
    """Take the parts that do not train out of training, adapters in them included."""
    if args.frozen:
        base_model(model).freeze(args.frozen)


def num_tiles(batch: dict) -> int:
    """Tiles of the images in a batch."""
    tiles = batch.get("pixel_values")
    return 0 if tiles is None else len(tiles)


def set_learning_rates(optimizer: torch.optim.Optimizer, model: nn.Module, args: Any) -> None:
    """Split the optimizer's groups where a part has a learning rate of its own. Groups of the others come first: the
    rate that is logged is theirs.

    Call it before the schedule is made.
    """
    base: Any = base_model(model)
    rate_of: dict[torch.Tensor, float] = {}
    for part, rate in (("vision", args.vision_lr), ("projector", args.projector_lr)):
        if rate is not None:
            rate_of |= {parameter: rate for module in base.parts[part] for parameter in module.parameters()}
    if not rate_of:
        return
    own: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        by_rate: dict[float | None, list[torch.Tensor]] = defaultdict(list)
        for parameter in group["params"]:
            by_rate[rate_of.get(parameter)].append(parameter)
        for rate, parameters in by_rate.items():
            split = {**group, "params": parameters}
            (others if rate is None else own).append(split if rate is None else {**split, "lr": rate})
    optimizer.param_groups = others + own
