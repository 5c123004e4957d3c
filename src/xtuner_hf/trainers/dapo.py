"""`MoEDAPOTrainer`: DAPO whole (arXiv 2503.14476), on top of `MoEGRPOTrainer`.

clip-higher, mean over tokens     TRL's, by the config's defaults
soft overlong punishment          one more reward function, of the tokens that the model wrote
overlong filtering                TRL's mask_truncated_completions
dynamic sampling                  _sample: rounds of sampling until the batch is full of groups that differ
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import torch
from datasets import IterableDataset

from ..rl.dynamic_sampling import Rollouts, informative_groups, leave_out, more_prompts, select_rows
from ..rl.overlong import soft_overlong_penalty
from .grpo import MoEGRPOTrainer, loss_mask
from .grpo_config import MoEDAPOConfig, MoEGRPOConfig

logger = logging.getLogger(__name__)

OVERLONG = "soft_overlong_penalty"


class MoEDAPOTrainer(MoEGRPOTrainer):
    """DAPO for the models of this package, dense or MoE; takes what `MoEGRPOTrainer` takes, with `MoEDAPOConfig`.

    Logs `dynamic_sampling/rounds`, `/informative` (share of the sampled groups that differ) and `/filled` (share of the
    batch that trains).
    """

    config_class: ClassVar[type[MoEGRPOConfig]] = MoEDAPOConfig
    # TRL declares some of them narrower than what it puts there itself, or optional.
    num_generations: int
    max_completion_length: int
    reward_funcs: Any
    reward_processing_classes: Any

    def __init__(self, *positional: Any, **keywords: Any):
        super().__init__(*positional, **keywords)
        self._task_rewards = len(self.reward_funcs)
        self._model_lengths: list[int] = []
        self._rewards_per_func = torch.zeros(0)
        metric, names = self.args.dynamic_sampling_metric, list(self.reward_func_names)
        if metric is not None and metric not in names:
            raise ValueError(f"dynamic_sampling_metric is {metric!r}; the reward functions are {', '.join(names)}.")
        if self.args.dynamic_sampling and isinstance(self.train_dataset, IterableDataset):
            raise ValueError("dynamic_sampling draws further prompts by index: give it a Dataset, or switch it off.")
        if self.args.soft_overlong_fraction:
            self.reward_funcs = [*self.reward_funcs, self._overlong_penalty]
            self.reward_func_names = [*names, OVERLONG]
            self.reward_processing_classes = [*self.reward_processing_classes, None]
            self.reward_weights = torch.cat([self.reward_weights, torch.ones(1)])

    # ---- rewards ----

    def _generate(self, prompts: list):
        generated = super()._generate(prompts)
        _, completion_ids, tool_mask, *_ = generated
        own = completion_ids if tool_mask is None else tool_mask
        self._model_lengths = [len(ids) if tool_mask is None else sum(ids) for ids in own]
        return generated

    def _overlong_penalty(self, **_: Any) -> list[float]:
        limit = self.max_completion_length
        cache = max(1, round(limit * self.args.soft_overlong_fraction))
        return soft_overlong_penalty(torch.tensor(self._model_lengths), limit, cache).tolist()

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self._rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._rewards_per_func

    def _metric(self, num_samples: int) -> torch.Tensor:
        """[B] of this rank's samples: what dynamic sampling looks at."""
        first = self.accelerator.process_index * num_samples
        rewards = self._rewards_per_func[first : first + num_samples, : self._task_rewards]
        if self.args.dynamic_sampling_metric is not None:
            return rewards[:, self.reward_func_names.index(self.args.dynamic_sampling_metric)]
        has_none = rewards.isnan().all(1)
        weights = self.reward_weights[: self._task_rewards].to(rewards.device)
        return (rewards * weights).nansum(1).masked_fill(has_none, torch.nan)

    # ---- dynamic sampling ----

    def _sample(self, inputs: list[dict]) -> Rollouts:
        if not (self.model.training and self.args.dynamic_sampling):
            return super()._sample(inputs)
        wanted = len(inputs) // self.num_generations
        rounds: list[tuple[Rollouts, torch.Tensor]] = []  # rollouts, and which of their groups differ
        while True:
            rollouts = super()._sample(inputs)
            rounds.append((rollouts, informative_groups(self._metric(len(inputs)), self.num_generations)))
            found = sum(int(differs.sum()) for _, differs in rounds)
            # All ranks sample equally often: sampling and scoring are collective.
            found_on_ranks = self.accelerator.gather(torch.tensor([found], device=self.accelerator.device))
            if int(found_on_ranks.min()) >= wanted or len(rounds) == self.args.dynamic_sampling_max_rounds:
                break
            inputs = self._further_prompts(wanted, len(rounds))
        self._report_sampling(rounds, found_on_ranks, wanted)
        return self._full_batch(rounds, wanted)

    def _further_prompts(self, num_prompts: int, round_index: int) -> list[dict]:
        # A function of the step: a resumed run draws what the first would have.
        seed = hash((self.args.seed, self.state.global_step, self._offset, round_index)) % 2**63
        group = self.accelerator.process_index // self.args.sp_size
        return more_prompts(self.train_dataset, num_prompts, self.num_generations, group, seed)

    def _full_batch(self, rounds: list[tuple[Rollouts, torch.Tensor]], wanted: int) -> Rollouts:
        """The first `wanted` groups that differ; others, which do not train, in the place of missing ones."""
        in_group = torch.arange(self.num_generations, device=self.accelerator.device)
        parts: list[tuple[Rollouts, torch.Tensor]] = []
        is_spare: list[torch.Tensor] = []
        for takes_spare in (False, True):
            for rollouts, differs in rounds:
                groups = (differs != takes_spare).nonzero()[:, 0][:wanted]
                wanted -= len(groups)
                if len(groups):
                    rows = (groups[:, None] * self.num_generations + in_group).flatten()
                    parts.append((rollouts, rows))
                    is_spare.append(torch.full_like(rows, takes_spare, dtype=torch.bool))
        merged = select_rows(parts, self._tokenizer.pad_token_id)
        leave_out(merged, torch.cat(is_spare))
        # TRL counted the tokens of one round.
        merged["num_items_in_batch"] = self.accelerator.gather(loss_mask(merged).sum()).sum()
        return merged

    def _report_sampling(self, rounds: list, found_on_ranks: torch.Tensor, wanted: int) -> None:
        used = int(found_on_ranks.clamp(max=wanted).sum())
        batch, sampled = wanted * len(found_on_ranks), wanted * len(found_on_ranks) * len(rounds)
        metrics = self._metrics["train"]
        metrics["dynamic_sampling/rounds"].append(float(len(rounds)))
        metrics["dynamic_sampling/informative"].append(int(found_on_ranks.sum()) / sampled)
        metrics["dynamic_sampling/filled"].append(used / batch)
        if used < batch and self.accelerator.is_main_process:
            logger.warning(
                "Dynamic sampling found %d of %d groups whose answers differ in %s after %d rounds; the others of this "
                "batch do not train. The prompts are too easy or too hard for the model: change them, or raise "
                "num_generations or dynamic_sampling_max_rounds.",
                *(used, batch, self.args.dynamic_sampling_metric or "the reward", len(rounds)),
            )
