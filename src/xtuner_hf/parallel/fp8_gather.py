"""FSDP's all-gather of weights in FP8: what travels is what the products read, quantised once a step by its owner."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from torch.distributed.tensor import Shard

from .._compat import extend_all_gathers, fsdp_parameters
from ..kernels.fp8 import BLOCK
from ..kernels.fp8_linear import Fp8Linear
from ..kernels.fp8_weights import QuantisedCache, ShardExtension

logger = logging.getLogger(__name__)


def gather_in_fp8(model: nn.Module) -> list[QuantisedCache]:
    """Let FSDP gather the weights of FP8 products as FP8; call it before the first forward pass.

    A weight of which ranks hold parts of blocks, whose scale no rank knows by itself, is gathered in the computation's
    dtype and quantised at each use; a log line says how many there are.

    Returns:
        What each rank keeps of its shards.
    """
    extensions, left = [], 0
    for parameter, sharded in fsdp_parameters(model):
        if not _is_read_in_fp8(*parameter):
            continue
        if _holds_whole_blocks(sharded):
            extensions.append(ShardExtension(sharded))
        else:
            left += 1
    extend_all_gathers(model)
    if left:
        logger.info(
            "FP8: %d weights are gathered as FP8. %d are not, because their shards end within a block of %d rows.",
            *(len(extensions), left, BLOCK),
        )
    return [extension.cache for extension in extensions]


def _is_read_in_fp8(module: nn.Module, name: str) -> bool:
    is_experts = hasattr(module, "gate_up_proj") and name in ("gate_up_proj", "down_proj")
    return is_experts or (isinstance(module, Fp8Linear) and name == "weight")


def _holds_whole_blocks(sharded: Any) -> bool:
    """Whether each rank's part can be quantised by itself: whole experts, or rows in whole blocks."""
    split = [placement for placement in sharded.placements if isinstance(placement, Shard)]
    num_ranks = sharded.device_mesh.size(sharded.device_mesh.ndim - 1)
    if any(placement.dim != 0 for placement in split):
        return False
    unit = 1 if sharded.ndim == 3 else BLOCK
    return sharded.shape[0] % (num_ranks * unit) == 0
