"""The experts of a layer: dispatch -> grouped MLP -> combine, as a module that transformers can shard and swap.

Legend: T tokens, H hidden size, I expert intermediate size, F = 2*I, E experts, K experts per token, R = T*K rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN, SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from ..device import is_simulated, kind
from ..kernels.device_operators import fused_on
from ..kernels.experts import EXPERTS_KERNELS, ExpertsKernel, ExpertWeights
from ..kernels.fused import fp8_experts, fused_experts, refusal_of
from ..kernels.select import choose_experts_kernel, computing_dtype
from ..kernels.swiglu import SwiGLU
from .combine import combine
from .dispatcher import dispatch


def expert_weights(experts: Any) -> ExpertWeights:
    """The weights of any experts module that transformers' `use_experts_implementation` decorates."""
    gate_up, down = experts.gate_up_proj, experts.down_proj
    if not experts.is_transposed:
        gate_up, down = gate_up.transpose(-2, -1), down.transpose(-2, -1)
    weights = ExpertWeights(gate_up, down, experts._apply_gate, swiglu=_swiglu(experts))
    if experts.has_bias:
        weights = weights._replace(gate_up_bias_EF=experts.gate_up_proj_bias, down_bias_EH=experts.down_proj_bias)
    # Set by moe/lora.py for an adapted forward. Only in here do weights of FSDP have the dtype of the computation.
    adapters = {name: factors.to(gate_up.dtype) for name, factors in getattr(experts, "adapters", {}).items()}
    return weights._replace(
        gate_up_adapter=adapters.get("gate_up_proj"),
        down_adapter=adapters.get("down_proj"),
    )


def _swiglu(experts: Any) -> SwiGLU | None:
    """What `experts._apply_gate` computes, None if it is nothing that a fused kernel knows."""
    if isinstance(experts, GptOssExperts):
        return SwiGLU(interleaved=True, alpha=experts.alpha, limit=experts.limit, up_shift=1.0)
    decorated: Any = GroupedExperts  # the decorator adds transformers' default
    is_default = type(experts)._apply_gate is decorated._apply_gate
    return SwiGLU() if is_default and isinstance(experts.act_fn, (nn.SiLU, SiLUActivation)) else None


# (hidden_TH, topk_ids_TK, weights_TK, weights) -> [T, H]
ExpertsPath = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, ExpertWeights], torch.Tensor]


def _on_rows(kernel: ExpertsKernel) -> ExpertsPath:
    """Dropless experts around a kernel that computes rows grouped by expert."""

    def path(hidden_TH, topk_ids_TK, weights_TK, weights: ExpertWeights):
        rows = dispatch(hidden_TH, topk_ids_TK, weights.gate_up_EHF.shape[0])
        return combine(kernel(rows.x_RH, weights, rows.offsets_E), weights_TK, rows.row_of_slot_R)

    return path


def _auto(hidden_TH, topk_ids_TK, weights_TK, weights: ExpertWeights) -> torch.Tensor:
    sizes = tuple(weights.down_EIH.shape[1:])
    device, dtype = hidden_TH.device, computing_dtype(hidden_TH)
    name = choose_experts_kernel(kind(device), dtype, sizes, refusal_of(weights), simulated=is_simulated(device))
    return EXPERTS_PATHS[name](hidden_TH, topk_ids_TK, weights_TK, weights)


EXPERTS_PATHS: dict[str, ExpertsPath] = {
    "auto": _auto,
    "fused": fused_experts,
    "fp8": fp8_experts,
    **{name: _on_rows(kernel) for name, kernel in EXPERTS_KERNELS.items()},
}
"""What `experts_kernel` can name, besides what transformers registers."""


def run_experts(kernel_name: str, experts: Any, hidden_TH, topk_ids_TK, weights_TK) -> torch.Tensor:
    """Dropless experts with the kernel of that name; `experts` is any module with transformers' gated layout."""
    return EXPERTS_PATHS[kernel_name](hidden_TH, topk_ids_TK, weights_TK, expert_weights(experts))


def implementation_name(kernel_name: str) -> str:
    """The name under which a kernel of ours stands in transformers' registry of experts implementations."""
    return f"xtuner_{kernel_name}"


def _register(kernel_name: str) -> None:
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return run_experts(kernel_name, self, hidden_states, top_k_index, top_k_weights)

    ALL_EXPERTS_FUNCTIONS.register(implementation_name(kernel_name), forward)


for _name in EXPERTS_PATHS:
    _register(_name)


@use_experts_implementation
class GroupedExperts(nn.Module):
    """E gated MLPs, stored as transformers stores them: gate rows above up rows, one 3-D parameter for all experts.

    `config._experts_implementation` picks the kernel: one of ours (`EXPERTS_PATHS`, `xtuner_` before the name)
    or any that transformers knows. Its expert parallelism finds `num_experts` and the parameters by these names.
    """

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_local_experts
        self.gate_up_proj = nn.Parameter(
            torch.empty(self.num_experts, 2 * config.moe_intermediate_size, config.hidden_size)
        )
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, config.moe_intermediate_size))
        self.act_fn = ACT2FN[config.hidden_act]

    def _apply_gate(self, gate_up_RF: torch.Tensor) -> torch.Tensor:
        """Where transformers' experts gate: [R, 2*I] -> [R, I]."""
        fused = fused_on(gate_up_RF.device).swiglu
        if fused is not None and isinstance(self.act_fn, nn.SiLU | SiLUActivation):
            return fused(gate_up_RF)
        gate, up = gate_up_RF.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, hidden_states, top_k_index, top_k_weights):
        """What transformers calls "eager": the reference kernel. [T, H], [T, K] int64, [T, K] fp32 -> [T, H]."""
        return run_experts("reference", self, hidden_states, top_k_index, top_k_weights)
