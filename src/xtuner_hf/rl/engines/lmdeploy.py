"""An LMDeploy server: its native /generate (0.16, PyTorch engine).

    lmdeploy serve api_server MODEL --backend pytorch --logprobs-mode raw_logprobs --enable-abort-handling \
        --distributed-executor-backend ray

`raw_logprobs` are those at temperature 1: sample with it. New weights need Ray, says LMDeploy's documentation; with
it, routed experts are a key of Ray's store, which this client does not read. For routes and fixed weights, start it
with --enable-return-routed-experts in the place of the last flag.

New weights lie in this process's GPU memory, and what is sent are handles of it (CUDA IPC): rank 0 of the trainer must
have a GPU, LMDeploy must run on the same node, and its GPUs must be able to read that one. Tested against a server that
speaks the protocol, not against LMDeploy itself; no handle has been opened on a GPU.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from safetensors.torch import load_file

from ..._compat import reduce_tensor
from ...device import cuda_ipc_device
from .contract import Completion, EngineError, Sampling
from .http import HttpEngine, check_scored, common_fields


class LmdeployEngine(HttpEngine):
    """Client of an LMDeploy server; arguments as in `HttpEngine`.

    Args:
        tensor_parallel: its `--tp`. Each of its ranks opens handles of its own.
    """

    name = "LMDeploy"
    scores_given_tokens: ClassVar[bool] = False

    def __init__(self, url: str, *, tensor_parallel: int = 1, **keywords):
        super().__init__(url, **keywords)
        self.tensor_parallel = tensor_parallel

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
            raise ValueError(
                "the routed experts are a key of Ray's store, which is not read: take vLLM or SGLang for router "
                "replay, or fixed weights, which need no Ray,"
            )
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

    def begin_update(self) -> None:
        ipc_device()  # an error before anything is asleep
        # It loads while its key-value cache is gone. Level 1 keeps the weights: what is not sent stays as it is.
        self._post("/sleep?level=1")
        self._post("/wakeup?tags=weights")

    def load(self, files: Sequence[Path]) -> None:
        for file in files:
            self._update(load_file(file, device=str(ipc_device())))

    def end_update(self, version: str, folder: Path) -> None:
        self._update({}, finished=True)
        self._post("/wakeup?tags=kv_cache")
        self._sent_version = version

    def _update(self, tensors: Mapping[str, torch.Tensor], finished: bool = False) -> None:
        """The server has copied the tensors when this returns: until then their memory must stay."""
        handles = [serialized_handles(tensors) for _ in range(self.tensor_parallel)]
        try:
            self._post("/update_weights", {"serialized_named_tensors": handles, "finished": finished})
        except EngineError as error:
            raise EngineError(
                f"{error} It reads new weights from the trainer's GPU memory by CUDA IPC: it must run on this node "
                "with --distributed-executor-backend ray, on GPUs that can read that of the trainer's rank 0, and "
                f"with --tp {self.tensor_parallel} (`tensor_parallel`)."
            ) from error

    def _advice(self, path: str, status: int) -> str:
        return " Start it with --enable-abort-handling." if status == 501 else ""


def ipc_device() -> torch.device:
    """Where tensors lie while LMDeploy copies them."""
    device = cuda_ipc_device()
    if device is None:
        raise EngineError(
            "LMDeploy takes new weights by CUDA IPC, for which this process needs a CUDA GPU on LMDeploy's node; "
            "there is none. Sample with vLLM or SGLang, which read files, or restart LMDeploy from a checkpoint."
        )
    return device


def serialized_handles(tensors: Mapping[str, torch.Tensor]) -> str:
    """LMDeploy's `serialized_named_tensors`: a base64 pickle of [(name, (rebuild function, its arguments))].

    The server puts the number of its own GPU in the place of argument 6 and calls the function, once for each pickle: a
    handle is counted, so no two readers may share one.
    """
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump([(name, reduce_tensor(tensor)) for name, tensor in tensors.items()])
    return base64.b64encode(buffer.getvalue()).decode()
