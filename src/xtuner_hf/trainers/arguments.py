"""The arguments that all our trainers add to their parents'."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments
from trl import SFTConfig

from .._compat import EPImplementationInterface, ranks_per_node
from ..memory.optimizer import check_optimizer
from ..memory.recompute import RECOMPUTE_POLICIES
from ..moe.ep_dispatcher import IMPLEMENTATION_NAME
from ..moe.experts import EXPERTS_PATHS
from ..parallel.layout import ParallelLayout
from .loss_weighting import LOSS_WEIGHTINGS
from .vision_arguments import VisionArguments

EXPORT_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class MoEArguments(VisionArguments):
    """Arguments of MoE training. Each also exists as a command-line flag of the same name."""

    # Whether the trainer's loss is one of text, to which further tokens can be added.
    trains_mtp: ClassVar[bool] = True

    ep_size: int = field(
        default=1,
        metadata={
            "help": "Ranks that share each layer's experts (expert parallelism). 1 shards experts like everything "
            "else, which is fastest while it fits; raise it when the gathered experts of one layer do not."
        },
    )
    ep_across_nodes: bool = field(
        default=False,
        metadata={"help": "Allow expert-parallel groups that reach over several nodes, which is slow; else an error."},
    )
    sp_size: int = field(
        default=1,
        metadata={
            "help": "Ranks that share each sequence (Ulysses sequence parallelism): each has 1 / sp_size of its "
            "positions, and in attention of its heads. Must divide the query heads. Raise it when the activations of "
            "one sequence do not fit with recompute; the batches of an optimizer step become as many times fewer."
        },
    )
    sp_across_nodes: bool = field(
        default=False,
        metadata={"help": "Allow ranks of several nodes to share a sequence, which is slow; else an error."},
    )
    balance_batches: bool = field(
        default=False,
        metadata={
            "help": "Deal the rows of an optimizer step out to ranks and accumulation steps by equal work (FLOPs of "
            "attention and of matrix products) instead of equal numbers: ranks wait for the slowest. Loss and "
            "gradients stay the same. For rows of 'input_ids' of unequal length, or packed ones with few long "
            "documents; needs several rows a rank and optimizer step, and a data set with a length."
        },
    )
    max_tokens_per_micro_batch: int | None = field(
        default=None,
        metadata={
            "help": "A budget in place of per_device_train_batch_size: each micro-batch gets as many rows as have at "
            "most so many tokens together (padding counted, if the collator pads), and an optimizer step as many as "
            "its gradient_accumulation_steps x ranks micro-batches hold. With sp_size above 1, of all the ranks that "
            "share it. Set it to what fits into memory. Needs rows of 'input_ids' and a data set with a length; a row "
            "that is longer is an error. Evaluation keeps per_device_eval_batch_size."
        },
    )
    dp_replicate_size: int = field(
        default=1,
        metadata={
            "help": "Copies of the parameters (HSDP): each copy is sharded over the ranks divided by this number. Set "
            "it to the number of nodes when the all-gathers between nodes are too slow and memory allows."
        },
    )
    expert_dispatch: str = field(
        default="auto",
        metadata={
            "help": "How tokens reach their experts when ep_size is above 1: 'ours' sends a token once to each rank "
            "that needs it, 'all_to_all' (transformers') once for each of its experts; 'auto' is 'ours'. Also any "
            "name registered in transformers' EPImplementationInterface."
        },
    )
    experts_kernel: str = field(
        default="auto",
        metadata={
            "help": "What computes the experts: 'fused' (one path with little memory; CUDA with Triton), 'grouped_mm' "
            "(equal to transformers' to the last bit in fp32), 'reference' (slow, any dtype), a name that transformers "
            "registers as an experts implementation, or 'auto': 'fused' where it runs, else 'grouped_mm'; logged."
        },
    )
    fp8: bool = field(
        default=False,
        metadata={
            "help": "Multiply in FP8 (e4m3; scales per 128 values of activations and per 128x128 block of weights): "
            "experts and dense projections, forward and backward. Router, norms, embeddings, head and all parameters "
            "stay as they are. For GPUs with FP8 tensor cores (Hopper and newer) and many tokens a micro-batch; "
            "docs/fp8.md says when it does not pay."
        },
    )
    compile_blocks: bool = field(
        default=False,
        metadata={
            "help": "torch.compile each layer's attention (not its kernel), norms and dense MLPs: fewer passes over "
            "memory for QK-norm, RoPE and activations. Costs a minute or so in the first step; not for short runs. "
            "torch_compile=True, the parent's, compiles the whole model, which breaks at the experts."
        },
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "Coefficient of the Switch loss of each MoE layer over the global batch (1 when even, summed over "
            "layers). None takes the family's published value (docs/families.md), 0 switches it off. With gradient "
            "accumulation it costs one more forward pass: the load of the whole step must be known before the first "
            "backward."
        },
    )
    router_z_loss_coef: float = field(
        default=0.0, metadata={"help": "Coefficient of the mean squared log-sum-exp of router logits; 1e-3 is usual."}
    )
    router_sequence_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "Coefficient of the balance loss within each document. None takes the family's published value "
            "(1e-4 for DeepSeek V3 and its relatives, else 0), 0 switches it off."
        },
    )
    router_bias_update_rate: float | None = field(
        default=None,
        metadata={
            "help": "Step of the correction bias after each optimizer step (auxiliary-loss-free balancing). Needs a "
            "model whose routers have such a bias. None takes the family's published value (1e-3 for DeepSeek V3 and "
            "its relatives, else 0; 0 for adapters, which do not hold it), 0 freezes the bias: usual in short "
            "fine-tuning."
        },
    )
    mtp_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "Coefficient of the multi-token prediction loss of DeepSeek V3 and GLM-4.5; 0.3 is the published "
            "one, 0.1 at the end of pre-training. 0 keeps these layers as they are, untrained, in what is saved. None "
            "leaves them out of a model that is given by name, and changes nothing of a model that is given loaded."
        },
    )
    export_dtype: str = field(
        default="auto",
        metadata={
            "help": "dtype of the weights that save_model() and push_to_hub() write: 'float32', 'bfloat16', 'float16', "
            "or 'auto': bfloat16, as published checkpoints are, for a run with bf16=True, otherwise the parameters' "
            "own. checkpoint-N folders, which training goes on from, always keep the parameters' own. Choose 'float32' "
            "where another training run with fp32 weights starts from the result."
        },
    )
    max_skipped_steps: int = field(
        default=10,
        metadata={
            "help": "A step with a non-finite loss or gradient norm is skipped on all ranks; after so many in a row "
            "training stops with an error."
        },
    )
    uneven_batches: str = field(
        default="error",
        metadata={
            "help": "When ranks run out of data at different steps: 'error', or 'drain' to end the epoch for all where "
            "the first rank runs out (what the others have left is dropped)."
        },
    )
    print_plan: bool = field(
        default=False,
        metadata={
            "help": "At the first step, let rank 0 plan this run by a dry run (docs/planner.md) and log one line: the "
            "memory that it will need at most, and the time of a step. Takes up to a minute, once."
        },
    )
    watchdog_timeout: float = field(
        default=600.0,
        metadata={
            "help": "Seconds without progress after which each rank logs where it waits, and in which collective. "
            "0 switches the watchdog off."
        },
    )
    recompute: str | None = field(
        default=None,
        metadata={
            "help": "What is computed again in backward instead of kept, layer by layer. 'full': everything but the "
            "layer's input, for up to a third more time; 'selective': everything but attention and routing, for about "
            "three times the memory of 'full' (Qwen3-30B-A3B's shapes) and no second attention, which at 64k tokens is "
            "most of the time; 'none': nothing. None follows gradient_checkpointing (True is 'full')."
        },
    )
    activation_offload: bool = field(
        default=False,
        metadata={
            "help": "Keep the inputs of recomputed layers in pinned host memory from forward to backward. Saves tokens "
            "x hidden size x layers elements on the device and costs as much pinned memory on the host; the copies "
            "run beside the computation. Needs recompute; worth it only where layer inputs are what does not fit."
        },
    )
    optimizer_states: str = field(
        default="full",
        metadata={
            "help": "How AdamW's moments rest between steps. 'full': in the parameters' dtype (fp32: 8 bytes a "
            "parameter); 'bf16': rounded stochastically, 4 bytes a parameter, for some noise in the updates; '8bit': "
            "torchao's block-wise AdamW8bit (the 'lowbit' extra), 2 bytes a parameter, more noise, compiled on first "
            "use; embeddings keep full ones."
        },
    )
    optimizer_offload: bool = field(
        default=False,
        metadata={
            "help": "Let AdamW's moments rest in pinned host memory and bring each parameter's to the device for its "
            "step, the next one's meanwhile. Saves all of their memory on the device, changes no bit of the result, "
            "and costs the time of moving them there and back once an optimizer step: use large global batches."
        },
    )
    optimizer_in_backward: bool = field(
        default=False,
        metadata={
            "help": "Step each parameter as soon as its gradient is there and free the gradient, so that the gradients "
            "of all parameters never exist together. Saves nearly 4 bytes a parameter (fp32). There is no gradient of "
            "the whole step then: needs max_grad_norm=0 and gradient_accumulation_steps=1."
        },
    )

    loss_weighting: str = field(
        default="token",
        metadata={
            "help": "How labels count in the loss of text. 'token': all the same, so that long answers count most; "
            "'sqrt': each by 1 / sqrt(labels of its document), as InternVL trains, so that an answer of 400 tokens "
            "counts twice, not four times, what one of 100 does."
        },
    )
    freeze_router: bool = field(
        default=False,
        metadata={"help": "Do not train the routers; experts and everything else still are."},
    )

    def __post_init__(self):
        if self.export_dtype not in EXPORT_DTYPES:
            raise ValueError(f"export_dtype is {self.export_dtype!r}; choose one of {', '.join(EXPORT_DTYPES)}.")
        if self.loss_weighting not in LOSS_WEIGHTINGS:
            raise ValueError(f"loss_weighting is {self.loss_weighting!r}; choose one of {', '.join(LOSS_WEIGHTINGS)}.")
        if self.loss_weighting != "token" and not self.trains_mtp:
            raise ValueError(
                f"loss_weighting is {self.loss_weighting!r}, but {type(self).__name__} trains on whole answers, whose "
                "loss is not one of labels: leave it out."
            )
        if self.uneven_batches not in ("error", "drain"):
            raise ValueError(f"uneven_batches is {self.uneven_batches!r}; choose 'error' or 'drain'.")
        if self.max_skipped_steps < 1:
            raise ValueError(f"max_skipped_steps is {self.max_skipped_steps}; it must be 1 or more.")
        if self.watchdog_timeout < 0:
            raise ValueError(f"watchdog_timeout is {self.watchdog_timeout}; it must be 0 (off) or positive.")
        check_optimizer(self)
        if self.max_tokens_per_micro_batch is not None:
            self._check_token_budget(self.max_tokens_per_micro_batch)
        if self.recompute is not None:
            if self.recompute not in RECOMPUTE_POLICIES:
                raise ValueError(f"recompute is {self.recompute!r}; choose one of {', '.join(RECOMPUTE_POLICIES)}.")
            self.activation_checkpointing = self.gradient_checkpointing = self.recompute != "none"
        for name in (
            "router_aux_loss_coef",
            "router_z_loss_coef",
            "router_sequence_loss_coef",
            "router_bias_update_rate",
            "mtp_loss_coef",
        ):
            if (getattr(self, name) or 0.0) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 (off) or positive.")
        for name in ("ep_size", "sp_size", "dp_replicate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.ep_implementation not in EPImplementationInterface():
            known = ", ".join(sorted({"auto", "ours", *EPImplementationInterface()}))
            raise ValueError(f"expert_dispatch is {self.expert_dispatch!r}; it must be one of {known}.")
        super().__post_init__()
        self._check_recompute()
        if self.fp8 and self.experts_kernel not in ("auto", "fp8"):
            raise ValueError(
                f"fp8=True computes the experts with its own kernel, and experts_kernel is {self.experts_kernel!r}: "
                "leave it at 'auto', or set fp8=False."
            )

    def _check_token_budget(self, budget: int) -> None:
        if budget < 1:
            raise ValueError(f"max_tokens_per_micro_batch is {budget}; it is a number of tokens, or None.")
        own: Any = self
        default = next(f.default for f in fields(own) if f.name == "per_device_train_batch_size")
        if own.per_device_train_batch_size not in (1, default):
            raise ValueError(
                f"max_tokens_per_micro_batch says how many rows a micro-batch has, and so does "
                f"per_device_train_batch_size ({own.per_device_train_batch_size}): leave one of them out."
            )
        if own.train_sampling_strategy not in ("random", "sequential") or own.auto_find_batch_size:
            raise ValueError(
                "max_tokens_per_micro_batch deals out rows by itself: leave out train_sampling_strategy and "
                "auto_find_batch_size."
            )
        own.per_device_train_batch_size = 1  # what is counted in rows is then counted in micro-batches

    def _check_recompute(self) -> None:
        # What the parent calls activation checkpointing has two names until transformers 6; here both are settled.
        recomputes = getattr(self, "activation_checkpointing", False)
        if self.activation_offload and not recomputes:
            raise ValueError(
                "activation_offload moves the inputs of recomputed layers, and nothing is recomputed: set "
                "recompute='full' or 'selective', or activation_offload=False."
            )
        options = getattr(self, "activation_checkpointing_kwargs", None) or {}
        if options.get("use_reentrant") and (self.activation_offload or self.recompute == "selective"):
            raise ValueError(
                "recompute='selective' and activation_offload need checkpointing without re-entry: drop use_reentrant "
                "from gradient_checkpointing_kwargs."
            )

    @property
    def exported_dtype(self) -> torch.dtype | None:
        """What weights are exported in, None for the parameters' own dtype."""
        if self.export_dtype != "auto":
            return getattr(torch, self.export_dtype)
        return torch.bfloat16 if getattr(self, "bf16", False) else None

    @property
    def experts_implementation(self) -> str | None:
        """The name in transformers' registry, None to leave the model's choice."""
        if self.experts_kernel == "auto":
            return None
        return f"xtuner_{self.experts_kernel}" if self.experts_kernel in EXPERTS_PATHS else self.experts_kernel

    @property
    def ep_implementation(self) -> str:
        """The name in transformers' registry."""
        return IMPLEMENTATION_NAME if self.expert_dispatch in ("auto", "ours") else self.expert_dispatch

    @property
    def parallel_layout(self) -> ParallelLayout:
        """How the job's ranks share the model; raises a ValueError for one that cannot be."""
        world_size = self.world_size  # type: ignore[attr-defined]  # of transformers' TrainingArguments
        return ParallelLayout(
            world_size=world_size,
            ranks_per_node=ranks_per_node(world_size),
            ep_size=self.ep_size,
            ep_across_nodes=self.ep_across_nodes,
            sp_size=self.sp_size,
            sp_across_nodes=self.sp_across_nodes,
            dp_replicate_size=self.dp_replicate_size,
        )


@dataclass
class MoETrainingArguments(MoEArguments, TrainingArguments):
    """`transformers.TrainingArguments` and the arguments of MoE training."""


@dataclass
class MoESFTConfig(MoEArguments, SFTConfig):
    """`trl.SFTConfig` and the arguments of MoE training.

    `router_aux_loss_coef` keeps TRL's meaning of None (the checkpoint's own coefficient); the loss itself is ours: by
    layer, over the global batch.
    """

    on_long_row: str = field(
        default="error",
        metadata={
            "help": "What to do with rows of more than max_length tokens: 'error'; 'truncate' as TRL does in silence "
            "(at truncation_mode's end, here with a count); 'split' into several rows, as packing_strategy='bfd_split' "
            "does; 'skip'. packing_strategy='wrapped' cuts rows anywhere in any case. With max_tokens_per_micro_batch "
            "also of packed rows of more tokens than that: 'split' cuts them between documents."
        },
    )
    max_row_tiles: int | None = field(
        default=None,
        metadata={
            "help": "Tiles of all images of a conversation together: each of n images gets max_row_tiles // n at most, "
            "and one in any case. None: as many for each as the processor allows."
        },
    )
    on_bad_image: str = field(
        default="error",
        metadata={
            "help": "What to do when an image cannot be read in training: 'error', with its row; 'skip' trains on "
            "without the conversation that shows it, and counts it in a warning."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        budget, window = self.max_tokens_per_micro_batch, self.max_length
        if budget is not None and (window is None or window > budget):
            raise ValueError(
                f"max_length is {window} and max_tokens_per_micro_batch {budget}: a row of that length would not fit. "
                "Lower the one, or raise the other."
            )
