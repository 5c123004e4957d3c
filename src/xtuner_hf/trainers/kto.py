"""`MoEKTOTrainer`: TRL's `KTOTrainer` for our models (arXiv 2402.01306)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from trl import KTOConfig, KTOTrainer

from .arguments import MoEArguments
from .trl import ByKeyword, UnpaddedMixin, given_or_default_args, given_or_own_reference, named_arguments

_NOT_FOR_THE_MODEL = ("completion_mask", "label", "ref_logps", "ref_KL_logps")


@dataclass
class MoEKTOConfig(MoEArguments, KTOConfig):
    """`trl.KTOConfig` and the arguments of MoE training.

    None as a coefficient of balancing takes the family's published value; the Switch loss is ours and not TRL's.
    """

    trains_mtp: ClassVar[bool] = False


class MoEKTOTrainer(UnpaddedMixin, ByKeyword, KTOTrainer):
    """`trl.KTOTrainer` for the models of this package, dense or MoE.

    Takes what `KTOTrainer` takes, with `MoEKTOConfig`. The loss is TRL's: its KL is estimated from the mismatched
    answers of a micro-batch, and so depends on `per_device_train_batch_size`. Those answers, and the reference, do not
    count as load of the experts.
    """

    def __init__(self, *positional: Any, **keywords: Any):
        arguments = named_arguments(KTOTrainer, positional, keywords)
        model = arguments.pop("model")
        args = given_or_default_args(arguments.pop("args", None), MoEKTOConfig, model)
        if isinstance(args, MoEKTOConfig):
            arguments["ref_model"] = given_or_own_reference(model, args, arguments)
        self._policy_kl_logps: torch.Tensor | None = None
        super().__init__(model, args, **arguments)

    def _model_inputs(self, batch: dict) -> dict:
        is_input = {key: key not in _NOT_FOR_THE_MODEL and not key.startswith("KL_") for key in batch}
        return {key: value for key, value in batch.items() if is_input[key]}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        model = self.shared(model)
        # Before the routers count.
        self._policy_kl_logps = super()._compute_kl_logps(model, inputs)
        if "ref_logps" not in inputs:
            reference = self.model if self.ref_model is None else self.ref_model
            logps, kl_logps = self.compute_ref_log_probs(self.shared(reference), inputs)
            inputs = {**inputs, "ref_logps": logps} | ({} if kl_logps is None else {"ref_KL_logps": kl_logps})
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _compute_kl_logps(self, model, batch):
        return self._policy_kl_logps

    def _compute_loss(self, model, inputs, return_outputs):
        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            result = super()._compute_loss(model, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = precomputed
        loss, *outputs = result if return_outputs else (result,)
        if self.model.training:
            loss = loss * self.args.sp_size  # a mean over all ranks, of which one in `sp_size` has a batch of its own
        return (loss, *outputs) if return_outputs else loss
