"""Weights of the labels of documents of different length.

    token    L = sum_d sum_t ce_dt / sum_d N_d                              every label counts the same
    sqrt     L = sum_d sum_t w_d ce_dt / sum_d w_d N_d,  w_d = 1 / sqrt(N_d)  long answers outweigh short ones less

over all documents d of the optimizer step, on all ranks; N_d is the number of labels of a document. `sqrt` is
InternVL's "square averaging" (arXiv 2412.05271), between the mean over tokens and the mean over documents.

Legend: B rows, S positions, T = B*S tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer

from ..memory.chunked_loss import IGNORE_INDEX, LossWeights
from ..moe.tokens import TokenLayout

LOSS_WEIGHTINGS = ("token", "sqrt")

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


def sqrt_weights(batch: dict[str, Any]) -> torch.Tensor:
    """[B, S] fp32: 1 / sqrt(labels in the document) on every label, 0 elsewhere.

    Args:
        batch: a trainer's, with `labels` [B, S]; the first of each row is never predicted.
    """
    labelled_BS = batch["labels"] != IGNORE_INDEX
    labelled_BS[:, 0] = False
    document_T = TokenLayout.of_batch({name: value for name, value in batch.items() if name != "labels"}).document_T
    labelled_T = labelled_BS.flatten().float()
    count_D = torch.zeros_like(labelled_T).index_add_(0, document_T, labelled_T)
    return (labelled_T * count_D[document_T].clamp(min=1).rsqrt()).view_as(labelled_BS)


class LossWeightingMixin(_Base):
    """Stands in front of a `Trainer` class in the bases of a trainer whose loss is one of labels."""

    args: Any
    # Whether the loss is computed from the log-probabilities that the model returns, or by the model.
    loss_of_log_probs = False

    def __init__(self, model: Any = None, args: Any = None, *positional: Any, **keywords: Any):
        if args.loss_weighting != "token":
            _check_loss(args, keywords)
        super().__init__(model, args, *positional, **keywords)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device):
        if self.args.loss_weighting == "token" or not batch_samples:
            return super()._get_num_items_in_batch(batch_samples, device)
        total = torch.stack([sqrt_weights(batch).sum() for batch in batch_samples]).sum().to(device)
        return self.sum_over_batches(total)  # type: ignore[attr-defined]  # of SequenceParallelMixin

    def weigh(self, model: Any, inputs: dict[str, Any], total: torch.Tensor | None) -> tuple[Any, dict[str, Any]]:
        """The model and its inputs, such that the loss is the weighted one.

        Args:
            total: what `_get_num_items_in_batch` gave.
        """
        if self.args.loss_weighting == "token":
            if total is not None and inputs.get("chunked_loss"):  # the model divides by it
                inputs = {**inputs, "loss_weights": LossWeights(None, total)}
            return model, inputs
        weights_BS = sqrt_weights(inputs)
        if self.loss_of_log_probs:
            return _WeightedLogProbs(model, weights_BS), inputs
        return model, {**inputs, "loss_weights": LossWeights(weights_BS, total)}


class _WeightedLogProbs:
    """Calls a model, and weighs the log-probabilities of labels that it returns."""

    def __init__(self, model: Any, weights_BS: torch.Tensor):
        self._model = model
        self._weights_BS = weights_BS

    def __call__(self, **inputs: Any) -> Any:
        outputs = self._model(**inputs)
        outputs["log_probs"] = outputs["log_probs"] * self._weights_BS[:, 1:]
        return outputs


def _check_loss(args: Any, keywords: dict[str, Any]) -> None:
    """Refuse a loss that knows nothing of weights."""
    found = [name for name in ("compute_loss_func", "compute_metrics") if keywords.get(name) is not None]
    found += ["label_smoothing_factor"] if args.label_smoothing_factor else []
    found += ["loss_type"] if getattr(args, "loss_type", "nll") != "nll" else []
    found += ["mtp_loss_coef"] if args.mtp_loss_coef else []
    if found:
        raise ValueError(
            f"loss_weighting is {args.loss_weighting!r}, which the plain cross entropy has, and {', '.join(found)} "
            "asks for another loss: leave out the one or the other."
        )
