"""Rollouts of an engine for TRL's `rollout_func`: prompts in, completions with log-probabilities and routes out.

    engine = VllmEngine("http://localhost:8000")
    MoEGRPOTrainer(..., rollout_func=EngineRollouts(engine, folder="/dev/shm/weights"))

Each rank asks the engine for its own prompts. What fails on one rank is raised on all, after the engine's deadline at
most: no rank is left waiting in a collective.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..models.base import fail_together
from .engines.contract import RolloutEngine, Sampling
from .weight_sync import WeightSync


class EngineRollouts:
    """A `rollout_func` that samples with an engine and sends it the trainer's weights after each optimizer step.

    Args:
        engine: of `rl/engines`.
        folder: for new weights, on storage that all ranks and the engine share; it is emptied.
        sync: whether weights are sent. False for engines whose weights somebody else sends, or stay.
        seed: of the first sample of the first call; None for chance.
        sync_options: further arguments of `WeightSync` (`dtype`, `tolerance`, `quantised_like`, ...).
    """

    def __init__(
        self,
        engine: RolloutEngine,
        folder: str | Path,
        *,
        sync: bool = True,
        seed: int | None = None,
        **sync_options: Any,
    ):
        self.engine, self.folder, self.sync, self.seed = engine, Path(folder), sync, seed
        self._sync_options = sync_options
        self._weight_sync: WeightSync | None = None
        self._synced_step: int | None = None
        self._sampled = 0

    def __call__(self, prompts: list, trainer: Any) -> dict[str, list]:
        """As TRL asks for it, and `routed_experts` under router replay "R3"."""
        if self.sync and trainer.state.global_step != self._synced_step:
            self._send_weights(trainer)
        prompt_ids, images, _ = trainer._tokenize_prompts(prompts)
        if images is not None:
            raise ValueError("EngineRollouts samples from text alone; leave rollout_func out for prompts with images.")
        want_routes = trainer.args.router_replay == "R3"
        with fail_together(sharded=dist.is_initialized()):
            completions = self.engine.generate(prompt_ids, self._sampling(trainer), want_routes=want_routes)
        self._sampled += len(prompts)
        output = {
            "prompt_ids": prompt_ids,
            "completion_ids": [completion.token_ids for completion in completions],
            "logprobs": [completion.logprobs for completion in completions],
        }
        if want_routes:
            output["routed_experts"] = [completion.routed_experts for completion in completions]
        return output

    def _send_weights(self, trainer: Any) -> None:
        step = trainer.state.global_step
        if self._weight_sync is None:
            options = {"group": trainer.host_group} | self._sync_options
            self._weight_sync = WeightSync(self.engine, self.folder, **options)
        mode = "train" if trainer.model.training else "eval"
        for name, value in self._weight_sync(trainer.model, version=str(step)).items():
            trainer._metrics[mode][name].append(value)
        self._synced_step = step

    def _sampling(self, trainer: Any) -> Sampling:
        seed = None
        if self.seed is not None:
            # Ranks and calls draw differently, a repeated run the same.
            rank, ranks = trainer.accelerator.process_index, trainer.accelerator.num_processes
            seed = self.seed + ranks * self._sampled + rank * 1_000_003
        return Sampling(
            max_tokens=trainer.max_completion_length,
            temperature=trainer.temperature,
            top_p=trainer.top_p,
            top_k=trainer.top_k or 0,
            min_p=trainer.min_p or 0.0,
            repetition_penalty=trainer.repetition_penalty,
            stop_token_ids=tuple(trainer.eos_token_ids),
            seed=seed,
        )
