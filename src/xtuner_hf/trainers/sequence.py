"""The part of our trainers for sequences that several ranks share: batches, counts and refusals.

_get_dataloader    the ranks of a group get the same batches
shared(model)      what a loss is computed with: each rank has its positions (parallel/sequence.py)
get_cp_size        transformers' own word for how many ranks have the same batch: it divides what it counts
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from .._compat import batches_dealt_to
from ..attention.ulysses import SequenceRanks
from ..data.balance import EqualWorkSampler, TokenBudget, TokenBudgetSampler
from ..data.tiles import IMAGE_REFS, count_tiles
from ..models.flops import TrainingFlops
from ..parallel.sequence import SequenceParallelModel, sequence_ranks

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class SequenceParallelMixin(_Base):
    """Stands in front of a `Trainer` class in the bases of a trainer; with `sp_size` 1 it does nothing."""

    args: Any
    model: Any
    _ranks: SequenceRanks | None = None
    _row_sampler: Any = None  # that weighs rows

    def __init__(self, model: Any = None, args: Any = None, *positional: Any, **keywords: Any):
        if args.sp_size > 1:
            check_losses(args, keywords)
        if _weighs_rows(args) and isinstance(keywords.get("train_dataset"), IterableDataset):
            raise ValueError(
                f"{_weighs_rows(args)} weighs rows before they are read, and train_dataset is a stream: leave it out."
            )
        super().__init__(model, args, *positional, **keywords)
        self.add_callback(_TellEpoch(self))

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self.args.sp_size > 1:
            self._ranks = sequence_ranks(self.args.parallel_layout, self.args.device.type)

    def get_cp_size(self) -> int:
        return self.args.sp_size

    def shared(self, model: Any) -> Any:
        """The model as losses are computed with it."""
        if self._ranks is None or isinstance(model, SequenceParallelModel):
            return model
        return SequenceParallelModel(model, self._ranks)

    def from_first_rank(self, value: Any) -> Any:
        """The value of the first of the ranks that share a batch."""
        return value if self._ranks is None else self._ranks.from_first(value, self.accelerator.device)

    def of_whole_rows(self, routes_BSLK: torch.Tensor) -> torch.Tensor:
        """Routes that each rank recorded at its own positions, -1 elsewhere -> those of all positions."""
        if self._ranks is None:
            return routes_BSLK
        return (self._ranks.sum(routes_BSLK.int() + 1) - 1).to(routes_BSLK.dtype)

    def sum_over_batches(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks of what each computed of its batch; each batch counts once."""
        total = self.accelerator.reduce(tensor, reduction="sum")
        return total // self.args.sp_size if total.dtype == torch.int64 else total / self.args.sp_size

    def _get_dataloader(self, *positional: Any, **keywords: Any):
        if self._ranks is None:
            return super()._get_dataloader(*positional, **keywords)
        layout = self.args.parallel_layout
        with batches_dealt_to(self.accelerator, layout.data_size, layout.sp_size):
            return super()._get_dataloader(*positional, **keywords)

    def _get_train_sampler(self, train_dataset: Any = None):
        args = self.args
        if not _weighs_rows(args):
            return super()._get_train_sampler(train_dataset)
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        lengths = [sum(_document_lengths(row, _weighs_rows(args))) for row in rows]
        work: Any = lengths
        if args.balance_batches:
            flops = TrainingFlops.of_model(self.model)
            work = [row_work(flops, row) for row in rows]
        layout = args.parallel_layout
        ranks: dict[str, Any] = {
            "dp_size": layout.data_size,
            "grad_accum": args.gradient_accumulation_steps,
            "rank": args.process_index // layout.sp_size,
            "seed": args.seed if args.data_seed is None else args.data_seed,
            "drop_last": args.dataloader_drop_last,
        }
        budget = args.max_tokens_per_micro_batch
        if budget is None:
            rows_of_step = self.get_total_train_batch_size(args)
            self._row_sampler = EqualWorkSampler(work, effective_batch_size=rows_of_step, **ranks)
        else:
            _check_rows_fit(lengths, budget)
            padded = not getattr(self.data_collator, "padding_free", False)
            self._row_sampler = TokenBudgetSampler(lengths, work, TokenBudget(budget, padded), **ranks)
        return self._row_sampler

    def evaluation_loop(self, *positional: Any, **keywords: Any):
        if self._ranks is not None:
            self.gather_function = self._gather_of_batches
        return super().evaluation_loop(*positional, **keywords)

    def _gather_of_batches(self, losses: torch.Tensor) -> torch.Tensor:
        """Accelerate's `gather_for_metrics` with each batch once."""
        everywhere = self.accelerator.gather(losses)
        once = everywhere.unflatten(0, (-1, self.args.sp_size, len(losses)))[:, 0].flatten()
        state = self.accelerator.gradient_state
        return once[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else once


def row_work(flops: TrainingFlops, row: dict[str, Any]) -> float:
    """FLOPs of a token row, its images included."""
    lengths = _document_lengths(row, "balance_batches")
    return flops(sum(lengths), sum(length**2 for length in lengths), count_tiles(row.get(IMAGE_REFS)))


class _TellEpoch(TrainerCallback):
    """Tells the sampler what to shuffle by: transformers reaches none behind the batches that a resumed run skips."""

    def __init__(self, trainer: SequenceParallelMixin):
        self._trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self._trainer._row_sampler is not None:
            self._trainer._row_sampler.set_epoch(int(state.epoch))


def _weighs_rows(args: Any) -> str:
    """The argument that wants to know how long rows are, "" if none does."""
    if args.max_tokens_per_micro_batch is not None:
        return "max_tokens_per_micro_batch"
    return "balance_batches" if args.balance_batches else ""


def _document_lengths(row: dict[str, Any], wanted_by: str) -> list[int]:
    if "input_ids" not in row:
        raise ValueError(f"{wanted_by} weighs rows by their 'input_ids', and they have {', '.join(row)}; leave it out.")
    return row.get("seq_lengths") or [len(row["input_ids"])]


def _check_rows_fit(lengths: list[int], budget: int) -> None:
    first = next((row for row, length in enumerate(lengths) if length > budget), None)
    if first is not None:
        too_long = sum(length > budget for length in lengths)
        raise ValueError(
            f"train_dataset[{first}] has {lengths[first]:,} tokens, more than max_tokens_per_micro_batch={budget} "
            f"(and {too_long - 1:,} more rows of {len(lengths):,}). Raise it, or prepare the rows with "
            f"prepare_dataset(..., max_length={budget}, on_long_row='split'), which cuts packed rows between documents."
        )


def check_losses(args: Any, keywords: dict[str, Any]) -> None:
    """Refuse what needs full logits or deals out batches by itself."""
    for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
        if keywords.get(name) is not None:
            raise ValueError(
                f"{name} gets the logits of whole rows, and with sp_size {args.sp_size} no rank has them: leave it "
                "out, or set sp_size to 1."
            )
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor is {args.label_smoothing_factor}, whose loss needs the logits of whole rows, and "
            f"with sp_size {args.sp_size} no rank has them: set the one to 0, or the other to 1."
        )
    if args.train_sampling_strategy == "batch_rebalance":
        raise ValueError(
            "train_sampling_strategy='batch_rebalance' gives every rank batches of its own, and sp_size is "
            f"{args.sp_size}: use balance_batches=True, which knows groups of ranks."
        )
