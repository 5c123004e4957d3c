"""An engine in this process: transformers' `generate` on a model of its own. For small models, tests and debugging."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from ...checkpoint.export import export_to_hub
from ...moe.replay import RouteRecorder, RouterMap
from .contract import Completion, EngineError, Sampling


class LocalEngine:
    """Samples with an unsharded model in this process; each rank has one.

    Args:
        model: of this package. It is the engine's own: an update replaces its weights.
        pad_token_id: fills up shorter prompts of a batch; masked.
        batch_size: completions that are sampled together.
    """

    scores_given_tokens: ClassVar[bool] = True
    shared: ClassVar[bool] = False
    reads_whole_folder: ClassVar[bool] = False

    def __init__(self, model: Any, *, pad_token_id: int = 0, batch_size: int = 64):
        self.model = model.eval()
        self.pad_token_id, self.batch_size = pad_token_id, batch_size
        self._version: str | None = None
        self._new: dict[str, torch.Tensor] = {}
        self._is_paused = False

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, *, want_routes: bool = False
    ) -> list[Completion]:
        if self._is_paused:
            raise EngineError("The engine is paused: call resume() first.")
        completions: list[Completion] = []
        for start in range(0, len(prompts), self.batch_size):
            batch = list(prompts[start : start + self.batch_size])
            completions += self._batch(batch, sampling, start, want_routes)
        return completions

    def _batch(self, prompts: list[list[int]], sampling: Sampling, start: int, want_routes: bool) -> list[Completion]:
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        config = GenerationConfig(
            do_sample=sampling.temperature > 0,
            max_new_tokens=sampling.max_tokens,
            temperature=sampling.temperature or None,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p or None,
            repetition_penalty=sampling.repetition_penalty,
            eos_token_id=list(sampling.stop_token_ids) or None,
            pad_token_id=self.pad_token_id,
        )
        device = self.model.device
        with torch.random.fork_rng(enabled=sampling.seed is not None):
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed + start)
            output = self.model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
            ).tolist()
        return [
            self._completion(prompt, _until_stop(row[width:], sampling), sampling, want_routes)
            for prompt, row in zip(prompts, output, strict=True)
        ]

    def _completion(self, prompt: list[int], ids: list[int], sampling: Sampling, want_routes: bool) -> Completion:
        recorder = RouteRecorder(RouterMap(self.model)) if want_routes else None
        logits = self._logits(prompt + ids, routes=recorder)[len(prompt) - 1 : -1]
        logps = (logits / (sampling.temperature or 1.0)).log_softmax(-1)
        return Completion(
            token_ids=ids,
            logprobs=logps.gather(1, torch.tensor(ids, device=logps.device)[:, None])[:, 0].tolist(),
            finish_reason="stop" if ids[-1] in sampling.stop_token_ids else "length",
            routed_experts=None if recorder is None else recorder.ids_BSLK(1)[0, :-1].cpu(),
            versions=[] if self._version is None else [(0, len(ids), self._version)],
        )

    @torch.no_grad()
    def score(self, token_ids: list[int]) -> list[float]:
        logps = self._logits(token_ids)[:-1].log_softmax(-1)
        return logps.gather(1, torch.tensor(token_ids[1:], device=logps.device)[:, None])[:, 0].tolist()

    def _logits(self, token_ids: list[int], **keywords: Any) -> torch.Tensor:
        ids = torch.tensor([token_ids], device=self.model.device)
        logits = self.model(input_ids=ids, use_cache=False, **keywords).logits[0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    # ---- control ----

    def pause(self) -> None:
        self._is_paused = True

    def resume(self) -> None:
        self._is_paused = False

    def abort(self) -> None:
        """Nothing is sampled while somebody else calls."""

    def version(self) -> str | None:
        return self._version

    def begin_update(self) -> None:
        self._new = {}

    def load(self, files: Sequence[Path]) -> None:
        for file in files:
            self._new |= load_file(file)

    def end_update(self, version: str, folder: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            # Written and read under Hub names, so that what an engine would not find is missed here too.
            export_to_hub(self.model, scratch)
            weights = Path(scratch) / "model.safetensors"
            own = load_file(weights)
            unknown = self._new.keys() - own.keys()
            if unknown:
                raise EngineError(f"The engine's model has no tensor {min(unknown)}: it is not the trainer's model.")
            save_file(own | self._new, weights, metadata={"format": "pt"})
            fresh = type(self.model).from_pretrained(scratch, dtype=self.model.dtype)
        self.model.load_state_dict(fresh.state_dict())
        self._new, self._version = {}, version


def _until_stop(ids: list[int], sampling: Sampling) -> list[int]:
    """Without the padding behind the token that ended it."""
    for index, token in enumerate(ids):
        if token in sampling.stop_token_ids:
            return ids[: index + 1]
    return ids
