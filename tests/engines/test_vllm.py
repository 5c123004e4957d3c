"""A checkpoint that we trained, served by a real vLLM on the CPU: the same greedy tokens as stock transformers."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.ranks import REPO, run_on_ranks
from xtuner_hf import AutoModelForCausalLM

PYTHON = REPO / ".venv-engine" / "bin" / "python"
PROMPTS = [[5, 6, 7], [100, 200, 300, 400, 33], [9] * 10]
NEW_TOKENS = 24


def logprobs(model, prompt: list[int], new: list[int]) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + new]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(new)[:, None])[:, 0].tolist()


def greedy_of_transformers(folder: Path) -> dict:
    """The answer that vllm_greedy.py should give, from the stock class in fp32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(model).__module__.startswith("transformers.")
    model.generation_config.eos_token_id = None
    tokens = [
        model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]
    return {"tokens": tokens, "logprobs": [logprobs(model, *pair) for pair in zip(PROMPTS, tokens, strict=True)]}


def greedy_of_vllm(folder: Path, scratch: Path) -> dict:
    request, answer = scratch / "request.json", scratch / "answer.json"
    request.write_text(json.dumps({"model": str(folder), "prompts": PROMPTS, "max_tokens": NEW_TOKENS}))
    env = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [str(PYTHON), str(REPO / "tests" / "engines" / "vllm_greedy.py"), str(request), str(answer)]
    done = subprocess.run(command, env=env, cwd=scratch, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return json.loads(answer.read_text())


@pytest.mark.engine
def test_vllm_generates_what_transformers_does(tmp_path):
    if not PYTHON.exists():
        pytest.fail(f"There is no vLLM in {PYTHON.parent.parent}: run `make engine` to install it (a few minutes).")
    run_on_ranks("tests.checkpoint.runs:train_for_engine", 2, folder=str(tmp_path))
    start = load_file(tmp_path / "start" / "model.safetensors")
    trained = load_file(tmp_path / "trained" / "model.safetensors")
    assert start.keys() == trained.keys()
    assert not any(torch.equal(trained[name], tensor) for name, tensor in start.items() if "experts" in name)

    expected = greedy_of_transformers(tmp_path / "trained")
    found = greedy_of_vllm(tmp_path / "trained", tmp_path)
    assert found["tokens"] == expected["tokens"]
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "trained").eval()
    trained_for = [logprobs(ours, *pair) for pair in zip(PROMPTS, found["tokens"], strict=True)]
    for reference in (expected["logprobs"], trained_for):
        assert (torch.tensor(found["logprobs"]) - torch.tensor(reference)).abs().max() < 1e-4
    assert greedy_of_transformers(tmp_path / "start")["tokens"] != expected["tokens"]
