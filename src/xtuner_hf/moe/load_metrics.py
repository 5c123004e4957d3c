"""How evenly the experts are loaded: figures by layer, from the counts of one optimizer step.

Legend: L MoE layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class LoadMetrics:
    """Load of all layers in one optimizer step, over all ranks.

    Args:
        load_LE: [L, E] int64 on the host: (token, expert) pairs of each expert.
        aux_loss: Switch loss, mean over layers (1 is even), before its coefficient.
        z_loss: mean over layers, None if not in use.
        sequence_loss: mean over layers, None if not in use.
    """

    load_LE: torch.Tensor
    aux_loss: float
    z_loss: float | None = None
    sequence_loss: float | None = None

    @property
    def max_vio_L(self) -> torch.Tensor:
        """max load / mean load - 1 (MaxVio, arXiv 2408.15664, eq. 4): 0 is even, E-1 is one expert for all."""
        return self.load_LE.double().amax(-1) / self._mean_L - 1

    @property
    def cv_L(self) -> torch.Tensor:
        """Coefficient of variation: standard deviation / mean."""
        return self.load_LE.double().std(-1, correction=0) / self._mean_L

    @property
    def dead_experts_L(self) -> torch.Tensor:
        """Experts that got no token at all."""
        return (self.load_LE == 0).sum(-1)

    @property
    def entropy_L(self) -> torch.Tensor:
        """Entropy of the load divided by log E: 1 is even, 0 is one expert for all."""
        fraction_LE = self.load_LE.double() / self.load_LE.sum(-1, keepdim=True).clamp(min=1)
        entropy_L = torch.special.entr(fraction_LE).sum(-1)
        return entropy_L / torch.log(torch.tensor(float(max(self.load_LE.shape[1], 2))))

    @property
    def _mean_L(self) -> torch.Tensor:
        # An empty step has no load to be uneven; 1 keeps its figures finite.
        return self.load_LE.double().mean(-1).clamp(min=torch.finfo(torch.float64).tiny)

    def logs(self) -> dict[str, float]:
        """Figures over layers, for a trainer's log. The worst layer counts: one collapsed layer hides in a mean."""
        logs = {
            "router/aux_loss": self.aux_loss,
            "router/max_vio": self.max_vio_L.mean().item(),
            "router/max_vio_worst_layer": self.max_vio_L.max().item(),
            "router/cv": self.cv_L.mean().item(),
            "router/entropy": self.entropy_L.mean().item(),
            "router/dead_experts": float(self.dead_experts_L.sum().item()),
        }
        if self.z_loss is not None:
            logs["router/z_loss"] = self.z_loss
        if self.sequence_loss is not None:
            logs["router/sequence_loss"] = self.sequence_loss
        return logs
