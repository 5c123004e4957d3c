"""The clients against a server that speaks the protocols, well and badly: an answer or an error, never a hang."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.rl.engines.server import EngineServer, SharedMemory, sum_of_opened
from tests.tiny import build, moe_config
from xtuner_hf import Qwen3MoeForCausalLM
from xtuner_hf.rl.engines.contract import EngineError, Sampling
from xtuner_hf.rl.engines.lmdeploy import serialized_handles
from xtuner_hf.rl.engines.local import LocalEngine
from xtuner_hf.rl.engines.vllm import VllmEngine

DIALECTS = ("vllm", "sglang", "lmdeploy")
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4]]
SAMPLING = Sampling(max_tokens=6, stop_token_ids=(1,))
# What another try heals, and what the error says when it does not.
FAULTS = {
    "500": "status 500",
    "429": "status 429",
    "hang": "no answer within 0.5 s",
    "cut": "RemoteProtocolError|ReadError",
    "half json": "in the answer",
    "no routes": "the routed experts are missing",
    "short routes": "expected|reshape",
    "fewer logprobs": "other tokens",
}


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    return LocalEngine(build(Qwen3MoeForCausalLM, moe_config()))


def scores(engine: LocalEngine, prompt: list[int], new: list[int]) -> list[float]:
    return engine.score(prompt + new)[len(prompt) - 1 :]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_token_ids_in_and_out(engine, dialect):
    with EngineServer(dialect, engine) as server:
        completions = server.client(try_timeout=20).generate(PROMPTS, SAMPLING, want_routes=True)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = completion.token_ids
        assert 1 <= len(ids) <= 6
        assert completion.finish_reason == ("stop" if ids[-1] == 1 else "length")
        assert completion.logprobs == pytest.approx(scores(engine, prompt, ids), abs=1e-5)
        native = engine._completion(prompt, ids, SAMPLING, True).routed_experts
        assert torch.equal(completion.routed_experts.long(), native.long())
        assert completion.routed_experts.shape == (len(prompt) + len(ids) - 1, 2, 2)


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_seeds_and_scores(engine, dialect):
    with EngineServer(dialect, engine) as server:
        client = server.client(try_timeout=20)
        seeded = Sampling(max_tokens=6, temperature=0.7, seed=3)
        twice = [[c.token_ids for c in client.generate([PROMPTS[0]] * 3, seeded)] for _ in range(2)]
        assert twice[0] == twice[1]
        assert len({tuple(ids) for ids in twice[0]}) == 3
        assert client.score(PROMPTS[1]) == pytest.approx(engine.score(PROMPTS[1]), abs=1e-5)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_tried_again(engine, dialect, fault):
    with EngineServer(dialect, engine, [fault]) as server:
        client = server.client()
        (completion,) = client.generate(PROMPTS[:1], SAMPLING, want_routes=True)
    assert client.retried == 1
    assert len(completion.logprobs) == len(completion.token_ids)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_is_an_error_in_good_time(engine, dialect, fault):
    with EngineServer(dialect, engine, [fault], forever=True) as server:
        started = time.monotonic()
        with pytest.raises(EngineError, match=f"failed /.*generate 3 times, the last time with: .*({FAULTS[fault]})"):
            server.client().generate(PROMPTS, SAMPLING, want_routes=True)
        assert time.monotonic() - started < 30  # three tries of 0.5 s, on a machine that may be busy


def test_what_is_refused_is_not_tried_again(engine):
    with EngineServer("vllm", engine, ["400"]) as server:
        client = server.client()
        with pytest.raises(EngineError, match=r"refused /inference/v1/generate: status 400: .*injected"):
            client.generate(PROMPTS[:1], SAMPLING)
    assert client.retried == 0


def test_the_deadline_is_for_the_whole_call(engine):
    with EngineServer("sglang", engine, ["hang"], forever=True) as server:
        started = time.monotonic()
        with pytest.raises(EngineError, match=r"within the deadline of 0\.7 s"):
            server.client(deadline=0.7, try_timeout=60).generate(PROMPTS, SAMPLING)
        assert time.monotonic() - started < 3


def test_nobody_listens():
    with pytest.raises(EngineError, match="failed /resume 2 times, the last time with: ConnectError"):
        VllmEngine("http://127.0.0.1:9", retries=1, backoff=0.01).resume()


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_samples_of_older_weights_are_refused(engine, dialect):
    with EngineServer(dialect, engine, ["late", "late"]) as server:
        client = server.client()
        client._sent_version = engine._version = "7"
        (completion,) = client.generate(PROMPTS[:1], SAMPLING)
        assert client.retried == 2
        assert completion.versions[0][2] == "7"
        server.faults, server.forever = ["late"], True
        with pytest.raises(EngineError, match="weights an older one sampled, and 7 were sent last"):
            client.generate(PROMPTS[:1], SAMPLING)
    engine._version = None


def test_control(engine):
    expected = {
        "vllm": ["/pause?mode=abort", "/abort_requests", "/resume"],
        "sglang": ["/pause_generation", "/abort_request", "/continue_generation"],
        "lmdeploy": ["/abort_request", "/abort_request"],
    }
    for dialect, calls in expected.items():
        with EngineServer(dialect, engine) as server:
            client = server.client()
            client.pause()
            client.abort()
            client.resume()
        assert server.calls == calls


def test_what_an_engine_cannot_do_says_so(engine):
    with EngineServer("lmdeploy", engine) as server:
        client = server.client()
        if not torch.cuda.is_available():
            with pytest.raises(EngineError, match="needs a CUDA GPU on LMDeploy's node; there is none"):
                client.begin_update()
            assert server.calls == []
        with pytest.raises(EngineError, match="does not score given tokens"):
            client.score([1, 2])
        with pytest.raises(EngineError, match="takes no seed"):
            client.generate(PROMPTS, Sampling(max_tokens=1, seed=0))
    with EngineServer("sglang", engine) as server, pytest.raises(EngineError, match="give SglangEngine num_layers"):
        server.client(num_layers=None).generate(PROMPTS, SAMPLING, want_routes=True)
    with EngineServer("sglang", engine) as server, pytest.raises(EngineError, match="VLLM_SERVER_DEV_MODE=1"):
        VllmEngine(server.url).pause()


def test_the_local_engine_pauses(engine):
    engine.pause()
    with pytest.raises(EngineError, match="paused"):
        engine.generate(PROMPTS, SAMPLING)
    engine.resume()
    first, second = (engine.generate(PROMPTS, Sampling(max_tokens=6, seed=1)) for _ in range(2))
    assert [c.token_ids for c in first] == [c.token_ids for c in second]


@pytest.fixture
def norms(tmp_path, engine):
    """Files of a layer of two ranks."""
    names = ["model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"]
    files = [tmp_path / f"{rank}.safetensors" for rank in range(2)]
    for name, file in zip(names, files, strict=True):
        save_file({name: torch.full((engine.model.config.hidden_size,), 3.0)}, file)
    yield dict(zip(names, files, strict=True))
    with torch.no_grad():
        for name in names:
            engine.model.get_parameter(name).fill_(1.0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_lmdeploy_opens_handles_while_its_cache_is_gone(engine, norms, ranks, monkeypatch):
    memory = SharedMemory(monkeypatch)
    with EngineServer("lmdeploy", engine, ranks=ranks) as server:
        client = server.client(tensor_parallel=ranks)
        client.begin_update()
        client.load(list(norms.values()))
        client.end_update("7", norms.popitem()[1].parent)
        assert server.calls == [
            *("/sleep?level=1", "/wakeup?tags=weights"),
            *("/update_weights", "/update_weights"),  # one for each file: no more than a rank's part of a layer at once
            *("/update_weights", "/wakeup?tags=kv_cache"),
        ]
        assert memory.readers == [[rank] for rank in range(ranks)] * 2
        assert len(memory.tensors) == 0
        assert client.version() == "7"
        (completion,) = client.generate(PROMPTS[:1], SAMPLING)  # it is awake
    for name in norms:
        assert engine.model.get_parameter(name).unique().tolist() == [3.0]
    assert completion.logprobs == pytest.approx(scores(engine, PROMPTS[0], completion.token_ids), abs=1e-5)


@pytest.mark.parametrize("fault", ["500", "429", "hang", "cut"])
def test_an_update_of_lmdeploy_is_tried_again(engine, norms, fault, monkeypatch):
    SharedMemory(monkeypatch)
    with EngineServer("lmdeploy", engine, [fault], faulty="/update_weights") as server:
        client = server.client()
        client.begin_update()
        client.load(list(norms.values()))
        client.end_update("1", Path())
    assert client.retried == 1
    for name in norms:
        assert engine.model.get_parameter(name).unique().tolist() == [3.0]


def test_an_update_that_lmdeploy_refuses_says_what_it_needs(engine, norms, monkeypatch):
    """As one does that runs on another node, or with other ranks than the client was told of."""
    SharedMemory(monkeypatch)
    needs = r"on this node with --distributed-executor-backend ray, .*--tp 1 \(`tensor_parallel`\)"
    with EngineServer("lmdeploy", engine, ["500"], forever=True, faulty="/update_weights") as server:
        client = server.client()
        client.begin_update()
        with pytest.raises(EngineError, match=f"failed /update_weights 3 times, .*status 500.*{needs}"):
            client.load(list(norms.values()))
        with pytest.raises(EngineError, match=r"failed /generate 3 times, .*sleeping"):
            client.generate(PROMPTS, SAMPLING)
    with EngineServer("lmdeploy", engine, ranks=2) as server:
        client = server.client()
        client.begin_update()
        with pytest.raises(EngineError, match=f"list index out of range.*{needs}"):
            client.load(list(norms.values()))
    with EngineServer("lmdeploy", engine, ["hang"], forever=True, faulty="/update_weights") as server:
        client = server.client(deadline=0.7, try_timeout=60)
        client.begin_update()
        with pytest.raises(EngineError, match=rf"1 request\(s\) to /update_weights within the deadline.*{needs}"):
            client.load(list(norms.values()))
    with (
        EngineServer("lmdeploy", engine, ["400"], faulty="/sleep") as server,
        pytest.raises(EngineError, match="refused /sleep"),
    ):
        server.client().begin_update()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA IPC needs a GPU")
def test_another_process_opens_a_handle():
    """What LMDeploy's ranks do, in a process of its own on the same GPU."""
    tensor = torch.arange(12, device="cuda", dtype=torch.bfloat16).view(3, 4)
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        assert pool.apply(sum_of_opened, (serialized_handles({"a": tensor, "b": tensor[1:]}),)) == {
            "a": 66.0,
            "b": 60.0,
        }
