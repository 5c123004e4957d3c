"""The objectives of the papers as arguments: `MoEGRPOConfig(**PRESETS["gspo"], output_dir=...)`.

They set the objective alone; batch sizes and lengths are the user's, learning rates are near 1e-6 in all of them.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # DeepSeekMath (arXiv 2402.03300, eq. 3-4, sec. 4.2): mean over samples of the mean over tokens; KL 0.04, k3 as it
    # is (TRL multiplies it by the ratio otherwise, as DeepSeek-V3.2 does).
    "grpo": {
        "loss_type": "grpo",
        "epsilon": 0.2,
        "beta": 0.04,
        "scale_rewards": "group",
        "use_bias_correction_kl": False,
    },
    # Dr. GRPO (arXiv 2503.20783): neither the length of an answer nor the spread of its group scales the gradient.
    "dr_grpo": {"loss_type": "dr_grpo", "epsilon": 0.2, "beta": 0.0, "scale_rewards": "none"},
    # DAPO (arXiv 2503.14476): for MoEDAPOConfig, whose defaults these are.
    "dapo": {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "beta": 0.0, "scale_rewards": "group"},
    # GSPO (arXiv 2507.18071, sec. 5.1): one ratio a sequence, hence the narrow clip; 4 updates a batch of rollouts.
    "gspo": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "epsilon": 3e-4,
        "epsilon_high": 4e-4,
        "beta": 0.0,
    },
    # CISPO (MiniMax-M1, arXiv 2506.13585): the ratio is cut off and takes no gradient. The cap is absolute, 5 as in
    # ScaleRL (arXiv 2510.13786), which found 4, 5 and 8 alike.
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0, "beta": 0.0},
}
