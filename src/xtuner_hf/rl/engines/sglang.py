"""An SGLang server: its native /generate and its weight endpoints (0.5).

    python -m sglang.launch_server --model-path MODEL --enable-return-routed-experts

New weights are read from a folder that it shares with the trainer (/update_weights_from_disk). Tested against a server
that speaks the protocol, not against SGLang itself. With the flashinfer_trtllm kernels for MoE an update in place is
known to go wrong: start with --moe-runner-backend triton.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .contract import Completion, EngineError, Sampling
from .http import HttpEngine, check_scored, common_fields


class SglangEngine(HttpEngine):
    """Client of an SGLang server; arguments as in `HttpEngine`.

    Args:
        experts_per_token: K; SGLang's routes are flat and do not say it. Needed for router replay.
        num_layers: decoder layers, for the same.
    """

    name = "SGLang"
    reads_whole_folder = True

    def __init__(self, url: str, *, num_layers: int | None = None, experts_per_token: int | None = None, **keywords):
        super().__init__(url, **keywords)
        self._route_shape: Any = None
        if num_layers and experts_per_token:
            self._route_shape = (num_layers, experts_per_token)

    def _generate_request(self, prompt, sampling: Sampling, want_routes: bool) -> tuple[str, dict]:
        if want_routes and self._route_shape is None:
            raise EngineError(
                "SGLang sends routes without their shape: give SglangEngine num_layers and experts_per_token."
            )
        params: dict[str, Any] = {
            "max_new_tokens": sampling.max_tokens,
            "top_k": sampling.top_k or -1,
            **common_fields(sampling),
            "skip_special_tokens": False,
        }
        if sampling.seed is not None:
            params["sampling_seed"] = sampling.seed
        body = {"input_ids": prompt, "sampling_params": params, "return_logprob": True}
        return "/generate", body | ({"return_routed_experts": True} if want_routes else {})

    def _completion(self, answer: Any, prompt: list[int]) -> Completion:
        ids, meta = answer["output_ids"], answer["meta_info"]
        scored = meta["output_token_logprobs"]
        check_scored([entry[1] for entry in scored], ids)
        routes, version = meta.get("routed_experts"), meta.get("weight_version")
        return Completion(
            token_ids=ids,
            logprobs=[entry[0] for entry in scored],
            finish_reason=meta["finish_reason"]["type"],
            routed_experts=None if routes is None else self._routes(routes, len(prompt) + len(ids) - 1),
            versions=[] if version is None else [(0, len(ids), version)],
        )

    def _routes(self, text: str, num_tokens: int) -> torch.Tensor:
        flat = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.int32)
        return torch.from_numpy(flat.reshape(num_tokens, *self._route_shape).copy())

    def _score_request(self, token_ids: list[int]) -> tuple[str, dict]:
        params = {"max_new_tokens": 0, "temperature": 1.0}
        return "/generate", {
            "input_ids": token_ids,
            "sampling_params": params,
            "return_logprob": True,
            "logprob_start_len": 0,
        }

    def _scores(self, answer: Any, token_ids: list[int]) -> list[float]:
        _, *scored = answer["meta_info"]["input_token_logprobs"]
        if [entry[1] for entry in scored] != token_ids[1:]:
            raise ValueError("log-probabilities are of other tokens than were sent")
        return [entry[0] for entry in scored]

    # ---- control ----

    def pause(self) -> None:
        # 'retract' would recompute the prefix on the way back: new routes beside old log-probabilities.
        self._post("/pause_generation", {"mode": "abort"})

    def resume(self) -> None:
        self._post("/continue_generation")

    def abort(self) -> None:
        self._post("/abort_request", {"abort_all": True})

    def begin_update(self) -> None:
        pass

    def load(self, files: Sequence[Path]) -> None:
        raise NotImplementedError("SGLang reads the whole folder in end_update.")

    def end_update(self, version: str, folder: Path) -> None:
        body = {"model_path": str(folder.resolve()), "weight_version": version, "flush_cache": True}
        answer = self._post("/update_weights_from_disk", body)
        if not (isinstance(answer, dict) and answer.get("success")):
            raise EngineError(f"SGLang at {self.url} did not take the weights {version}: {answer}")
        self._sent_version = version
