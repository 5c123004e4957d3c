"""The gated activation between an expert's two projections, described so that a fused kernel can compute it.

Legend: R rows, I expert intermediate size, F = 2*I (gate and up).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SwiGLU:
    """(up + up_shift) * gate * sigmoid(alpha * gate), with gate <= limit and -limit <= up <= limit.

    The defaults are SwiGLU (arXiv 2002.05202). GPT-OSS (arXiv 2508.10925) clamps, has alpha 1.702 and shifts by 1.

    Args:
        interleaved: gate and up stand in turn along F; otherwise gate's half comes first.
    """

    interleaved: bool = False
    alpha: float = 1.0
    limit: float | None = None
    up_shift: float = 0.0

    def split(self, gate_up_RF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate and up, [R, I] each: views."""
        if self.interleaved:
            return gate_up_RF[..., ::2], gate_up_RF[..., 1::2]
        gate_RI, up_RI = gate_up_RF.chunk(2, dim=-1)
        return gate_RI, up_RI

    def forward(self, gate_up_RF: torch.Tensor) -> torch.Tensor:
        """[R, F] -> [R, I] in the dtype of the input."""
        gate_RI, up_RI = self.split(gate_up_RF)
        if self.limit is not None:
            gate_RI, up_RI = gate_RI.clamp(max=self.limit), up_RI.clamp(-self.limit, self.limit)
        return (up_RI + self.up_shift) * gate_RI * torch.sigmoid(self.alpha * gate_RI)

    def backward(self, gate_up_RF: torch.Tensor, grad_RI: torch.Tensor) -> torch.Tensor:
        """The gradient of `gate_up_RF` [R, F]; none flows where a clamp holds a value."""
        raw_gate_RI, raw_up_RI = self.split(gate_up_RF)
        gate_RI, up_RI = raw_gate_RI, raw_up_RI
        if self.limit is not None:
            gate_RI, up_RI = gate_RI.clamp(max=self.limit), up_RI.clamp(-self.limit, self.limit)
        sigmoid_RI = torch.sigmoid(self.alpha * gate_RI)
        grad_gate_up_RF = torch.empty_like(gate_up_RF)
        grad_gate_RI, grad_up_RI = self.split(grad_gate_up_RF)
        slope_RI = sigmoid_RI * (1 + self.alpha * gate_RI * (1 - sigmoid_RI))
        grad_gate_RI.copy_(grad_RI * (up_RI + self.up_shift) * slope_RI)
        grad_up_RI.copy_(grad_RI * gate_RI * sigmoid_RI)
        if self.limit is not None:
            grad_gate_RI.masked_fill_(raw_gate_RI > self.limit, 0)
            grad_up_RI.masked_fill_(raw_up_RI.abs() > self.limit, 0)
        return grad_gate_up_RF
