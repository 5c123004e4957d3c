"""`MoEDPOTrainer`: TRL's `DPOTrainer` for our models, with a loss over the whole optimizer step.

TRL averages over the pairs of a micro-batch and then over micro-batches and ranks, which is the mean over pairs only
while all have as many; its 'sft' term averages over the tokens of a micro-batch, which is another number for every
split. Here both are shares of the mean over the whole step.

Legend: B pairs of a micro-batch, S positions; TRL stacks them as [2B, S], the chosen answers first.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from trl import DPOTrainer

from .._compat import DataCollatorForVisionPreference
from ..data.preference import VisionPreferenceCollator
from .preference_config import MoEDPOConfig
from .trl import ByKeyword, UnpaddedMixin, given_or_default_args, given_or_own_reference, named_arguments

_NOT_FOR_THE_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")


class MoEDPOTrainer(UnpaddedMixin, ByKeyword, DPOTrainer):
    """`trl.DPOTrainer` for the models of this package, dense or MoE.

    Takes what `DPOTrainer` takes, with `MoEDPOConfig`. The loss is the mean over the pairs of the optimizer step for
    any accumulation and number of ranks (but for 'aot' and 'aot_unpaired', which sort the pairs of a micro-batch by
    definition). Without a `ref_model`, and without adapters, the reference is a copy of the policy as it is given.
    """

    loss_is_scaled_for_ga = True  # by `_compute_loss`, over the whole step
    # Loss types that are computed here and not by TRL.
    own_losses: ClassVar[tuple[str, ...]] = ("sft",)
    config_class: ClassVar[type[MoEDPOConfig]] = MoEDPOConfig

    def __init__(self, *positional: Any, **keywords: Any):
        arguments = named_arguments(DPOTrainer, positional, keywords)
        model = arguments.pop("model")
        args = given_or_default_args(arguments.pop("args", None), self.config_class, model)
        if isinstance(args, MoEDPOConfig):
            arguments["ref_model"] = given_or_own_reference(model, args, arguments)
        super().__init__(model, args, **arguments)
        if type(self.data_collator) is DataCollatorForVisionPreference:  # TRL's choice
            self.data_collator = VisionPreferenceCollator(**vars(self.data_collator))
        weighted = list(zip(self.loss_types, self.loss_weights, strict=True))
        self._own_losses = [(name, weight) for name, weight in weighted if name in self.own_losses]
        for own in self._own_losses:
            weighted.remove(own)
        self.loss_types, self.loss_weights = [name for name, _ in weighted], [weight for _, weight in weighted]

    # ---- one optimizer step ----

    def _model_inputs(self, batch: dict) -> dict:
        return {key: value for key, value in batch.items() if key not in _NOT_FOR_THE_MODEL}

    def _start_step(self, batches: list[dict], device: torch.device) -> None:
        super()._start_step(batches, device)
        counts = torch.stack([torch.stack(PairCounts.of_batch(batch)) for batch in batches]).sum(0)
        self._step_counts = PairCounts(*self.sum_over_batches(counts.to(device)))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # Before the routers count: with adapters the reference goes through the same routers.
        return super().compute_loss(model, self._with_reference(inputs), return_outputs, num_items_in_batch)

    def _with_reference(self, inputs: dict) -> dict:
        if "ref_chosen_logps" in inputs:
            return inputs
        reference = self.model if self.ref_model is None else self.ref_model
        chosen, rejected = self.compute_ref_log_probs(self.shared(reference), inputs)
        return {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def _compute_loss(self, model, inputs, return_outputs):
        """This rank's share of the loss over the step; what the trainer divides by the number of ranks."""
        noted = _NotedOutputs(model)
        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            result = super()._compute_loss(noted, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = precomputed
        loss, *outputs = result if return_outputs else (result,)
        here = PairCounts.of_batch(inputs)
        step = self._step_counts if self.model.training else here
        loss = loss * here.pairs / step.pairs
        # [2B, S - 1]: of the tokens of the answers, 0 elsewhere
        logps = noted.outputs.log_probs[:, -inputs["completion_mask"][:, 1:].shape[1] :]
        for name, weight in self._own_losses:
            loss = loss + weight * getattr(self, f"_{name}_share")(logps, inputs, step)
        if self.model.training:
            loss = loss * self.accelerator.num_processes
        return (loss, *outputs) if return_outputs else loss

    def _sft_share(self, logps: torch.Tensor, inputs: dict, step: PairCounts) -> torch.Tensor:
        chosen_logps, _ = logps.chunk(2)
        if self.args.sft_reduction == "token":
            return -chosen_logps.sum() / step.chosen_tokens.clamp(min=1)
        chosen_mask, _ = inputs["completion_mask"][:, 1:].chunk(2)
        return -(chosen_logps.sum(1) / chosen_mask.sum(1).clamp(min=1)).sum() / step.pairs


class PairCounts(NamedTuple):
    """Of a micro-batch on this rank, or of an optimizer step over all ranks; scalars, int64."""

    pairs: torch.Tensor
    chosen_tokens: torch.Tensor

    @classmethod
    def of_batch(cls, batch: dict) -> PairCounts:
        chosen_mask, _ = batch["completion_mask"][:, 1:].chunk(2)
        return cls(torch.tensor(len(chosen_mask), device=chosen_mask.device), chosen_mask.sum())


class _NotedOutputs:
    """Calls a model and keeps what it returned first."""

    def __init__(self, model: Any):
        self._model = model
        self.outputs: Any = None

    def __call__(self, **inputs: Any) -> Any:
        outputs = self._model(**inputs)
        self.outputs = outputs if self.outputs is None else self.outputs
        return outputs
