"""What all our models add to transformers': strict loading, saving in the Hub's dialect, our kernels by default."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .._compat import WeightConverter, get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from ..attention.varlen import VARLEN_ATTENTION
from ..checkpoint.dequantise_on_load import (
    dequantising_arguments,
    record_source,
    refuse_ignored_scales,
    side_folder,
)
from ..checkpoint.folder import SHARDS
from ..checkpoint.side_files import write_side_files
from ..kernels.fp8_weights import Fp8State
from ..memory.recompute import LayerCheckpoint
from ..moe.experts import implementation_name
from ..parallel.shard import distribute_model
from .norm import use_device_norms
from .precision import fp32_buffers_kept

DEFAULT_EXPERTS_KERNEL = "auto"


class IncompleteCheckpointError(ValueError):
    """A checkpoint that would leave parameters at random values."""


def use_hub_layout(model_type: str, *, like: str | None = None, further: Sequence[WeightConverter] = ()) -> None:
    """Let our classes of this `model_type` read and write the per-expert tensors that the Hub holds.

    transformers applies its conversions to classes outside its own package only where somebody registers them;
    otherwise a checkpoint loads with random experts and one warning.

    Args:
        like: the `model_type` whose conversions to take, for one that transformers does not know.
        further: conversions that transformers' own list lacks.
    """
    mapping = get_checkpoint_conversion_mapping(like or model_type) or []
    register_checkpoint_conversion_mapping(model_type, [*mapping, *further], overwrite=True)


# A mixin: the model class that it stands in front of is its base for the type checker alone.
if TYPE_CHECKING:
    _Base = PreTrainedModel
else:
    _Base = object


class HubModelMixin(_Base):
    """Goes in front of a transformers class in the bases of a model.

    Attributes:
        loaded_from: the checkpoint that the weights were read from: the absolute path of a folder, or a name on the
            Hub; None if they started random.
        source_folder: the folder on this machine with the files beside those weights, a copy of the Hub's for one
            that was loaded by name; None if there is none, and on ranks that do not write.
        export_dtype: what `save_pretrained` and `push_to_hub` write floating-point weights as; None writes each in
            its own dtype, as transformers does. Parameters that are fp32 in every published checkpoint of the family
            stay fp32.
    """

    loaded_from: str | None = None
    source_folder: Path | None = None
    export_dtype: torch.dtype | None = None

    # Python files that a checkpoint needs to be read without this package, for `trust_remote_code`.
    remote_code: ClassVar[tuple[Path, ...]] = ()
    # Whether saving copies tensors that loading found no place for, and their names.
    keeps_unknown_tensors: ClassVar[bool] = False
    unknown_tensors: tuple[str, ...] = ()

    # Whether the family has multi-token prediction layers (mtp.py).
    supports_mtp = False

    # transformers decides this by reading the module's source for a decorator that stands in moe/experts.py here.
    _can_set_experts_implementation_cached_value = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers, but a checkpoint that lacks parameters of the model is an error, and one in FP8 blocks,
        MXFP4 or packed INT4 is dequantised to the model's dtype.

        With `distributed_config` every rank reads its own shard, and what one of them finds amiss all of them raise.

        Raises:
            IncompleteCheckpointError: with the names that are missing or have another shape.
            CheckpointFormatError: a quantised format that we do not read, or scales that are missing or do not fit.
        """
        # Tensors of another shape would be an error of transformers' own, which names none of them.
        allow_other_shapes = kwargs.pop("ignore_mismatched_sizes", False)
        _refuse_training_checkpoint(pretrained_model_name_or_path)
        with fail_together(sharded=kwargs.get("distributed_config") is not None):
            arguments = kwargs
            name, kwargs, source_folder = dequantising_arguments(cls, pretrained_model_name_or_path, kwargs)
            loaded: Any = super().from_pretrained(
                name, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
            model, info = loaded
            other_shapes = set() if allow_other_shapes else info["mismatched_keys"]
            _refuse_incomplete(model, pretrained_model_name_or_path, info["missing_keys"], other_shapes)
            refuse_ignored_scales(pretrained_model_name_or_path, info["unexpected_keys"])
        source_folder = source_folder or side_folder(pretrained_model_name_or_path, arguments)
        if source_folder is not None:
            record_source(model, pretrained_model_name_or_path, source_folder)
        source = Path(pretrained_model_name_or_path)
        model.loaded_from = str(source.absolute() if source.exists() else pretrained_model_name_or_path)
        if cls.keeps_unknown_tensors:
            model.unknown_tensors = tuple(sorted(info["unexpected_keys"]))
        return (model, info) if output_loading_info else model

    def post_init(self) -> None:
        """As in transformers; the model is built by now."""
        super().post_init()
        use_device_norms(self)

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        """As in transformers, with experts that are sharded without padding and explicit prefetch."""
        if mesh_manager is not None:
            distribute_model(model, distributed_config, mesh_manager)
        return model

    def save_pretrained(self, save_directory, is_main_process: bool = True, *args, **kwargs):
        """As in transformers, with `config.json` in the dialect that Hub checkpoints and inference engines use, and the
        other files of the folder that the model was loaded from (see `checkpoint/side_files.py`).

        Of a sharded model, every rank must call it, and rank 0 writes.
        """
        if kwargs.get("distributed_checkpoint") and kwargs.get("push_to_hub"):
            raise ValueError(
                "distributed_checkpoint=True writes names of transformers' own, which no engine reads: leave it out "
                "to push to the Hub."
            )
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if self.should_save_on_this_rank(is_main_process):
            write_side_files(self, Path(save_directory), dtype=self.export_dtype)
        # No rank goes on to read what rank 0 is still writing.
        self.barrier_after_gathered_checkpoint_save(getattr(self.config, "distributed_config", None))

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        """Where transformers uploads what it has just saved, in `save_pretrained` and in `push_to_hub` alike."""
        if not self.should_save_on_this_rank(True):
            return None  # the other ranks of push_to_hub() have nothing but a model card in their folder
        write_side_files(self, Path(working_dir), dtype=self.export_dtype)
        if kwargs.get("commit_message") is None:
            kwargs["commit_message"] = f"Upload {type(self).__name__.removeprefix('FSDP')}"
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def gather_sharded_state_dict_for_save(self, *args, **kwargs):
        """What transformers is going to write, whole on the rank that writes it, in `export_dtype`."""
        state_dict = super().gather_sharded_state_dict_for_save(*args, **kwargs)
        for copy, original in self.all_tied_weights_keys.items():
            # Gathered one by one, tied weights are no longer seen to be tied, and both would be written.
            if copy in state_dict and original in state_dict and torch.equal(state_dict[copy], state_dict[original]):
                state_dict[copy] = state_dict[original]
        if self.export_dtype is None:
            return state_dict
        return cast_weights(state_dict, self.export_dtype, keep_fp32=self._keep_in_fp32_modules_strict or ())

    def _apply(self, fn, recurse: bool = True):
        with fp32_buffers_kept(self):  # through `.to(torch.bfloat16)` too
            return super()._apply(fn, recurse)

    def explain_missing(self, names: set[str]) -> str:
        """What a family has to add to the error about missing parameters of these names."""
        return ""

    # The quantised weights of FP8 training; models/fp8.py sets it.
    fp8: Fp8State | None = None

    # What checkpointed layers keep besides their inputs, and where; memory/recompute.py sets it.
    layer_checkpoint: LayerCheckpoint | None = None

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, every_n_layers=1):
        """Where every way to switch activation checkpointing on, a trainer's or TRL's, comes through."""
        if self.layer_checkpoint is not None:
            gradient_checkpointing_func = self.layer_checkpoint.around(gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, every_n_layers)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        return super().get_correct_attn_implementation(requested_attention or VARLEN_ATTENTION, is_init_check)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        return super().get_correct_experts_implementation(
            requested_experts or implementation_name(DEFAULT_EXPERTS_KERNEL)
        )


def cast_weights(
    state_dict: dict[str, torch.Tensor], dtype: torch.dtype, keep_fp32: Collection[str]
) -> dict[str, torch.Tensor]:
    """The same tensors, floating-point ones in `dtype`; tied ones stay tied.

    Args:
        keep_fp32: parts of dotted names; tensors with one of them are left alone.
    """
    casts: dict[tuple, torch.Tensor] = {}

    def cast(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or not set(keep_fp32).isdisjoint(name.split(".")):
            return tensor
        if tensor.is_meta:
            raise ValueError(f"{name} is offloaded: save with export_dtype=None, or load the model without offloading.")
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        return casts.setdefault(place, tensor.to(dtype))

    return {name: cast(name, tensor) for name, tensor in state_dict.items()}


@contextlib.contextmanager
def fail_together(sharded: bool, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Raise on every rank what is raised on one, so that none is left waiting in a collective.

    Args:
        sharded: whether all ranks are in here; otherwise nothing is done.
        group: of all ranks; a gloo group where one of them may be busy for long, which NCCL's time-out would end. The
            default one if None.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    if sharded and dist.is_available() and dist.is_initialized():
        found: list[Any] = [None] * dist.get_world_size()
        said = problem and (isinstance(problem, IncompleteCheckpointError), str(problem))
        dist.all_gather_object(found, said, group=group)
        elsewhere = [(rank, *what) for rank, what in enumerate(found) if what]
        if problem is None and elsewhere:
            rank, is_incomplete, message = elsewhere[0]
            problem = (IncompleteCheckpointError if is_incomplete else RuntimeError)(f"on rank {rank}: {message}")
    if problem is not None:
        raise problem


def _refuse_training_checkpoint(name: Any) -> None:
    folder = Path(name) if name is not None else None
    if folder is not None and (folder / SHARDS).is_dir():
        raise IncompleteCheckpointError(
            f"{folder} is a training checkpoint: it holds the shards of a run, for resume_from_checkpoint, and no Hub "
            f"weights. Make a Hub checkpoint of it first: `xtuner-hf convert {folder} OUT`."
        )


def _refuse_incomplete(model: HubModelMixin, source, missing: set[str], other_shapes: set) -> None:
    # (name, shape in the checkpoint, shape in the model)
    shapes = [f"{name} {tuple(found)} instead of {tuple(wanted)}" for name, found, wanted in sorted(other_shapes)]
    names = sorted(missing) + shapes
    if not names:
        return
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    raise IncompleteCheckpointError(
        f"{source} does not hold all of {type(model).__name__}: {len(missing)} parameters are missing and "
        f"{len(shapes)} have another shape ({shown}); they would be left random. Check that config.json belongs to "
        "these weights and that no shard file or expert is missing." + model.explain_missing(missing)
    )
