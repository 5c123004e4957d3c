"""The inference engine samples from another distribution than the trainer computes: how far apart, and what to do.

    rho_t = pi_train(token) / pi_engine(token), both with the weights that sampled

A correction is a non-negative weight of each token's policy gradient. It is folded into the advantages, so that it
works with every loss and every engine.

Legend: B samples, T positions of the completion.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Method -> level at which the ratio is taken, what happens outside the bounds, and published bounds (lower, upper); no
# bounds where they depend on the length of the answers and must be chosen.
METHODS: dict[str, tuple[str, str, tuple[float | None, float | None] | None]] = {
    "token_truncate": ("token", "truncate", (None, 2.0)),  # TIS; bound of verl and slime
    "token_mask": ("token", "mask", (0.5, 5.0)),
    "icepop": ("token", "mask", (0.5, 5.0)),  # Ring-1T, arXiv 2510.18855
    "sequence_truncate": ("sequence", "truncate", (None, 2.0)),
    "sequence_mask": ("sequence", "mask", (None, 3.0)),  # MIS; bound of TRL
    "geometric_truncate": ("geometric", "truncate", None),
    "geometric_mask": ("geometric", "mask", None),
}


@dataclass(frozen=True)
class MismatchCorrection:
    """A weight for each token from its importance ratio.

    Args:
        level: "token" takes each token's own ratio, "sequence" the product over the sample's tokens, "geometric" the
            product's root by their number, which does not shrink or grow with the length.
        outside: "truncate" clamps a ratio to the bounds, "mask" gives it the weight 0.
        lower, upper: bounds of the ratio, None for none.
        veto: a sample with any token's ratio below it gets the weight 0 as a whole; None for no veto.
    """

    level: str
    outside: str
    lower: float | None
    upper: float | None
    veto: float | None = None

    @classmethod
    def named(
        cls, method: str, lower: float | None = None, upper: float | None = None, veto: float | None = None
    ) -> MismatchCorrection:
        """The correction of this name, with the published bounds unless one is given.

        Raises:
            ValueError: unknown name, no bound where there is no published one, or bounds that exclude 1.
        """
        if method not in METHODS:
            raise ValueError(f"mismatch_correction is {method!r}; it must be one of {', '.join(sorted(METHODS))}.")
        level, outside, published = METHODS[method]
        if lower is None and upper is None:
            if published is None:
                raise ValueError(
                    f"mismatch_correction {method!r} has no published bounds that fit every length of answers: set "
                    "mismatch_min and mismatch_max, for instance 0.99 and 1.01, and watch mismatch/kept."
                )
            lower, upper = published
        if (lower is not None and not 0 <= lower <= 1) or (upper is not None and upper < 1):
            raise ValueError(
                f"mismatch_min is {lower} and mismatch_max {upper}; equal distributions have the ratio 1, which must "
                "lie between them."
            )
        return cls(level, outside, lower, upper, veto)

    def weights(self, log_ratio_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """[B, T] weights, 0 or more; without meaning where the mask is 0.

        Args:
            log_ratio_BT: log rho of each token, 0 where there is none.
            mask_BT: 1 on the tokens that the model sampled.
        """
        if self.level == "token":
            ratio = log_ratio_BT.exp()
        else:
            log_ratio_B1 = (log_ratio_BT * mask_BT).sum(-1, keepdim=True)
            if self.level == "geometric":
                log_ratio_B1 = log_ratio_B1 / mask_BT.sum(-1, keepdim=True).clamp(min=1)
            ratio = log_ratio_B1.exp().expand_as(log_ratio_BT)
        if self.outside == "truncate":
            weights = ratio.clamp(min=self.lower, max=self.upper)
        else:
            lower = 0.0 if self.lower is None else self.lower
            upper = torch.inf if self.upper is None else self.upper
            weights = ratio.where((ratio >= lower) & (ratio <= upper), 0.0)
        if self.veto is not None:
            is_vetoed_B1 = ((log_ratio_BT.exp() < self.veto) & mask_BT.bool()).any(-1, keepdim=True)
            weights = weights.masked_fill(is_vetoed_B1, 0.0)
        return weights


def log_ratios(train_logps_BT, engine_logps_BT, mask_BT) -> torch.Tensor:
    """[B, T] log rho; 0 outside the mask and for tokens that the engine did not score (NaN)."""
    return torch.nan_to_num(train_logps_BT - engine_logps_BT, nan=0.0) * mask_BT


def mismatch_metrics(log_ratio_BT, mask_BT, weights_BT, accelerator) -> dict[str, float]:
    """How far the engine is from the trainer, over the sampled tokens of all ranks. Every rank must call it.

    `k3` estimates KL(engine || trainer) in nats a token by rho - 1 - log rho (Schulman's k3, never negative); `ess` is
    the effective sample size of plain importance weights as a share of the tokens, (sum rho)^2 / (n sum rho^2): 1 when
    the two agree; `kept` is the share of tokens with a weight above 0.

    Args:
        weights_BT: of the correction, None without one.
        accelerator: of the trainer.
    """
    on = mask_BT.bool()
    log_ratio = log_ratio_BT[on].float()
    ratio = log_ratio.exp()
    kept = ratio.new_ones(()) * len(ratio) if weights_BT is None else (weights_BT[on] > 0).sum()
    sums = torch.stack(
        [
            on.sum().float(),
            (ratio - 1 - log_ratio).sum(),
            log_ratio.abs().sum(),
            ratio.sum(),
            (ratio * ratio).sum(),
            kept.float(),
        ]
    )
    # One value a rank even if it has no token at all.
    extremes = torch.stack(
        [
            torch.cat([log_ratio.abs(), log_ratio.new_zeros(1)]).max(),
            torch.cat([ratio, ratio.new_full((1,), -torch.inf)]).max(),
            torch.cat([-ratio, ratio.new_full((1,), -torch.inf)]).max(),
        ]
    )
    tokens, k3, difference, ratio_sum, square_sum, kept_sum = accelerator.reduce(sums, reduction="sum").tolist()
    gathered = accelerator.gather(extremes[None]).amax(0).tolist()
    if tokens == 0:
        return {}
    return {
        "mismatch/k3": k3 / tokens,
        "mismatch/logp_difference_mean": difference / tokens,
        "mismatch/logp_difference_max": gathered[0],
        "mismatch/ratio_min": -gathered[2],
        "mismatch/ratio_mean": ratio_sum / tokens,
        "mismatch/ratio_max": gathered[1],
        "mismatch/ess": ratio_sum**2 / (tokens * square_sum),
        "mismatch/kept": kept_sum / tokens,
    }
