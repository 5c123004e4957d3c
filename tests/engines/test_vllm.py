"""Checkpoints of every family, served by a real vLLM on the CPU: the same greedy tokens as stock transformers."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.families import FAMILIES
from tests.ranks import REPO, run_on_ranks
from tests.tiny import build, dense_config
from xtuner_hf import AutoModelForCausalLM, Qwen3ForCausalLM

pytestmark = pytest.mark.engine

PYTHON = REPO / ".venv-engine" / "bin" / "python"
# The last one and what it generates are longer than the windows and than the context that YaRN extends.
PROMPTS = [[5, 6, 7], [100, 200, 300, 400, 33], [9] * 10 + [5, 7, 22] * 6]
NEW_TOKENS = 24

# Sizes that CPU engines take: head sizes of 64, everything else a multiple of 16.
SIZES = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 128}
MLA_SIZES = {"qk_nope_head_dim": 48, "qk_rope_head_dim": 16, "v_head_dim": 32, "q_lora_rank": 32, "kv_lora_rank": 64}
CHANGES = {
    # vLLM's experts clamp at 7, as published, whatever `swiglu_limit` says.
    "gpt_oss": {"head_dim": 64, "sliding_window": 16, "swiglu_limit": 7.0},
    # Its multi-token prediction layer is in the checkpoint too.
    "deepseek_v3": {**MLA_SIZES, "moe_intermediate_size": 64, "num_nextn_predict_layers": 1},
    "kimi_k2": {**MLA_SIZES, "moe_intermediate_size": 64},
    "glm4_moe": {"head_dim": 64, "moe_intermediate_size": 64},
}
STOCK_CLASSES = {name: FAMILIES[name].stock_class for name in CHANGES} | {
    "qwen3": transformers.Qwen3ForCausalLM,
    "qwen3_moe_trained": transformers.Qwen3MoeForCausalLM,
}


def save_checkpoints(folder: Path) -> None:
    for name, changes in CHANGES.items():
        init = {"mtp_loss_coef": 0} if changes.get("num_nextn_predict_layers") else {}
        FAMILIES[name].ours(init=init, **SIZES, **changes).save_pretrained(folder / name)
    build(Qwen3ForCausalLM, dense_config(**SIZES, head_dim=64)).save_pretrained(folder / "qwen3")
    run_on_ranks("tests.checkpoint.runs:train_for_engine", 2, folder=str(folder / "runs"))
    (folder / "runs" / "trained").rename(folder / "qwen3_moe_trained")


def engine_environment() -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_MLA_DISABLE": "1",  # its MLA kernel for CPUs has no fp32
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def greedy_of_vllm(models: dict[str, str], scratch: Path) -> dict:
    request, answer = scratch / "request.json", scratch / "answer.json"
    request.write_text(json.dumps({"models": models, "prompts": PROMPTS, "max_tokens": NEW_TOKENS}))
    command = [str(PYTHON), str(REPO / "tests" / "engines" / "vllm_greedy.py"), str(request), str(answer)]
    done = subprocess.run(command, env=engine_environment(), cwd=scratch, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return json.loads(answer.read_text())


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> tuple[Path, dict]:
    """The checkpoints, and what vLLM says with each."""
    if not PYTHON.exists():
        pytest.fail(f"There is no vLLM in {PYTHON.parent.parent}: run `make engine` to install it (a few minutes).")
    folder = tmp_path_factory.mktemp("checkpoints")
    save_checkpoints(folder)
    return folder, greedy_of_vllm({name: str(folder / name) for name in STOCK_CLASSES}, folder)


def logprobs(model, prompt: list[int], new: list[int]) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + new]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(new)[:, None])[:, 0].tolist()


def greedy(model, prompt: list[int]) -> list[int]:
    model.generation_config.eos_token_id = None
    new = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
    return new[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", STOCK_CLASSES)
def test_vllm_generates_what_transformers_does(name, served):
    """Tokens of the stock class in fp32; log-probabilities of the stock class and of ours."""
    folder, answers = served
    stock = STOCK_CLASSES[name].from_pretrained(folder / name, dtype=torch.float32).eval()
    ours = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
    assert type(stock).__module__.startswith("transformers.")
    found = answers[name]
    assert found["tokens"] == [greedy(stock, prompt) for prompt in PROMPTS]
    for model in (stock, ours):
        expected = [logprobs(model, *pair) for pair in zip(PROMPTS, found["tokens"], strict=True)]
        assert (torch.tensor(found["logprobs"]) - torch.tensor(expected)).abs().max() < 1e-4


def test_training_changed_what_is_generated(served):
    folder, answers = served
    start, trained = (
        load_file(path / "model.safetensors") for path in (folder / "runs" / "start", folder / "qwen3_moe_trained")
    )
    assert start.keys() == trained.keys()
    assert not any(torch.equal(trained[name], tensor) for name, tensor in start.items() if "experts" in name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "runs" / "start", dtype=torch.float32).eval()
    assert [greedy(model, prompt) for prompt in PROMPTS] != answers["qwen3_moe_trained"]["tokens"]
