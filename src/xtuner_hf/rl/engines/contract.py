"""What a rollout engine is to this package: token ids in, token ids out, and what the trainer must know about them.

An engine is local to its rank: no call waits for another rank, and every call ends by its deadline, with an answer or
with an `EngineError`.

Legend: P tokens of a prompt, C of a completion, L layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

import torch


class EngineError(RuntimeError):
    """An engine that did not answer, or not with what was asked for; says which engine, what and what to do."""


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    Args:
        max_tokens: of a completion.
        top_k: 0 for all tokens.
        stop_token_ids: the token that ends a completion is its last.
        seed: of the first completion of a call, one more for each other; None for chance.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None


@dataclass
class Completion:
    """One answer.

    Args:
        token_ids: [C], with the token that ended it.
        logprobs: [C], of each of them as it was sampled (temperature included).
        finish_reason: "stop", "length" or "abort".
        routed_experts: [P + C - 1, L, K] of an integer dtype: the experts of every token but the last, which was never
            fed; None if they were not asked for.
        versions: (start, end, version) of the weights that sampled token_ids[start:end]; empty if the engine is silent.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    routed_experts: torch.Tensor | None = None
    versions: list[tuple[int, int, str]] = field(default_factory=list)


class RolloutEngine(Protocol):
    """An engine. `generate` and `score` raise `EngineError`; so does an update, after which the engine is undefined."""

    scores_given_tokens: ClassVar[bool]
    """`score` works; otherwise only what it sampled has log-probabilities."""
    shared: ClassVar[bool]
    """One engine serves all ranks, so that one rank updates it; otherwise each rank has its own."""
    reads_whole_folder: ClassVar[bool]
    """It takes new weights as one checkpoint folder when all is written, not file by file."""

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, *, want_routes: bool = False
    ) -> list[Completion]:
        """One completion of each prompt, in order."""

    def score(self, token_ids: list[int]) -> list[float]:
        """Log-probability of each token given those before it, at temperature 1; without the first: [P - 1]."""

    def pause(self) -> None:
        """Abort what is being sampled and take nothing new until `resume`."""

    def resume(self) -> None: ...

    def abort(self) -> None:
        """Abort what is being sampled; its completions end with "abort"."""

    def version(self) -> str | None:
        """Of the weights it samples with, as `end_update` named it; None before the first update."""

    def begin_update(self) -> None: ...

    def load(self, files: Sequence[Path]) -> None:
        """Take the tensors of these safetensors files, under Hub names; of whole layers at a time.

        An engine that is reached by NCCL would read them here, on the rank that drives it, and broadcast them.
        """

    def end_update(self, version: str, folder: Path) -> None:
        """All files are loaded, or lie in `folder`; from here on sample with them."""


def check_completion(completion: Completion, prompt: list[int], *, want_routes: bool, version: str | None) -> None:
    """Raise ValueError for an answer that is not whole: it must not train.

    Args:
        version: of the weights that should have sampled; None if that is not known.
    """
    length, total = len(completion.token_ids), len(prompt) + len(completion.token_ids)
    if not length:
        raise ValueError("the completion has no tokens")
    if len(completion.logprobs) != length:
        raise ValueError(f"{length} tokens came with {len(completion.logprobs)} log-probabilities")
    routes = completion.routed_experts
    if want_routes and routes is None:
        raise ValueError("the routed experts are missing (router_replay='R3' needs them)")
    if routes is not None and (routes.dim() != 3 or len(routes) != total - 1):
        raise ValueError(
            f"there are routes of shape {tuple(routes.shape)} for {total} tokens; expected "
            f"[{total - 1}, layers, experts per token]"
        )
    others = {sampled_by for _, _, sampled_by in completion.versions} - {version}
    if version is not None and others:
        raise ValueError(f"weights {', '.join(sorted(others))} sampled, and {version} were sent last")
