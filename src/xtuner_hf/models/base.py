"""What all our models add to transformers': strict loading, saving in the Hub's dialect, our kernels by default."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from .._compat import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from ..checkpoint.hub_config import write_hub_config
from ..moe.experts import implementation_name

DEFAULT_EXPERTS_KERNEL = "grouped_mm"


class IncompleteCheckpointError(ValueError):
    """A checkpoint that would leave parameters at random values."""


def use_hub_layout(model_type: str) -> None:
    """Let our classes of this `model_type` read and write the per-expert tensors that the Hub holds.

    transformers applies its conversions to classes outside its own package only where somebody registers them;
    otherwise a checkpoint loads with random experts and one warning.
    """
    mapping = get_checkpoint_conversion_mapping(model_type)
    register_checkpoint_conversion_mapping(model_type, mapping or [], overwrite=True)


# A mixin: the model class that it stands in front of is its base for the type checker alone.
if TYPE_CHECKING:
    _Base = PreTrainedModel
else:
    _Base = object


class HubModelMixin(_Base):
    """Goes in front of a transformers class in the bases of a model."""

    # transformers decides this by reading the module's source for a decorator that stands in moe/experts.py here.
    _can_set_experts_implementation_cached_value = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers, but a checkpoint that lacks parameters of the model is an error.

        Raises:
            IncompleteCheckpointError: with the names that are missing or have another shape.
        """
        # Tensors of another shape would be an error of transformers' own, which names none of them.
        allow_other_shapes = kwargs.pop("ignore_mismatched_sizes", False)
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        model, info = loaded
        other_shapes = set() if allow_other_shapes else info["mismatched_keys"]
        _refuse_incomplete(cls.__name__, pretrained_model_name_or_path, info["missing_keys"], other_shapes)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, is_main_process: bool = True, **kwargs):
        """As in transformers, with `config.json` in the dialect that Hub checkpoints and inference engines use."""
        push_to_hub = kwargs.pop("push_to_hub", False)
        super().save_pretrained(save_directory, *args, is_main_process=is_main_process, **kwargs)
        if self.should_save_on_this_rank(is_main_process):
            write_hub_config(Path(save_directory))
        if push_to_hub:
            raise ValueError(
                "save_pretrained(push_to_hub=True) would upload before config.json is final; call push_to_hub()."
            )

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        return super().get_correct_experts_implementation(
            requested_experts or implementation_name(DEFAULT_EXPERTS_KERNEL)
        )


def _refuse_incomplete(class_name: str, source, missing: set[str], other_shapes: set) -> None:
    # (name, shape in the checkpoint, shape in the model)
    shapes = [f"{name} {tuple(found)} instead of {tuple(wanted)}" for name, found, wanted in sorted(other_shapes)]
    names = sorted(missing) + shapes
    if not names:
        return
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    raise IncompleteCheckpointError(
        f"{source} does not hold all of {class_name}: {len(missing)} parameters are missing and {len(shapes)} have "
        f"another shape ({shown}); they would be left random. Check that config.json belongs to these weights and that "
        "no shard file or expert is missing."
    )
