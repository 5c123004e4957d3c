"""`MoESFTTrainer`: TRL's `SFTTrainer` for our models."""

from __future__ import annotations

from trl import SFTTrainer

from .mixin import MoETrainerMixin


class MoESFTTrainer(MoETrainerMixin, SFTTrainer):
    """`trl.SFTTrainer` for the models of this package, dense or MoE.

    Takes what `SFTTrainer` takes, with `MoESFTConfig`; what it adds is what `MoETrainer` adds. The logged `loss` is
    the language-model loss alone; the balance losses are logged next to it (`router/...`).
    """

    def _attach_balance(self):
        # TRL would add a Switch loss of its own, per micro-batch and over all layers at once; ours takes its place.
        text_config = self.model.config.get_text_config()
        if self.aux_loss_enabled:
            self.aux_loss_enabled = False
            text_config.output_router_logits = False
        return super()._attach_balance()
