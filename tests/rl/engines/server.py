"""A server that speaks the protocols of vLLM, SGLang and LMDeploy, samples with a model in this process, and can fail.

The shapes are those of the engines' own code: vLLM 0.32 (entrypoints/scale_out/token_in_token_out/protocol.py, and
entrypoints/rl/online/api_router.py), SGLang 0.5 (srt/managers/io_struct.py and the answers of its /generate), LMDeploy
0.16 (serve/openai/protocol.py, endpoints/generate.py and management.py; pytorch/engine/model_agent/agent.py for what
it does with new weights). A request with a field that the engine does not know is answered with 422, as theirs are.
"""

from __future__ import annotations

import base64
import io
import json
import threading
import weakref
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import pytest
import torch

from xtuner_hf.rl.engines import lmdeploy
from xtuner_hf.rl.engines.contract import Completion, Sampling
from xtuner_hf.rl.engines.lmdeploy import LmdeployEngine
from xtuner_hf.rl.engines.local import LocalEngine
from xtuner_hf.rl.engines.sglang import SglangEngine
from xtuner_hf.rl.engines.vllm import VllmEngine

CLIENTS = {"vllm": VllmEngine, "sglang": SglangEngine, "lmdeploy": LmdeployEngine}

_VLLM_SAMPLING = {
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop_token_ids", "seed"),
    *("logprobs", "prompt_logprobs", "detokenize"),
}
_SGLANG_SAMPLING = {
    *("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop_token_ids"),
    *("skip_special_tokens", "sampling_seed"),
}
_FIELDS = {
    ("vllm", "/inference/v1/generate"): {"token_ids", "sampling_params", "cache_salt"},
    ("sglang", "/generate"): {
        *("input_ids", "sampling_params", "return_logprob", "logprob_start_len", "return_routed_experts"),
    },
    ("lmdeploy", "/generate"): {
        *("input_ids", "return_logprob", "return_routed_experts", "max_tokens", "temperature", "top_p", "top_k"),
        *("min_p", "repetition_penalty", "stop_token_ids", "include_stop_str_in_output", "skip_special_tokens"),
    },
    ("sglang", "/update_weights_from_disk"): {"model_path", "weight_version", "flush_cache"},
    ("lmdeploy", "/update_weights"): {"serialized_named_tensors", "load_format", "finished"},
    ("lmdeploy", "/sleep"): {"level"},
    ("lmdeploy", "/wakeup"): {"tags"},
}


class EngineServer:
    """Serves an engine of this process under `url`; ends with the `with`.

    Args:
        dialect: "vllm", "sglang" or "lmdeploy".
        engine: what answers.
        faults: what goes wrong with the next requests for completions: "500", "429", "400", "hang", "cut" (the
            connection breaks), "half json", "no routes", "short routes", "late" (older weights), "fewer logprobs".
        forever: go on with the last of them.
        faulty: how the path ends of the requests that go wrong.
        drops: a part of names; tensors with it in theirs are not loaded, in silence.
        ranks: LMDeploy's `--tp`.
    """

    def __init__(
        self,
        dialect: str,
        engine: LocalEngine,
        faults: Sequence[str] = (),
        forever: bool = False,
        faulty: str = "/generate",
        drops: str = "",
        ranks: int = 1,
    ):
        self.dialect, self.engine, self.faults, self.forever, self.drops = dialect, engine, list(faults), forever, drops
        self.faulty, self.ranks = faulty, ranks
        self.asleep: set[str] = set()
        self.calls: list[str] = []
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> EngineServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def client(self, **settings: Any):
        """Impatient where the server hangs, unless told otherwise."""
        try_timeout = 0.5 if "hang" in self.faults else 20.0
        defaults: dict[str, Any] = {"deadline": 60.0, "try_timeout": try_timeout, "retries": 2, "backoff": 0.01}
        if self.dialect == "sglang":
            config = self.engine.model.config
            defaults |= {"num_layers": _num_moe_layers(config), "experts_per_token": config.num_experts_per_tok}
        return CLIENTS[self.dialect](self.url, **(defaults | settings))

    # ---- HTTP ----

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                path, _, query = self.path.partition("?")
                fault = server._next_fault() if path.endswith(server.faulty) else None
                server.calls.append(self.path)
                if fault == "hang":
                    server._closing.wait()
                if fault in ("500", "429", "400"):
                    self._answer(int(fault), b'{"error": "injected"}')
                    return
                try:
                    fields = json.loads(body or b"{}") | dict(parse_qsl(query))
                    status, answer = server._respond(path, fields, fault)
                except Exception as error:
                    status, answer = 500, {"error": repr(error)}
                text = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                if fault == "half json":
                    text = text[: len(text) // 2]
                self._answer(status, text, break_off=fault == "cut")

            def _answer(self, status: int, text: bytes, break_off: bool = False) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text[: len(text) // 2] if break_off else text)
                self.close_connection = break_off or self.close_connection

            def log_message(self, *_: Any) -> None:
                pass

        return Handler

    def _next_fault(self) -> str | None:
        with self._lock:
            if self.forever and len(self.faults) == 1:
                return self.faults[0]
            return self.faults.pop(0) if self.faults else None

    def _respond(self, path: str, body: dict, fault: str | None) -> tuple[int, Any]:
        unknown = body.keys() - _FIELDS.get((self.dialect, path), set(body))
        if unknown:
            return 422, {"detail": f"unknown {sorted(unknown)}"}
        name = path.replace("/inference/v1", "").strip("/")
        handle = getattr(self, f"_{self.dialect}_{name}", None)
        if handle is None:
            return 404, {"detail": "Not Found"}
        with self._lock:  # as an engine with one scheduler
            return handle(body, fault)

    def _sample(self, prompt: list[int], sampling: Sampling, fault: str | None) -> Completion:
        (completion,) = self.engine.generate([prompt], sampling, want_routes=True)
        assert completion.routed_experts is not None
        if fault == "no routes":
            completion.routed_experts = None
        if fault == "short routes":
            completion.routed_experts = completion.routed_experts[:-1]
        if fault == "fewer logprobs":
            completion.logprobs = completion.logprobs[:-1]
        if fault == "late":
            completion.versions = [(0, len(completion.token_ids), "an older one")]
        return completion

    # ---- vLLM ----

    def _vllm_generate(self, body: dict, fault: str | None) -> tuple[int, Any]:
        params, prompt = body["sampling_params"], body["token_ids"]
        if params.keys() - _VLLM_SAMPLING:
            return 422, {"detail": "sampling_params"}
        answer: dict[str, Any] = {"output_mode": "tokens", "request_id": "1", "prompt_logprobs": None}
        if params.get("prompt_logprobs") is not None:
            scores = self.engine.score(prompt)
            entries = [{str(t): {"logprob": s, "rank": 1}} for t, s in zip(prompt[1:], scores, strict=True)]
            return 200, answer | {"prompt_logprobs": [None, *entries], "choices": []}
        fields = {k: v for k, v in params.items() if k not in ("logprobs", "detokenize")}
        completion = self._sample(
            prompt, Sampling(**fields | {"stop_token_ids": tuple(fields["stop_token_ids"])}), fault
        )
        scored = zip(completion.token_ids, completion.logprobs, strict=False)
        routes = completion.routed_experts
        choice = {
            "index": 0,
            "finish_reason": completion.finish_reason,
            "stop_reason": None,
            "token_ids": completion.token_ids,
            "logprobs": {
                "content": [{"token_id": t, "logprob": lp, "rank": 1, "top_logprobs": []} for t, lp in scored]
            },
            "routed_experts": None if routes is None else _npy(routes.numpy().astype(np.uint8)),
            "weight_versions": [{"version": v, "start": a, "end": b} for a, b, v in completion.versions],
        }
        return 200, answer | {"choices": [choice]}

    def _vllm_pause(self, body: dict, fault: str | None) -> tuple[int, Any]:
        return 200, {"status": "paused"}

    def _vllm_resume(self, body: dict, fault: str | None) -> tuple[int, Any]:
        return 200, {"status": "resumed"}

    def _vllm_abort_requests(self, body: dict, fault: str | None) -> tuple[int, Any]:
        return 200, {"status": "aborted", "aborted": 0}

    def _vllm_start_weight_update(self, body: dict, fault: str | None) -> tuple[int, Any]:
        self.engine.begin_update()
        return 200, {"message": "Weight update started"}

    def _vllm_update_weights(self, body: dict, fault: str | None) -> tuple[int, Any]:
        self._load([Path(file) for file in body["update_info"]["files"]])
        return 200, {"message": "Weights updated"}

    def _vllm_finish_weight_update(self, body: dict, fault: str | None) -> tuple[int, Any]:
        self.engine.end_update(body["weight_version"], Path())
        return 200, {"message": "Weight update finished"}

    def _load(self, files: list[Path]) -> None:
        self.engine.load(files)
        self._drop()

    def _drop(self) -> None:
        if self.drops:
            self.engine._new = {n: t for n, t in self.engine._new.items() if self.drops not in n}

    # ---- SGLang ----

    def _sglang_generate(self, body: dict, fault: str | None) -> tuple[int, Any]:
        params, prompt = body["sampling_params"], body["input_ids"]
        if params.keys() - _SGLANG_SAMPLING:
            return 422, {"detail": "sampling_params"}
        if params["max_new_tokens"] == 0:
            scored = zip(self.engine.score(prompt), prompt[1:], strict=True)
            meta = {"input_token_logprobs": [[None, prompt[0], None], *([s, t, None] for s, t in scored)]}
            return 200, {"text": "", "output_ids": [], "meta_info": meta | {"finish_reason": {"type": "length"}}}
        sampling = Sampling(
            max_tokens=params["max_new_tokens"],
            temperature=params["temperature"],
            top_k=max(params["top_k"], 0),
            stop_token_ids=tuple(params["stop_token_ids"]),
            seed=params.get("sampling_seed"),
        )
        completion = self._sample(prompt, sampling, fault)
        scored = zip(completion.logprobs, completion.token_ids, strict=False)
        meta = {
            "id": "1",
            "finish_reason": {"type": completion.finish_reason},
            "prompt_tokens": len(prompt),
            "weight_version": completion.versions[0][2] if completion.versions else "default",
            "output_token_logprobs": [[lp, token, None] for lp, token in scored],
        }
        routes = completion.routed_experts
        if body.get("return_routed_experts") and routes is not None:
            meta["routed_experts"] = base64.b64encode(routes.numpy().astype(np.int32).tobytes()).decode()
        return 200, {"text": "", "output_ids": completion.token_ids, "meta_info": meta}

    def _sglang_pause_generation(self, body: dict, fault: str | None) -> tuple[int, Any]:
        return (200, {"status": "ok"}) if body["mode"] in ("abort", "retract", "in_place") else (422, b"")

    def _sglang_continue_generation(self, body: dict, fault: str | None) -> tuple[int, Any]:
        return 200, {"status": "ok"}

    def _sglang_abort_request(self, body: dict, fault: str | None) -> tuple[int, Any]:
        return 200, b""

    def _sglang_update_weights_from_disk(self, body: dict, fault: str | None) -> tuple[int, Any]:
        folder = Path(body["model_path"])
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert (folder / "config.json").exists()
        self.engine.begin_update()
        self._load([folder / name for name in sorted(set(index["weight_map"].values()))])
        assert self.drops or self.engine._new.keys() == index["weight_map"].keys()
        self.engine.end_update(body["weight_version"], folder)
        return 200, {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0}

    # ---- LMDeploy ----

    def _lmdeploy_generate(self, body: dict, fault: str | None) -> tuple[int, Any]:
        if self.asleep:
            return 503, {"error": "the engine is sleeping"}
        prompt = body["input_ids"]
        sampling = Sampling(
            max_tokens=body["max_tokens"],
            temperature=body["temperature"],
            top_k=body["top_k"],
            stop_token_ids=tuple(body["stop_token_ids"]),
        )
        completion = self._sample(prompt, sampling, fault)
        routes = completion.routed_experts
        meta = {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(completion.token_ids),
            "finish_reason": {"type": completion.finish_reason},
            "output_token_logprobs": [
                [lp, t] for lp, t in zip(completion.logprobs, completion.token_ids, strict=False)
            ],
            "routed_experts": routes.tolist() if routes is not None and body.get("return_routed_experts") else None,
        }
        return 200, {"text": "", "output_ids": completion.token_ids, "meta_info": meta}

    def _lmdeploy_abort_request(self, body: dict, fault: str | None) -> tuple[int, Any]:
        return 200, b""

    def _lmdeploy_sleep(self, body: dict, fault: str | None) -> tuple[int, Any]:
        if body["level"] != "1":
            return 400, {"message": "level 2 would forget what is not sent"}
        self.asleep = {"weights", "kv_cache"}
        self.engine.begin_update()
        return 200, b""

    def _lmdeploy_wakeup(self, body: dict, fault: str | None) -> tuple[int, Any]:
        self.asleep.discard(body["tags"])  # of what is awake it takes no notice
        return 200, b""

    def _lmdeploy_update_weights(self, body: dict, fault: str | None) -> tuple[int, Any]:
        if self.asleep != {"kv_cache"}:
            raise RuntimeError("weights are updated while they are awake and the key-value cache is not")
        by_rank = [opened(text, rank) for rank, text in enumerate(body["serialized_named_tensors"])]
        if len(by_rank) != self.ranks:
            raise IndexError("list index out of range")
        self.engine._new |= by_rank[0]
        self._drop()
        if body["finished"]:
            self.engine.end_update("LMDeploy knows no versions", Path())
        return 200, None


def opened(text: str, rank: int) -> dict[str, torch.Tensor]:
    """As each of LMDeploy's ranks does it: argument 6 becomes its own GPU, and what it gets is copied."""
    tensors = {}
    for name, (rebuild, arguments) in ForkingPickler.loads(base64.b64decode(text, validate=True)):
        arguments = list(arguments)
        arguments[6] = rank
        tensors[name] = rebuild(*arguments).clone()
    return tensors


def sum_of_opened(text: str) -> dict[str, float]:
    return {name: float(tensor.float().sum()) for name, tensor in opened(text, torch.cuda.current_device()).items()}


class SharedMemory:
    """Stands in for the memory of a trainer's GPU: the client's handles lead here until it lets a tensor go.

    Handles have the arguments of torch's CUDA handles, in order.
    """

    current: SharedMemory

    def __init__(self, patch: pytest.MonkeyPatch):
        self.tensors: weakref.WeakValueDictionary[bytes, torch.Tensor] = weakref.WeakValueDictionary()
        self.readers: list[list[int]] = []
        """Of each handle, the devices that opened it."""
        SharedMemory.current = self
        patch.setattr(lmdeploy, "ipc_device", lambda: torch.device("cpu"))
        patch.setattr(lmdeploy, "reduce_tensor", self._share)

    def _share(self, tensor: torch.Tensor) -> tuple[Any, tuple]:
        handle = len(self.readers).to_bytes(8)
        self.tensors[handle] = tensor
        self.readers.append([])
        layout = (type(tensor), tensor.size(), tensor.stride(), tensor.storage_offset())
        memory = (torch.UntypedStorage, tensor.dtype, 0, handle, tensor.nbytes, 0)
        return _rebuilt, (*layout, *memory, False, b"counter", 0, b"event", True)


def _rebuilt(_class, size, stride, offset, _storage, dtype, device, handle, *_others) -> torch.Tensor:
    memory = SharedMemory.current
    memory.readers[int.from_bytes(handle)].append(device)
    tensor = memory.tensors[handle]
    assert (tensor.size(), tensor.stride(), tensor.storage_offset(), tensor.dtype) == (size, stride, offset, dtype)
    return tensor


def _npy(array: np.ndarray) -> str:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(buffer.getvalue()).decode()


def _num_moe_layers(config: Any) -> int:
    return config.num_hidden_layers - len(config.mlp_only_layers)
