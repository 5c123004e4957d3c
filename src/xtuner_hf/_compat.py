"""Names of torch and HuggingFace libraries that this package leans on and that their documentation does not promise.

Checked with torch 2.13, transformers 5.23, TRL 1.16 and accelerate 1.15; `tests/test_compat.py` fails when one moves
or changes its signature.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from huggingface_hub.serialization._base import parse_size_to_int
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.multiprocessing.reductions import reduce_tensor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, revert_weight_conversion
from transformers.distributed.expert_parallel import (
    EPImplementation,
    EPImplementationInterface,
    apply_expert_parallelism,
)
from transformers.distributed.fsdp import apply_fully_sharded_data_parallelism
from transformers.distributed.utils import (
    DISTRIBUTED_BACKEND_MAP,
    TransformersDeviceMesh,
    initialize_distributed_mesh,
)
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.utils.output_capturing import OutputRecorder
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

if TYPE_CHECKING:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
        get_optimal_tiled_canvas as optimal_tiled_canvas,
    )
    from trl.chat_template_utils import has_generation_markers, is_chat_template_stop_token_trained
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
    from trl.trainer.utils import global_then_local_main_first

# Imported when first used: TRL's trainers take seconds, and models need none of them.
_LAZY_HOMES = {
    "optimal_tiled_canvas": "transformers.models.got_ocr2.image_processing_pil_got_ocr2",
    "DataCollatorForLanguageModeling": "trl.trainer.sft_trainer",
    "DataCollatorForVisionPreference": "trl.trainer.dpo_trainer",
    "global_then_local_main_first": "trl.trainer.utils",
    "has_generation_markers": "trl.chat_template_utils",
    "is_chat_template_stop_token_trained": "trl.chat_template_utils",
}

_THEIR_NAMES = {"optimal_tiled_canvas": "get_optimal_tiled_canvas"}

__all__ = [
    "ChunkedLogProbFunction",
    "ConversionOps",
    "DataCollatorForLanguageModeling",
    "DataCollatorForVisionPreference",
    "EPImplementation",
    "EPImplementationInterface",
    "OutputRecorder",
    "TransformersDeviceMesh",
    "WeightConverter",
    "add_fused_lm_head",
    "apply_expert_parallelism",
    "apply_fully_sharded_data_parallelism",
    "batches_dealt_to",
    "compute_local_shape_and_global_offset",
    "cpu_flash_attention",
    "cpu_flash_attention_backward",
    "cuda_flash_attention",
    "cuda_flash_attention_backward",
    "disable_dropout_in_model",
    "extend_all_gathers",
    "flash_attention_by_name",
    "fsdp_parameters",
    "get_checkpoint_conversion_mapping",
    "global_then_local_main_first",
    "has_generation_markers",
    "initialize_distributed_mesh",
    "is_chat_template_stop_token_trained",
    "launched_fsdp_version",
    "launched_with_deepspeed",
    "launched_with_fsdp",
    "loads_on_rank_0_only",
    "optimal_tiled_canvas",
    "parse_size_to_int",
    "ranks_per_node",
    "reduce_tensor",
    "register_checkpoint_conversion_mapping",
    "register_collectives",
    "revert_weight_conversion",
    "use_fsdp_on_cpu",
    "use_one_device",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY_HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY_HOMES[name]), _THEIR_NAMES.get(name, name))


def cpu_flash_attention(query, key, value, mask, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's flash attention for CPU: output [B, N, S, D] and the log-sum-exp [B, N, S] that SDPA keeps to itself.

    Causal without a mask.
    """
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, mask is None, attn_mask=mask, scale=scaling
    )


def cpu_flash_attention_backward(grad_output, query, key, value, output, lse, mask, scaling: float):
    """Gradients of query, key and value."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_output, query, key, value, output, lse, 0.0, mask is None, attn_mask=mask, scale=scaling
    )


def cuda_flash_attention(query, key, value, mask, scaling: float, *, cu_seqlens, max_length: int, window: int | None):
    """torch's flash attention of packed documents for CUDA, causal: output [1, N, T, D] and the log-sum-exp [1, N, T].

    Args:
        query: [1, N, T, D], `key` and `value` alike, in bf16 or fp16.
        mask: None; the documents say it.
        cu_seqlens: [documents + 1] int32; `max_length` is that of the longest.
        window: keys that a query sees, its own among them.
    """
    output, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(tensor[0].transpose(0, 1) for tensor in (query, key, value)),
        *(cu_seqlens, cu_seqlens, max_length, max_length, 0.0, window is None, False),
        scale=scaling,
        window_size_left=-1 if window is None else window - 1,
        window_size_right=0,
    )
    return output.transpose(0, 1)[None], lse[None]


def cuda_flash_attention_backward(
    grad_output, query, key, value, output, lse, mask, scaling: float, *, cu_seqlens, max_length, window
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value."""
    # Without dropout no random state is read (torch.nn.attention.varlen passes the same zeros).
    random_state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        *(tensor[0].transpose(0, 1).contiguous() for tensor in (grad_output, query, key, value, output)),
        *(lse[0].contiguous(), cu_seqlens, cu_seqlens, max_length, max_length, 0.0, window is None),
        *(random_state, torch.empty(0, device=query.device)),
        scale=scaling,
        window_size_left=-1 if window is None else window - 1,
        window_size_right=0,
    )
    return dq.transpose(0, 1)[None], dk.transpose(0, 1)[None], dv.transpose(0, 1)[None]


def flash_attention_by_name(
    name: str, q, k, v, cu_seqlens, max_length: int, *, scaling: float, window: int | None, sinks
) -> torch.Tensor:
    """A flash-attn package on packed documents, causal: [T, N, D] from [T, heads, D], with heads of one size.

    Args:
        name: "flash_attention_2", "_3" or "_4".
        window: keys that a query sees, its own among them.
        sinks: [N] or None; transformers drops them for packages that do not know them, so do not pass them to those.
    """
    return _flash_attention_forward(
        q[None],
        k[None],
        v[None],
        None,
        query_length=q.shape[0],
        is_causal=True,
        softmax_scale=scaling,
        sliding_window=window,
        cu_seq_lens_q=cu_seqlens,
        cu_seq_lens_k=cu_seqlens,
        max_length_q=max_length,
        max_length_k=max_length,
        attn_implementation=name,
        s_aux=sinks,
    )[0]


def register_collectives(device_type: str, backend: str) -> None:
    """Let transformers start process groups on a kind of device that its table lacks (Ascend's, in 5.23)."""
    DISTRIBUTED_BACKEND_MAP.setdefault(device_type, backend)


class _Axes:
    """What accelerate asks a mesh in order to deal batches out: its axes and their sizes."""

    def __init__(self, **sizes: int):
        self.sizes = sizes
        self.mesh_dim_names = tuple(sizes)

    def __getitem__(self, name: str) -> _Axes:
        return _Axes(**{name: self.sizes[name]})

    def size(self) -> int:
        return math.prod(self.sizes.values())


@contextlib.contextmanager
def batches_dealt_to(accelerator: Any, num_groups: int, group_size: int) -> Iterator[None]:
    """Data loaders that accelerate prepares in here give all ranks of a group the same batches.

    It does so for context parallelism, by a mesh that it would also shard parameters by.

    Args:
        num_groups: of neighbouring ranks, `group_size` each.
    """
    state, config = accelerator.state, accelerator.dataloader_config
    mesh, dispatches = state.device_mesh, config.dispatch_batches
    # Batches that rank 0 hands out know of no groups.
    state.device_mesh, config.dispatch_batches = _Axes(dp_shard=num_groups, cp=group_size), False
    try:
        yield
    finally:
        state.device_mesh, config.dispatch_batches = mesh, dispatches


def _fsdp_groups(model: Any) -> list[Any]:
    states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    return [state._fsdp_param_group for state in states if state._fsdp_param_group is not None]


def _fsdp_params(model: Any) -> list[Any]:
    """What FSDP2 keeps of each parameter that it shards, of all modules of a model."""
    return [param for group in _fsdp_groups(model) for param in group.fsdp_params]


def keep_padding(model: Any) -> None:
    """Let FSDP2 keep the shards that it has padded. Its first forward pass looks whether they still are the same, and
    takes fake tensors, whose addresses are all 0, for other ones."""
    for group in _fsdp_groups(model):
        group._reset_sharded_params = True


def fsdp_parameters(model: Any) -> list[tuple[tuple[Any, str], Any]]:
    """(module and name, DTensor) of each parameter that FSDP2 shards."""
    infos = [(param._module_info, param.sharded_param) for param in _fsdp_params(model)]
    return [((info.module, info.param_name), sharded) for info, sharded in infos]


def extend_all_gathers(model: Any) -> None:
    """Let FSDP2 look again which shards have an all-gather extension; it does so when it shards a parameter."""
    for param in _fsdp_params(model):
        param._init_extensions()


def launched_with_fsdp() -> bool:
    """Whether the launch config says `distributed_type: FSDP`, which accelerate hands on by this variable."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def launched_with_deepspeed() -> bool:
    """The same of `distributed_type: DEEPSPEED`."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def launched_fsdp_version() -> int:
    """`fsdp_version` of the launch config; 2 where it says nothing (accelerate's own default is 1)."""
    return int(os.environ.get("FSDP_VERSION", "2"))


def loads_on_rank_0_only() -> bool:
    """Whether the launch config says `fsdp_cpu_ram_efficient_loading: true`, which from_pretrained acts on."""
    return os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() in ("true", "1")


def ranks_per_node(world_size: int) -> int:
    """Processes that the launcher started on this node.

    Args:
        world_size: ranks that the trainer knows of.

    Raises:
        ValueError: if the launcher does not say, or if it started several that do not know of each other.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1 and started > 1:
        raise ValueError(
            f"The launcher started {started} processes, but each would train alone: no accelerator was found on this "
            "machine. To train on CPU processes, pass --use_cpu to the script."
        )
    if world_size == 1:
        return 1
    if "LOCAL_WORLD_SIZE" not in os.environ:
        raise ValueError(
            "LOCAL_WORLD_SIZE is not set, so it is unknown which ranks share a node; start the job with "
            "`accelerate launch` or `torchrun`, or set it to the number of processes on each node."
        )
    return int(os.environ["LOCAL_WORLD_SIZE"])


def use_fsdp_on_cpu(
    state: AcceleratorState, plugin: FullyShardedDataParallelPlugin, parallelism: ParallelismConfig | None
) -> None:
    """Make accelerate's FSDP real on CPU processes; accelerate 1.15 turns it into DDP there and says nothing.

    Does what `AcceleratorState` and `Accelerator` do on the other devices.
    """
    shared: Any = state
    shared.distributed_type = DistributedType.FSDP
    shared.fsdp_plugin = plugin
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    if parallelism is not None:
        shared.parallelism_config = parallelism
        shared.device_mesh = parallelism.get_device_mesh("cpu")


def use_one_device(args: Any) -> None:
    """Let a trainer of a single process use its first GPU alone; transformers would take all that it sees."""
    args._n_gpu = 1
