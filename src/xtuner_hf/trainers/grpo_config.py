"""The arguments of reinforcement learning: GRPO and its relatives, DAPO."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import ClassVar

from trl import GRPOConfig

from ..rl.mismatch import MismatchCorrection
from .arguments import MoEArguments

logger = logging.getLogger(__name__)


@dataclass
class MoEGRPOConfig(MoEArguments, GRPOConfig):
    """`trl.GRPOConfig` and the arguments of MoE training; `rl/presets.py` has the objectives of the papers.

    Balancing is off unless asked for, also where the family published coefficients, and the balance losses never move
    a model alone: a step in which no sample has an advantage goes without them.
    """

    trains_mtp: ClassVar[bool] = False

    router_aux_loss_coef: float | None = field(
        default=0.0,
        metadata={
            "help": "Coefficient of the Switch loss of each MoE layer over the global batch. Off by default in "
            "reinforcement learning; None takes the family's published value."
        },
    )
    router_sequence_loss_coef: float | None = field(
        default=0.0,
        metadata={
            "help": "Coefficient of the balance loss within each document. Off by default in reinforcement learning; "
            "None takes the family's published value."
        },
    )
    router_bias_update_rate: float | None = field(
        default=0.0,
        metadata={
            "help": "Step of the correction bias after each optimizer step. Off by default in reinforcement learning, "
            "where the routes that were sampled count; None takes the family's published value."
        },
    )
    router_replay: str | None = field(
        default=None,
        metadata={
            "help": "Send tokens to the experts that were chosen before: 'R2' by this trainer when it computed the old "
            "log-probabilities, 'R3' by the inference engine when it sampled (its rollouts must carry "
            "'routed_experts'). For MoE models trained off policy or sampled by another engine."
        },
    )
    mismatch_correction: str | None = field(
        default=None,
        metadata={
            "help": "Weigh tokens by how much likelier the trainer finds them than the engine did: 'token_truncate', "
            "'token_mask', 'icepop', 'sequence_truncate', 'sequence_mask', 'geometric_truncate' or 'geometric_mask'. "
            "Works with every engine that returns log-probabilities, and takes the place of TRL's own for vLLM."
        },
    )
    mismatch_min: float | None = field(default=None, metadata={"help": "Lower bound of the ratio, 1 or less."})
    mismatch_max: float | None = field(
        default=None,
        metadata={"help": "Upper bound of the ratio, 1 or more. Without any bound the method's published ones apply."},
    )
    mismatch_veto: float | None = field(
        default=None,
        metadata={
            "help": "Leave out samples with a token that the trainer finds less likely than the engine by this factor; "
            "1e-4 is usual. Needs a mismatch_correction."
        },
    )

    reward_timeout: float | None = field(
        default=None,
        metadata={
            "help": "Seconds that reward functions have for a batch. Each is then called sample by sample; a sample on "
            "which one raises or takes longer gets no reward from it, which is counted in rewards/<name>/failed and is "
            "not the reward 0. None calls them as TRL does: an exception ends the run, and what hangs hangs. Not for "
            "functions that compare the samples of a group."
        },
    )

    def __post_init__(self):
        for name in ("balance_batches", "max_tokens_per_micro_batch"):
            if getattr(self, name):
                raise ValueError(f"{name} would take the answers to a prompt apart: leave it out.")
        is_given = self.generation_batch_size is not None
        super().__post_init__()
        if self.sp_size > 1:
            self._share_generation(is_given)
        if self.reward_timeout is not None and self.reward_timeout <= 0:
            raise ValueError(f"reward_timeout is {self.reward_timeout}; it is a number of seconds above 0, or None.")
        if self.router_replay not in (None, "R2", "R3"):
            raise ValueError(f"router_replay is {self.router_replay!r}; choose 'R2', 'R3' or None.")
        if self.mismatch_correction is not None:
            self.correction  # noqa: B018  # raises for a wrong name or bound
            # One correction, whatever the engine; TRL's would multiply a second time.
            self.vllm_importance_sampling_correction = False
        elif (self.mismatch_min, self.mismatch_max, self.mismatch_veto) != (None, None, None):
            raise ValueError("mismatch_min, mismatch_max and mismatch_veto need a mismatch_correction.")
        if self.loss_type == "cispo" and (self.epsilon_high is None or self.epsilon_high < 1):
            raise ValueError(
                f"With loss_type 'cispo' epsilon_high is the largest ratio itself, and it is {self.epsilon_high} (None "
                f"stands for epsilon, {self.epsilon}): every token would count with at most that weight. Set "
                "epsilon_high=5.0 (PRESETS['cispo'])."
            )
        if self.importance_sampling_level == "sequence" and self.loss_type == "grpo" and self.epsilon > 0.01:
            logger.warning(
                "epsilon is %s with one ratio a sequence: it clips next to nothing. GSPO uses 3e-4, and 4e-4 for "
                "epsilon_high (PRESETS['gspo']).",
                self.epsilon,
            )

    def _share_generation(self, is_given: bool) -> None:
        """TRL counts a batch on every rank; only one in `sp_size` has one of its own."""
        assert self.steps_per_generation is not None  # as TRL fills both in
        assert self.generation_batch_size is not None
        assert self.num_generations is not None
        if is_given:
            self.steps_per_generation *= self.sp_size
        else:
            self.generation_batch_size //= self.sp_size
        samples = self.per_device_train_batch_size * self.steps_per_generation
        if samples % self.num_generations:
            raise ValueError(
                f"With sp_size {self.sp_size}, a group of as many ranks samples {samples} answers at a time "
                f"(per_device_train_batch_size x steps_per_generation), which num_generations {self.num_generations} "
                "does not divide; change one of the three."
            )

    @property
    def correction(self) -> MismatchCorrection | None:
        if self.mismatch_correction is None:
            return None
        bounds = (self.mismatch_min, self.mismatch_max, self.mismatch_veto)
        return MismatchCorrection.named(self.mismatch_correction, *bounds)


@dataclass
class MoEDAPOConfig(MoEGRPOConfig):
    """DAPO (arXiv 2503.14476): higher upper clip, mean over tokens, dynamic sampling, soft overlong punishment.

    Overlong filtering, which the paper used before the punishment, is `mask_truncated_completions`.
    """

    loss_type: str = field(default="dapo", metadata={"help": "As in GRPOConfig."})
    epsilon_high: float | None = field(default=0.28, metadata={"help": "As in GRPOConfig."})
    dynamic_sampling: bool = field(
        default=True,
        metadata={"help": "Sample further prompts until the batch is full of groups whose answers differ."},
    )
    dynamic_sampling_metric: str | None = field(
        default=None,
        metadata={
            "help": "Name of the reward function in which the answers of a group must differ. None takes the weighted "
            "sum of all, without the overlong punishment."
        },
    )
    dynamic_sampling_max_rounds: int = field(
        default=10,
        metadata={
            "help": "Batches to sample at most for one; what is then missing is filled with samples that do not train, "
            "and a warning says so."
        },
    )
    soft_overlong_fraction: float = field(
        default=0.2,
        metadata={
            "help": "Over which last part of max_completion_length the reward falls by up to 1; the paper's 4096 of "
            "20480 tokens is 0.2. 0 switches the punishment off."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.soft_overlong_fraction <= 1:
            raise ValueError(f"soft_overlong_fraction is {self.soft_overlong_fraction}; it must be between 0 and 1.")
        if self.dynamic_sampling_max_rounds < 1:
            raise ValueError(
                f"dynamic_sampling_max_rounds is {self.dynamic_sampling_max_rounds}; it must be 1 or more."
            )
        samples = self.per_device_train_batch_size * self.steps_per_generation
        if self.dynamic_sampling and samples % self.num_generations:
            raise ValueError(
                f"A rank samples {samples} answers at a time (per_device_train_batch_size x steps_per_generation), "
                f"which num_generations {self.num_generations} does not divide: groups would lie on two ranks, where "
                "dynamic_sampling cannot choose them. Change one of the three, or set dynamic_sampling=False."
            )
