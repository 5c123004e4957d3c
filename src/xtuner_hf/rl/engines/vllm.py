"""A vLLM server: its token-in, token-out API and its RL endpoints (vLLM 0.32).

    VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model MODEL --enable-scale-out \
        --logprobs-mode processed_logprobs --enable-return-routed-experts \
        --weight-transfer-config '{"backend": "safetensors"}' \
        --worker-extension-cls xtuner_hf.rl.engines.vllm_worker.SafetensorsWorker

`processed_logprobs` are those at the sampling temperature; the last two flags make it read new weights from storage
that it shares with the trainer (vllm_worker.py), for which this package must be importable there.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .contract import Completion, Sampling
from .http import HttpEngine, check_scored, common_fields


class VllmEngine(HttpEngine):
    """Client of a vLLM server; arguments as in `HttpEngine`."""

    name = "vLLM"

    def _generate_request(self, prompt, sampling: Sampling, want_routes: bool) -> tuple[str, dict]:
        params = {
            "max_tokens": sampling.max_tokens,
            "top_k": sampling.top_k,
            **common_fields(sampling),
            "seed": sampling.seed,
            "logprobs": 0,
            "detokenize": False,
        }
        body: dict[str, Any] = {"token_ids": prompt, "sampling_params": params}
        if self._sent_version is not None:
            body["cache_salt"] = self._sent_version  # keys and values of other weights are never reused
        return "/inference/v1/generate", body

    def _completion(self, answer: Any, prompt: list[int]) -> Completion:
        (choice,) = answer["choices"]
        ids, scored = choice["token_ids"], choice["logprobs"]["content"]
        check_scored([entry["token_id"] for entry in scored], ids)
        routes = choice.get("routed_experts")
        spans = choice.get("weight_versions") or []
        return Completion(
            token_ids=ids,
            logprobs=[entry["logprob"] for entry in scored],
            finish_reason=choice["finish_reason"],
            routed_experts=None if routes is None else _npy(routes),
            versions=[(span["start"], span["end"], span["version"]) for span in spans],
        )

    def _score_request(self, token_ids: list[int]) -> tuple[str, dict]:
        params = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0, "detokenize": False}
        return "/inference/v1/generate", {"token_ids": token_ids, "sampling_params": params}

    def _scores(self, answer: Any, token_ids: list[int]) -> list[float]:
        _, *scored = answer["prompt_logprobs"]
        return [entry[str(token)]["logprob"] for entry, token in zip(scored, token_ids[1:], strict=True)]

    # ---- control ----

    def pause(self) -> None:
        self._post("/pause?mode=abort")

    def resume(self) -> None:
        self._post("/resume")

    def abort(self) -> None:
        self._post("/abort_requests")

    def begin_update(self) -> None:
        self._post("/start_weight_update")

    def load(self, files: Sequence[Path]) -> None:
        self._post("/update_weights", {"update_info": {"files": [str(file.resolve()) for file in files]}})

    def end_update(self, version: str, folder: Path) -> None:
        self._post("/finish_weight_update", {"weight_version": version})
        self._sent_version = version

    def _advice(self, path: str, status: int) -> str:
        if status == 404 and not path.startswith("/inference"):
            return " Start the server with VLLM_SERVER_DEV_MODE=1, which adds the endpoints that RL needs."
        return ""


def _npy(text: str) -> torch.Tensor:
    """[P + C - 1, L, K] int32 of vLLM's base64 .npy (of uint8, uint16 or int32)."""
    return torch.from_numpy(np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False).astype(np.int32))
