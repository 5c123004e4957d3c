"""Rollouts of an engine in TRL's sampling loop: token ids in, token ids with log-probabilities and routes out.

    engine = VllmEngine("http://localhost:8000")
    MoEGRPOTrainer(..., rollout_func=EngineRollouts(engine, folder="/dev/shm/weights"))

    begin    once a batch, on all ranks: the engine gets the trainer's weights if they are new
    turn     each rank by itself, as often as its samples call tools; the engine continues the very tokens that it wrote
    finish   what failed on one rank is raised on all

So ranks may take different numbers of turns, and none is left waiting in a collective.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..models.base import fail_together
from ..moe.replay import NATIVE
from .engines.contract import RolloutEngine, Sampling
from .weight_sync import WeightSync


class EngineRollouts:
    """What `MoEGRPOTrainer` and `MoEDAPOTrainer` take as `rollout_func` to sample with an engine, in one turn or many.

    Args:
        engine: of `rl/engines`.
        folder: for new weights and nothing else, on storage that all ranks and the engine share.
        sync: whether weights are sent. False for engines whose weights somebody else sends, or stay.
        seed: of the first sample of the first turn; None for chance.
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
        self._turns: list[tuple[list[int], torch.Tensor]] = []  # tokens so far, and their routes
        self._failure: Exception | None = None
        self._host_group: Any = None

    def begin(self, trainer: Any) -> None:
        """Collective."""
        self._turns, self._failure, self._host_group = [], None, trainer.host_group
        if self.sync and trainer.state.global_step != self._synced_step:
            self._send_weights(trainer)

    def turn(self, prompt_ids: list[list[int]], trainer: Any) -> tuple[list[list[int]], list[list[float]]]:
        """A completion of each prompt, and its log-probabilities. After a failure, of nothing but the end."""
        want_routes = trainer.args.router_replay == "R3"
        try:
            if self._failure is None:
                completions = self.engine.generate(prompt_ids, self._sampling(trainer), want_routes=want_routes)
        except Exception as error:
            self._failure = error
        if self._failure is not None:
            return [[trainer.eos_token_ids[0]] for _ in prompt_ids], [[0.0] for _ in prompt_ids]
        self._sampled += len(prompt_ids)
        for prompt, completion in zip(prompt_ids, completions, strict=True):
            if completion.routed_experts is not None:
                routes = self._filled(prompt, completion.routed_experts)
                self._turns.append((prompt + completion.token_ids, routes))
        return [c.token_ids for c in completions], [c.logprobs for c in completions]

    def finish(self) -> None:
        """Collective: raises what failed in a turn, on any rank."""
        with fail_together(sharded=dist.is_initialized(), group=self._host_group):
            if self._failure is not None:
                raise self._failure

    def routes_of(self, token_ids: list[int]) -> torch.Tensor | None:
        """[tokens - 1, layers, K] of a sample of any number of turns, as the last one reported them."""
        for known, routes in reversed(self._turns):
            if _begins_with(known, token_ids):  # TRL may have cut it
                return routes[: len(token_ids) - 1]
        return None

    def _filled(self, prompt: list[int], routes: torch.Tensor) -> torch.Tensor:
        """Rows that the engine did not compute again (its prefix cache), from the turn that computed them."""
        if not (routes[: len(prompt) - 1] == NATIVE).any():
            return routes
        earlier = self._routes_of_start(prompt)
        if earlier is None:
            return routes
        start = routes[: len(earlier)]
        return torch.cat([torch.where(start == NATIVE, earlier.to(start), start), routes[len(earlier) :]])

    def _routes_of_start(self, prompt: list[int]) -> torch.Tensor | None:
        """Those of the longest sample so far with which the prompt begins."""
        starts = [(len(known), routes) for known, routes in self._turns if _begins_with(prompt, known)]
        return max(starts, key=lambda start: start[0])[1] if starts else None

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
            # Ranks and turns draw differently, a repeated run the same.
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


def _begins_with(tokens: list[int], start: list[int]) -> bool:
    # Of thousands of tokens, the last one of the start tells most apart.
    length = len(start)
    return length <= len(tokens) and tokens[length - 1] == start[-1] and tokens[:length] == start
