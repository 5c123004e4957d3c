"""`MoEGRPOTrainer`: TRL's `GRPOTrainer` for our models, with router replay and correction of the engine's mismatch.

One optimizer step:

    _start_step                       every micro-batch of the step is there before the first is trained:
      _prepare_inputs                   TRL samples, or takes the next part of what it has sampled
        _generate_and_score_completions   routes from the engine (R3) or from the old log-probabilities (R2)
                                          mismatch with the engine: measured, and folded into the advantages
    training_step                     each micro-batch, as in MoETrainerMixin

Legend: B samples, P and C positions of prompts and completions, S = P + C, L MoE layers, K experts per token.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn
from trl import GRPOTrainer, SyncRefModelCallback

from .._compat import add_fused_lm_head, disable_dropout_in_model
from ..data.preference import with_image_list
from ..data.process_once import images_processed_once
from ..moe.replay import RecordingModel, ReplayingModel, RouteReplay, RouterMap, align_routes
from ..parallel.adapters import is_reference
from ..rl.dynamic_sampling import Rollouts
from ..rl.mismatch import log_ratios, mismatch_metrics
from ..rl.rewards import with_deadline
from ..rl.rollouts import EngineRollouts
from .grpo_config import MoEGRPOConfig
from .trl import ByKeyword, UnpaddedMixin, given_or_default_args, has_adapters, named_arguments, reference_model

# What TRL's log-probabilities take of rollouts with images.
_IMAGE_KEYS = (
    *("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles"),
    *("image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids"),
)


class MoEGRPOTrainer(UnpaddedMixin, ByKeyword, GRPOTrainer):
    """`trl.GRPOTrainer` for the models of this package, dense or MoE.

    Takes what `GRPOTrainer` takes, with `MoEGRPOConfig`. With `beta` above 0 and without adapters, the reference is a
    copy of the policy as it is given.
    """

    config_class: ClassVar[type[MoEGRPOConfig]] = MoEGRPOConfig
    processing_options: ClassVar[dict[str, Any]] = {"truncation_side": "left", "padding_side": "left"}

    def __init__(self, *positional: Any, **keywords: Any):
        arguments = named_arguments(GRPOTrainer, positional, keywords)
        model = arguments.pop("model")
        args = given_or_default_args(arguments.pop("args", None), self.config_class, model)
        reference = None
        if isinstance(args, MoEGRPOConfig) and args.beta and not has_adapters(model, arguments):
            if args.cast_lm_head_to_fp32:
                raise ValueError(
                    "cast_lm_head_to_fp32 does not reach the reference model of beta > 0; use one of both."
                )
            reference = reference_model(model, args)
        self._routers: Any = None  # a RouterMap under router replay
        self._offset = 0  # of the micro-batch that is being sampled, in its optimizer step
        self._is_scoring = False
        self._rollout_routes: Any = None  # of the engine, by sample
        self._routes_BSLK: torch.Tensor | None = None
        self._lengths: list[tuple[int, int]] = []
        self._engine: EngineRollouts | None = None
        self._is_calling_tools = False
        if isinstance(arguments.get("rollout_func"), EngineRollouts):
            self._engine = arguments.pop("rollout_func")  # it takes TRL's place in every turn, and leaves it the loop
        with contextlib.nullcontext() if reference is None else _without_reference(args):
            super().__init__(model, args, **arguments)
        if reference is not None:
            self._adopt_reference(reference)
        if args.router_replay is not None:
            self._routers = RouterMap(self.model)
        if args.reward_timeout is not None:
            functions: list[Any] = self.reward_funcs
            self.reward_funcs = [
                function if isinstance(function, nn.Module) else with_deadline(function, args.reward_timeout)
                for function in functions
            ]

    def _adopt_reference(self, reference: Any) -> None:
        if self.args.disable_dropout:
            disable_dropout_in_model(reference)
        add_fused_lm_head(reference, temperature=self.temperature)
        self.beta = self.args.beta
        self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
        if self.args.sync_ref_model:
            self.add_callback(SyncRefModelCallback(ref_model=self.ref_model, accelerator=self.accelerator))

    # ---- one optimizer step ----

    def _start_step(self, batches: list, device: torch.device) -> None:
        self.model.train()
        started, first = time.perf_counter(), self._step
        micro_batches = []
        for offset, batch in enumerate(batches):
            self._offset = offset
            self._step = first + offset  # by which TRL knows when to sample, and which part comes next
            # TRL shuffles its samples, on each rank in another way.
            micro_batches.append(self.from_first_rank(super()._prepare_inputs(batch)))
        self._step = first
        self._current_train_step_time += time.perf_counter() - started
        super()._start_step(micro_batches, device)
        if self._balance.config.has_losses and not self._has_signal(micro_batches):
            self._balance.skip_losses()

    def _prepare_inputs(self, generation_batch):
        if self.model.training:
            return self._batches[self._micro_batch]
        return super()._prepare_inputs(generation_batch)

    def _has_signal(self, micro_batches: list[dict]) -> bool:
        """Whether anything but the balance losses moves the model in this step, on any rank."""
        if self.beta or self._entropy_bonus_enabled:
            return True
        found = [(loss_mask(batch) * _by_token(batch["advantages"])).any() for batch in micro_batches]
        return bool(self.accelerator.reduce(torch.stack(found).sum(), reduction="sum"))

    def _model_inputs(self, batch: dict) -> dict:
        inputs: dict[str, Any] = {
            "input_ids": torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            "attention_mask": torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
        }
        if "routed_experts" in batch:
            inputs["routes"] = RouteReplay(self._routers, batch["routed_experts"])
        return inputs | {key: batch[key] for key in ("pixel_values", "image_grid_thw") if key in batch}

    def _compute_loss(self, model, inputs):
        if "routed_experts" in inputs:
            model = ReplayingModel(model, self._routers, inputs["routed_experts"])
        loss = super()._compute_loss(model, inputs)
        # TRL's gradient is made to be averaged over all ranks, of which only 1 / sp_size have a batch of their own.
        return loss * self.args.sp_size if self.model.training else loss

    # ---- rollouts ----

    def _generate_and_score_completions(self, inputs: list[dict]) -> Rollouts:
        return self._correct_mismatch(self._sample(inputs))

    def _sample(self, inputs: list[dict]) -> Rollouts:
        """TRL's rollouts, and `routed_experts` [B, S, L, K] int16 under router replay."""
        self._is_scoring, self._routes_BSLK = True, None
        try:
            with images_processed_once(self.processing_class):
                rollouts = super()._generate_and_score_completions([with_image_list(row) for row in inputs])
        finally:
            self._is_scoring = False
        prompt_width = rollouts["prompt_ids"].shape[1]
        routes = self._known_routes(prompt_width, prompt_width + rollouts["completion_ids"].shape[1])
        if routes is not None:
            rollouts["routed_experts"] = routes
        return rollouts

    def _generate(self, prompts: list):
        if self._engine is not None:
            self._engine.begin(self)
        generated = super()._generate(prompts)
        prompt_ids, completion_ids, _, _, _, extra_fields, *_ = generated
        if self._engine is not None:
            self._engine.finish()
            if self.args.router_replay == "R3":
                samples = [p + c for p, c in zip(prompt_ids, completion_ids, strict=True)]
                extra_fields["routed_experts"] = [self._engine.routes_of(sample) for sample in samples]
        generated = self.from_first_rank(generated)
        prompt_ids, completion_ids, _, _, _, extra_fields, images, *_ = generated
        # TRL has None for a prompt without images among others that have some, and no processor takes that.
        for index, of_prompt in enumerate(images or []):
            images[index] = of_prompt or []
        self._lengths = [(len(p), len(c)) for p, c in zip(prompt_ids, completion_ids, strict=True)]
        # Taken out: reward functions would get them as an argument.
        self._rollout_routes = extra_fields.pop("routed_experts", None)
        if self.args.router_replay == "R3" and self._rollout_routes is None:
            raise ValueError(
                "router_replay is 'R3', but the rollouts carry no 'routed_experts': let the engine return them (and "
                "rollout_func hand them on), or use 'R2'."
            )
        return generated

    def _generate_single_turn(self, prompt_ids: list, images: Any, *others: Any, **keywords: Any):
        if self._engine is None:
            if self._is_calling_tools:
                self._any_rank_samples(True)
            return super()._generate_single_turn(prompt_ids, images, *others, **keywords)
        if images is not None:
            raise ValueError("EngineRollouts samples from text alone; leave rollout_func out for prompts with images.")
        return self._engine.turn(prompt_ids, self)

    def _tool_call_loop(self, *conversations: Any):
        self._is_calling_tools = True
        try:
            result = super()._tool_call_loop(*conversations)
        finally:
            self._is_calling_tools = False
        # To sample with a sharded model takes all ranks, and they take different numbers of turns.
        while self._engine is None and self._any_rank_samples(False):
            super()._generate_single_turn([[self.eos_token_ids[0]]], None, {}, 1)
        return result

    def _any_rank_samples(self, here: bool) -> bool:
        flag = torch.tensor(int(here), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)

    def _known_routes(self, prompt_width: int, width: int) -> torch.Tensor | None:
        if self._routes_BSLK is None and self.args.router_replay == "R3":
            routes = align_routes(self._routers, self._rollout_routes, self._lengths, prompt_width, width)
            self._routes_BSLK = routes.to(self.accelerator.device)
        return self._routes_BSLK

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        parent = super()._get_per_token_logps_and_entropies
        replays = self._is_scoring and self.args.router_replay and model is self.model and not is_reference(model)
        if isinstance(model, nn.Module):  # TRL's own calls; ours wrap it themselves
            model = self.shared(model)
        if not replays:
            return parent(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        width = input_ids.shape[1]
        routes = self._known_routes(width - logits_to_keep, width)
        if routes is None:  # R2: this forward, of the old log-probabilities, decides
            recording = RecordingModel(model, self._routers)
            result = parent(recording, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
            self._routes_BSLK = self.of_whole_rows(recording.ids_BSLK)
            return result
        replaying = ReplayingModel(model, self._routers, routes)
        return parent(replaying, input_ids, attention_mask, logits_to_keep, *args, **kwargs)

    # ---- train-inference mismatch ----

    def _correct_mismatch(self, rollouts: Rollouts) -> Rollouts:
        """Measure how far the engine that sampled is from this trainer, and weigh the advantages if asked to."""
        engine_logps = rollouts.get("sampling_per_token_logps")
        if engine_logps is None:
            if self.args.correction is not None:
                raise ValueError("mismatch_correction needs rollouts with the engine's log-probabilities.")
            return rollouts
        mask = loss_mask(rollouts)
        train_logps = rollouts.get("old_per_token_logps")
        if train_logps is None:
            train_logps = self._current_logps(rollouts)
        log_ratio = log_ratios(train_logps, engine_logps, mask)
        weights = None
        if self.args.correction is not None:
            weights = self.args.correction.weights(log_ratio, mask)
            rollouts["advantages"] = _by_token(rollouts["advantages"]) * weights
        mode = "train" if self.model.training else "eval"
        for name, value in mismatch_metrics(log_ratio, mask, weights, self.accelerator).items():
            self._metrics[mode][name].append(value)
        return rollouts

    @torch.no_grad()
    def _current_logps(self, rollouts: Rollouts) -> torch.Tensor:
        """[B, C] under the weights that sampled, which are this trainer's still."""
        inputs = self._model_inputs(rollouts)
        model = self.shared(self.model)
        if "routed_experts" in rollouts:
            model = ReplayingModel(model, self._routers, rollouts["routed_experts"])
        logps, _, _ = self._get_per_token_logps_and_entropies(
            model,
            inputs["input_ids"],
            inputs["attention_mask"],
            rollouts["completion_ids"].shape[1],
            batch_size=self.args.per_device_train_batch_size,
            **{key: rollouts[key] for key in _IMAGE_KEYS if key in rollouts},
        )
        return logps


@contextlib.contextmanager
def _without_reference(args: MoEGRPOConfig) -> Iterator[None]:
    """Show TRL arguments for which it loads no reference of its own."""
    beta, sync_ref_model = args.beta, args.sync_ref_model
    args.beta, args.sync_ref_model = 0.0, False
    try:
        yield
    finally:
        args.beta, args.sync_ref_model = beta, sync_ref_model


def loss_mask(rollouts: Rollouts) -> torch.Tensor:
    """[B, C]: 1 on tokens that the model sampled and that train."""
    return rollouts["completion_mask"] * rollouts.get("tool_mask", 1)


def _by_token(advantages: torch.Tensor) -> torch.Tensor:
    """[B] or [B, C] -> [B, 1] or [B, C]."""
    return advantages[:, None] if advantages.dim() == 1 else advantages
