"""`MoEMPOTrainer`: mixed preference optimization as InternVL trains it (arXiv 2411.10442).

    L = 0.8 L_dpo + 0.2 L_bco + 1.0 L_sft
    L_bco = -log sigmoid(r_chosen - delta) - log sigmoid(-(r_rejected - delta)),   r = beta * log(policy / reference)

delta is the running mean of all rewards, chosen and rejected, since training began. (TRL's 'bco_pair' has no delta.)
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .dpo import MoEDPOTrainer, PairCounts
from .preference_config import MoEDPOConfig, MoEMPOConfig


class RewardShift(TrainerCallback, ExportableState):
    """The running mean of rewards; saved in, and restored from, the checkpoint's `trainer_state.json`."""

    def __init__(self) -> None:
        self.total = 0.0  # sum of rewards
        self.count = 0.0

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else 0.0

    def update(self, total: float, count: float) -> None:
        self.total += total
        self.count += count

    def state(self) -> dict:
        return {"args": {}, "attributes": {"total": self.total, "count": self.count}}

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step:
            self.total, self.count = saved["attributes"]["total"], saved["attributes"]["count"]


class MoEMPOTrainer(MoEDPOTrainer):
    """MPO for the models of this package, dense or MoE; takes what `MoEDPOTrainer` takes, with `MoEMPOConfig`.

    The shift is updated once an optimizer step, over all ranks and micro-batches and before it is used, so that it and
    the loss do not depend on how the step is split. Evaluation uses it and leaves it alone. It is logged as
    `rewards/shift`.
    """

    own_losses: ClassVar[tuple[str, ...]] = ("sft", "bco_pair")
    config_class: ClassVar[type[MoEDPOConfig]] = MoEMPOConfig

    def __init__(self, *positional: Any, **keywords: Any):
        super().__init__(*positional, **keywords)
        self._shift = RewardShift()
        self.add_callback(self._shift)

    def _start_step(self, batches: list[dict], device: torch.device) -> None:
        super()._start_step(batches, device)
        self._rewards_seen = torch.zeros(2, device=device)  # their sum and number on this rank
        self._knows_shift = self.args.reward_shift != "running"

    def training_step(self, model, inputs, num_items_in_batch=None):
        # The shift of the first micro-batch depends on the rewards of the last. With a Switch loss the parent does it.
        is_first = self._micro_batch == 0 and len(self._batches) > 1
        if is_first and not self._knows_shift and not self._balance.config.aux_loss_coef:
            self._count_pass(model)
        share = super().training_step(model, inputs, num_items_in_batch)
        if self.args.reward_shift == "lagged" and self._micro_batch == len(self._batches):
            self._update_shift()
        return share

    def _count_pass(self, model) -> None:
        """Besides the load of the experts, learn the rewards of the whole step."""
        if self._knows_shift:
            super()._count_pass(model)
            return
        model.train()
        for batch in self._batches:
            on_device: Any = self._prepare_input(batch)
            # The training forward finds the reference's log-probabilities in the batch.
            batch.update(self._with_reference(on_device))
        with torch.no_grad(), self._balance.recording(), self.compute_loss_context_manager():
            for batch in self._batches:
                labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
                inputs = self._model_inputs(batch)
                outputs = self.shared(model)(**inputs, labels=labels, use_cache=False, fused_lm_head=True)
                width = batch["completion_mask"].shape[1] - 1
                self._see_rewards(*self._rewards(outputs.log_probs[:, -width:], batch))
        self._reduce_counts()
        self._update_shift()

    def _rewards(self, logps: torch.Tensor, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """[B] of the chosen and of the rejected answers."""
        chosen_logps, rejected_logps = logps.sum(1).chunk(2)
        return (
            self.beta * (chosen_logps - inputs["ref_chosen_logps"]),
            self.beta * (rejected_logps - inputs["ref_rejected_logps"]),
        )

    def _see_rewards(self, chosen: torch.Tensor, rejected: torch.Tensor) -> None:
        total = (chosen + rejected).detach().sum()
        self._rewards_seen += torch.stack([total, torch.full_like(total, 2.0 * len(chosen))])

    def _update_shift(self) -> None:
        self._shift.update(*self.sum_over_batches(self._rewards_seen).tolist())
        self._knows_shift = True

    def _bco_pair_share(self, logps: torch.Tensor, inputs: dict, step: PairCounts) -> torch.Tensor:
        chosen, rejected = self._rewards(logps, inputs)
        if self.model.training and self.args.reward_shift != "none":
            if not self._knows_shift or self.args.reward_shift == "lagged":
                self._see_rewards(chosen, rejected)
            if not self._knows_shift:  # the only micro-batch of its step
                self._update_shift()
        shift = self._shift.value
        self._metrics["train" if self.model.training else "eval"]["rewards/shift"].append(shift)
        return -(F.logsigmoid(chosen - shift) + F.logsigmoid(shift - rejected)).sum() / step.pairs
