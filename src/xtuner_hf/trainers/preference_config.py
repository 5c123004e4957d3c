"""The arguments of training on preferences: DPO and MPO."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from trl import DPOConfig

from .arguments import MoEArguments


@dataclass
class MoEDPOConfig(MoEArguments, DPOConfig):
    """`trl.DPOConfig` and the arguments of MoE training.

    None as a coefficient of balancing takes the family's published value; the Switch loss is ours and not TRL's: by
    layer, over the global batch.
    """

    trains_mtp: ClassVar[bool] = False

    sft_reduction: str = field(
        default="token",
        metadata={
            "help": "How the 'sft' loss averages over the chosen answers of the optimizer step: 'token' gives every "
            "token the same weight, 'sequence' every answer (its tokens' mean)."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.sft_reduction not in ("token", "sequence"):
            raise ValueError(f"sft_reduction is {self.sft_reduction!r}; choose 'token' or 'sequence'.")


@dataclass
class MoEMPOConfig(MoEDPOConfig):
    """Mixed preference optimization (InternVL, arXiv 2411.10442): 0.8 DPO + 0.2 BCO + 1.0 likelihood of the chosen.

    The likelihood term weighs every answer alike, as the paper's does.
    """

    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid", "bco_pair", "sft"],
        metadata={"help": "Losses that are added up, with the weights in `loss_weights`."},
    )
    loss_weights: list[float] | None = field(
        default_factory=lambda: [0.8, 0.2, 1.0], metadata={"help": "A weight for each of `loss_type`."}
    )
    sft_reduction: str = field(default="sequence", metadata={"help": "As in MoEDPOConfig."})
    reward_shift: str = field(
        default="running",
        metadata={
            "help": "What 'bco_pair' subtracts from the rewards. 'running': their mean over all optimizer steps so far "
            "with the present one, as InternVL does; with gradient accumulation it costs one more forward pass, "
            "unless the Switch loss already pays for it. 'lagged': the same without the present step, at no cost. "
            "'none': 0, as in TRL."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.reward_shift not in ("running", "lagged", "none"):
            raise ValueError(f"reward_shift is {self.reward_shift!r}; choose 'running', 'lagged' or 'none'.")
        if self.ld_alpha is not None or self.use_weighting:
            raise ValueError("MPO is not defined with ld_alpha or use_weighting; leave both at their defaults.")
