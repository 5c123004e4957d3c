"""An LMDeploy server: its native /generate (0.16, PyTorch engine).

    lmdeploy serve api_server MODEL --backend pytorch --logprobs-mode raw_logprobs \
        --enable-return-routed-experts --enable-abort-handling

`raw_logprobs` are those at temperature 1: sample with it. LMDeploy takes new weights by CUDA IPC or an NCCL group
alone, which this client does not speak: it samples with fixed weights, for evaluation and off-policy data. Tested
against a server that speaks the protocol, not against LMDeploy itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from .contract import Completion, EngineError, Sampling
from .http import HttpEngine, check_scored, common_fields


class LmdeployEngine(HttpEngine):
    """Client of an LMDeploy server; arguments as in `HttpEngine`."""

    name = "LMDeploy"

    def _generate_request(self, prompt, sampling: Sampling, want_routes: bool) -> tuple[str, dict]:
        if sampling.seed is not None:
            raise EngineError("LMDeploy's /generate takes no seed: sample without one.")
        body = {
            "input_ids": prompt,
            "max_tokens": sampling.max_tokens,
            "top_k": sampling.top_k,
            **common_fields(sampling),
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "return_logprob": True,
        }
        return "/generate", body | ({"return_routed_experts": True} if want_routes else {})

    def _completion(self, answer: Any, prompt: list[int]) -> Completion:
        ids, meta = answer["output_ids"], answer["meta_info"]
        scored, routes = meta["output_token_logprobs"], meta.get("routed_experts")
        check_scored([token for _, token in scored], ids)
        if isinstance(routes, str):
            raise ValueError("the routed experts are a key of Ray's store: serve without Ray")
        return Completion(
            token_ids=ids,
            logprobs=[logprob for logprob, _ in scored],
            finish_reason=meta["finish_reason"]["type"],
            routed_experts=None if routes is None else torch.tensor(routes, dtype=torch.int32),
        )

    def _score_request(self, token_ids: list[int]) -> NoReturn:
        raise EngineError("LMDeploy's /generate does not score given tokens.")

    # ---- control ----

    def pause(self) -> None:
        self.abort()  # it has no pause; nothing else asks it for tokens

    def resume(self) -> None:
        pass

    def abort(self) -> None:
        self._post("/abort_request", {"abort_all": True})

    def begin_update(self) -> NoReturn:
        raise EngineError(
            "LMDeploy takes new weights by CUDA IPC or an NCCL group alone, which xtuner_hf does not speak. Sample "
            "with vLLM or SGLang while you train, or restart LMDeploy from a checkpoint that the trainer saved."
        )

    def load(self, files: Sequence[Path]) -> NoReturn:
        self.begin_update()

    def end_update(self, version: str, folder: Path) -> NoReturn:
        self.begin_update()

    def _advice(self, path: str, status: int) -> str:
        return " Start it with --enable-abort-handling." if status == 501 else ""
