"""`MoESFTTrainer`: TRL's `SFTTrainer` for our models."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from trl import SFTTrainer

from .._compat import DataCollatorForLanguageModeling, global_then_local_main_first
from ..data.collator import PackedCollator, VisionCollator
from ..data.conversation import check_conversation
from ..data.malformed import MalformedRow
from ..data.packing import fit_rows, pack_rows
from ..data.prepare import text_tokenizer, tokenize_rows
from ..data.processor import InternVLProcessor
from ..data.report import warn
from ..data.tiles import IMAGE_REFS, ImageTiler
from ..data.tokenize import require_chat_template, tokenize_conversations, training_chat_template
from ..models.auto import IMAGE_TEXT_CLASSES, read_config
from ..parallel.adapters import base_model
from .arguments import MoESFTConfig
from .setup import check_dataset
from .trl import TRLTrainerMixin, asked_revision, given_or_default_args

logger = logging.getLogger(__name__)


class MoESFTTrainer(TRLTrainerMixin, SFTTrainer):
    """`trl.SFTTrainer` for the models of this package, dense or MoE.

    Takes what `SFTTrainer` takes, with `MoESFTConfig`; what it adds is what `MoETrainer` adds. The logged `loss` is
    the language-model loss alone; the balance losses are logged next to it (`router/...`).

    Data: rows of `messages` may have what `xtuner_hf.data.load_conversations` allows (tools, loss flags of turns), and
    are checked; rows that `xtuner_hf.data.prepare_dataset` made are taken as they are. Rows longer than `max_length`
    are an error unless `on_long_row` says what to do with them. Packing is TRL's, over more rows at a time.

    Images: with the processor of the model as `processing_class` (`xtuner_hf.data.InternVLProcessor`; found by the
    model's name if none is given), rows of `messages` or text may have images (docs/vision-data.md). They are packed
    like others, and read in the workers of the data loader.
    """

    loss_of_log_probs = True
    _tiler: ImageTiler | None = None

    def __init__(
        self,
        model: Any = None,
        args: MoESFTConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **keywords: Any,
    ):
        args = given_or_default_args(args, MoESFTConfig, model)
        if isinstance(args, MoESFTConfig):
            if processing_class is None:
                processing_class = _load_processing_class(model, args)
            _check_first_row(train_dataset, args, processing_class)
            if isinstance(processing_class, ProcessorMixin):
                _check_with_processor(args, keywords)
                self._tiler = ImageTiler(processing_class, args.max_row_tiles)
                train_dataset, eval_dataset = self._tokenize_images(train_dataset, eval_dataset, processing_class, args)
        with _tokenized_before(args, self._tiler is not None):
            super().__init__(
                model,
                args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                **keywords,
            )
        self._check_further_tokens()
        if type(self.data_collator) is DataCollatorForLanguageModeling:  # TRL's choice, which counts padding as tokens
            options: dict[str, Any] = vars(self.data_collator)
            self.data_collator = PackedCollator(**options)
            if self._tiler is not None:
                self.data_collator = VisionCollator(**options, tiler=self._tiler, on_bad_image=self.args.on_bad_image)

    def _tokenize_images(self, train: Any, evaluation: Any, processor: Any, args: Any) -> tuple[Any, Any]:
        """Before TRL sees a row: it leaves images to its collator, which can neither pack nor spare the decoding."""

        def tokens(dataset: Any, name: str) -> Any:
            return dataset if dataset is None else self._tokenize(dataset, processor, args, f"{name}_dataset")

        if isinstance(evaluation, dict):
            return tokens(train, "train"), {name: tokens(dataset, name) for name, dataset in evaluation.items()}
        return tokens(train, "train"), tokens(evaluation, "eval")

    def _tokenize(self, dataset: Any, processor: Any, args: Any, name: str) -> Any:
        check_dataset(dataset, name)
        with global_then_local_main_first():
            return tokenize_rows(
                dataset,
                text_tokenizer(processor),
                tiler=self._tiler,
                assistant_only_loss=args.assistant_only_loss,
                text_column=args.dataset_text_field,
                num_proc=args.dataset_num_proc,
                name=name,
            )

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if self._tiler is not None and IMAGE_REFS not in self._signature_columns:
            self._signature_columns.append(IMAGE_REFS)

    def _check_further_tokens(self) -> None:
        coef = getattr(base_model(self.model), "mtp_loss_coef", None)
        is_plain = self.args.loss_type == "nll" and self.compute_loss_func is None and self.label_smoother is None
        if coef and not is_plain:
            raise ValueError(
                f"mtp_loss_coef is {coef}, and the loss of further tokens is the plain cross entropy: drop loss_type, "
                "compute_loss_func and label_smoothing_factor, or set mtp_loss_coef=0."
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        base = base_model(self.model)
        further = base.further_tokens(inputs["labels"]) if base.supports_mtp else None
        if further is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # TRL's head scores the next token alone; the trunk that it calls scores the others.
        result = super().compute_loss(model, {**inputs, "further": further}, return_outputs, num_items_in_batch)
        loss, *outputs = result if return_outputs else (result,)
        # This rank's share, as the loss that comes back: gradients are summed.
        share = base.mtp_loss_coef * further.loss_sum / num_items_in_batch
        if not self.args.average_tokens_across_devices:  # it was divided by this rank's labels alone
            share = share / self.accelerator.num_processes
        loss = loss + share
        return (loss, *outputs) if return_outputs else loss

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        name = f"{dataset_name}_dataset"
        check_dataset(dataset, name)
        columns = dataset.column_names or list(next(iter(dataset)))
        if "seq_lengths" in columns:  # packed already, to a window of its own
            budget = args.max_tokens_per_micro_batch
            if budget is not None and dataset_name == "train":
                with global_then_local_main_first():
                    dataset = fit_rows(
                        dataset, budget, args.on_long_row, name=name, window="max_tokens_per_micro_batch"
                    )
            return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset
        if self._tiler is not None and "input_ids" not in columns:
            dataset = self._tokenize(dataset, processing_class, args, name)
        if "messages" in columns and formatting_func is None and isinstance(processing_class, PreTrainedTokenizerBase):
            with global_then_local_main_first():
                dataset = tokenize_conversations(
                    dataset,
                    processing_class,
                    assistant_only_loss=args.assistant_only_loss,
                    chat_template=self.chat_template,
                    num_proc=args.dataset_num_proc,
                    name=name,
                )
        # The parent tokenises all other rows; it would cut long ones in silence, and pack few rows at a time.
        uncut = copy.copy(args)
        uncut.max_length, uncut.shuffle_dataset = None, False
        dataset = super()._prepare_dataset(dataset, processing_class, uncut, False, formatting_func, dataset_name)
        with global_then_local_main_first():
            return self._fit_and_pack(dataset, args, packing, name)

    def _fit_and_pack(self, dataset, args, packing, name):
        if packing and args.max_length is None:
            raise ValueError("packing needs a window: set max_length to the tokens of a packed row.")
        strategy = args.packing_strategy if packing else None
        if args.max_length is not None and strategy != "wrapped":
            on_long_row = "split" if strategy == "bfd_split" else args.on_long_row
            keep = args.truncation_mode.removeprefix("keep_")
            dataset = fit_rows(dataset, args.max_length, on_long_row, keep=keep, name=name)
        if packing:
            if args.shuffle_dataset:
                dataset = dataset.shuffle(seed=args.seed)
            dataset = pack_rows(dataset, args.max_length, strategy=strategy.removesuffix("_split"), name=name)
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset


@contextlib.contextmanager
def _tokenized_before(args: Any, is_so: bool) -> Iterator[None]:
    """TRL looks for a conversation in the first row, and for marks in a template that it knows, to learn only what the
    assistant says; where the rows are tokenised before, the labels say it already."""
    asked = getattr(args, "assistant_only_loss", False)
    if is_so:
        args.assistant_only_loss = False
    try:
        yield
    finally:
        if is_so:
            args.assistant_only_loss = asked


def _check_with_processor(args: MoESFTConfig, keywords: dict[str, Any]) -> None:
    """Refuse what TRL would do to rows that are tokenised by then."""
    if args.chat_template_path is not None:
        raise ValueError(
            f"chat_template_path is {args.chat_template_path!r}, and processing_class is a processor: read it "
            "into processor.chat_template yourself, and leave chat_template_path out."
        )
    if keywords.get("formatting_func") is not None:
        raise ValueError(
            "formatting_func writes a text, and processing_class is a processor: give rows of 'messages' or text, with "
            "their images, and leave formatting_func out."
        )


def _load_processing_class(model: Any, args: MoESFTConfig) -> Any:
    name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "name_or_path", None)
    if not name:
        raise ValueError("The model has no name to load a tokenizer by: pass one as processing_class.")
    revision = asked_revision(model, args)
    where = {"revision": revision} if revision is not None else {}
    reads_images = read_config(name, where).model_type in IMAGE_TEXT_CLASSES
    return (InternVLProcessor if reads_images else AutoTokenizer).from_pretrained(name, **where)


def _check_first_row(dataset: Any, args: MoESFTConfig, tokenizer: Any) -> None:
    """TRL looks at the first row when it is built, and at the chat template, and expects both to be sound."""
    row = next(iter(dataset), None) if dataset is not None else None
    if isinstance(tokenizer, ProcessorMixin):
        tokenizer = text_tokenizer(tokenizer)
    if row is None or not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    is_conversational = "messages" in row or isinstance(row.get("prompt"), list)
    if "messages" in row:
        try:
            check_conversation(row)
        except MalformedRow as error:
            raise ValueError(f"train_dataset[0]: {error}") from None
    if not is_conversational or args.chat_template_path is not None:
        return
    require_chat_template(tokenizer)
    if args.assistant_only_loss:
        training_chat_template(tokenizer)
    elif "messages" in row:
        warn(
            logger,
            "assistant_only_loss is False, as in TRL: every token of the conversations is learned, the user's too.",
        )
