"""`MoETrainer`: transformers' `Trainer` for our models."""

from __future__ import annotations

from transformers import Trainer

from ..data.tiles import IMAGE_REFS
from .mixin import MoETrainerMixin


class MoETrainer(MoETrainerMixin, Trainer):
    """`transformers.Trainer` for the models of this package, dense or MoE.

    Takes what `Trainer` takes, with `MoETrainingArguments`. Besides, it shards the model over the job's processes
    (`ep_size`), never builds the full logits in training, balances the experts over the global batch of the optimizer
    step, logs tokens/s, MFU and the experts' load, and draws `training.png` at the end.

    The logged `loss` is the language-model loss alone; the balance losses are logged next to it (`router/...`).
    """

    def _set_signature_columns_if_needed(self):
        # What tells the documents of a packed row apart is for the collator, not for the model.
        super()._set_signature_columns_if_needed()
        self._signature_columns += {"seq_lengths", IMAGE_REFS} - set(self._signature_columns)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.model.training and self.compute_loss_func is None and self.label_smoother is None:
            inputs = {**inputs, "chunked_loss": True}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if prediction_loss_only and self.label_smoother is None:
            inputs = {**inputs, "chunked_loss": True}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
