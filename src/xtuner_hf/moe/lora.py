"""LoRA on fused experts: PEFT's `target_parameters`, computed on the tokens instead of merged into the weights.

    get_peft_model(model, LoraConfig(target_modules=[], target_parameters=["mlp.experts.gate_up_proj", ...]))

puts a `ParamWrapper` around the experts for each parameter, one inside the other. PEFT's own forward swaps the
parameter for a sum of itself and the adapter's product, which FSDP cannot gather and which builds weights and gradients
as large as full training does. `ExpertsLora` keeps PEFT's parameters, names and shapes and hands the factors to the
experts' kernel:

    y = x W + (x A) B * scale          x A: [R, Q], a row of a few numbers

Legend: E experts, A input and B output features, Q rank, R rows.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import ParamWrapper
from torch import nn

from ..kernels.experts import LowRank
from .experts import EXPERTS_PATHS, implementation_name

ADAPTED = ("gate_up_proj", "down_proj")


class ExpertsLora(ParamWrapper):
    """PEFT's wrapper of a fused expert parameter whose forward lets the experts' kernel add the adapter.

    Attributes:
        first_expert: of the experts that this rank computes; the factors hold all of them.
    """

    first_expert: int = 0

    @property
    def ep_dispatcher(self) -> Any:
        """The expert-parallel dispatcher of the experts inside, None if there is none."""
        return getattr(self.get_base_layer(), "ep_dispatcher", None)

    def forward(self, hidden_TH: torch.Tensor, topk_ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """What the experts compute, with the active adapters."""
        experts: Any = self.get_base_layer()
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not names:
            return self.base_layer(hidden_TH, topk_ids_TK, weights_TK)
        outer = getattr(experts, "adapters", {})
        experts.adapters = outer | {self.parameter_name: self.factors(names)}
        try:
            return self.base_layer(hidden_TH, topk_ids_TK, weights_TK)
        finally:
            experts.adapters = outer

    def factors(self, names: list[str]) -> LowRank:
        """Those of this rank's experts; several adapters follow each other along the rank."""
        experts: Any = self.get_base_layer()
        mine = slice(self.first_expert, self.first_expert + experts.num_experts)
        downs, ups = [], []
        for name in names:
            down: Any = self.lora_A[name].weight
            up: Any = self.lora_B[name].weight
            downs.append(down.view(self.num_experts, -1, down.shape[1])[mine].transpose(1, 2))
            ups.append(up.view(up.shape[0], -1, self.num_experts)[:, :, mine].permute(2, 1, 0) * self.scaling[name])
        return LowRank(torch.cat(downs, dim=2), torch.cat(ups, dim=1).contiguous())


def adopt_wrappers(model: nn.Module) -> list[ExpertsLora]:
    """Make `ExpertsLora` of all wrappers around experts, in place; returns the outermost one of each layer.

    Raises:
        ValueError: for adapters on other parameters of the experts, or an experts kernel of transformers.
    """
    outermost = []
    inside: set[nn.Module] = set()
    for wrapper in model.modules():  # from the outside in
        if (
            not isinstance(wrapper, ParamWrapper)
            or wrapper in inside
            or not hasattr(wrapper.get_base_layer(), "gate_up_proj")
        ):
            continue
        _check_kernel(wrapper.get_base_layer())
        inner: Any = wrapper
        while isinstance(inner, ParamWrapper):
            if inner.parameter_name not in ADAPTED:
                raise ValueError(
                    f"target_parameters asks for an adapter on {inner.parameter_name} of the experts; there is one for "
                    f"{' and '.join(ADAPTED)}."
                )
            if type(inner) is ParamWrapper:
                # As FSDP does with what it shards: the module stays, its class is a subclass.
                inner.__class__ = ExpertsLora
            inside.add(inner)
            inner = inner.base_layer
        outermost.append(wrapper)
    return outermost  # type: ignore[return-value]  # by now they are


def _check_kernel(experts: Any) -> None:
    kernels = [kernel for kernel in EXPERTS_PATHS if kernel not in ("fused", "fp8")]
    ours = [implementation_name(kernel) for kernel in kernels]
    found = experts.config._experts_implementation
    if found not in ours:
        raise ValueError(
            f"The experts have adapters (target_parameters), and the experts kernel {found!r} does not know them: set "
            f"experts_kernel to one of {', '.join(kernels)}, and leave fp8 off."
        )
