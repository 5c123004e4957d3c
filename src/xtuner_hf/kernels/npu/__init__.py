"""Ascend NPUs: torch_npu's fused operators, as kernels/device_operators.py wants them (docs/npu.md).

They are called through `torch.ops.npu`, so that nothing here imports torch_npu, which fails where CANN is missing.
"""

from ..device_operators import FusedOperators
from .attention import MAX_HEAD_SIZE, packed_attention
from .grouped_mm import grouped_mm
from .layers import clamped_swiglu, rms_norm, rotary, swiglu
from .tokens import permute, unpermute

OPERATORS = FusedOperators(
    rms_norm=rms_norm,
    rotary=rotary,
    swiglu=swiglu,
    clamped_swiglu=clamped_swiglu,
    grouped_mm=grouped_mm,
    permute=permute,
    unpermute=unpermute,
    attention=packed_attention,
    max_head_size=MAX_HEAD_SIZE,
)
