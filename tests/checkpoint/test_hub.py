"""Pushing to the Hub and loading by name, through huggingface_hub's client and over HTTP."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load as parse_safetensors
from safetensors.torch import load_file

from tests.checkpoint.test_hub_config import PUBLISHED_KIMI
from tests.families import tokens
from tests.hub_server import HubServer
from tests.ranks import REPO, run_on_ranks
from tests.tiny import build
from xtuner_hf import Qwen3MoeForCausalLM
from xtuner_hf.models.auto import causal_lm_class
from xtuner_hf.models.kimi_k2.configuration import KimiK2Config

WEIGHTS = "model.safetensors"
REMOTE_CODE = REPO / "tests" / "checkpoint" / "remote_code"


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[HubServer]:
    with HubServer(part_size=200_000) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", server.token)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield server
        assert not server.unknown, "the client asked for what this server does not speak"


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def card_of(files: dict[str, bytes]) -> ModelCard:
    return ModelCard(files["README.md"].decode())


def test_a_push_uploads_what_is_saved_and_a_name_loads_it(hub, tmp_path):
    result = run_on_ranks("tests.checkpoint.runs:push_and_load", 1, folder=str(tmp_path))[0]
    uploaded = hub.files("me/tiny-qwen3-moe")
    assert card_of(uploaded).data.library_name == "transformers"
    del uploaded["README.md"]
    assert uploaded == read_folder(tmp_path / "saved")
    assert "rope_theta" in json.loads(uploaded["config.json"])
    assert hub.titles("me/tiny-qwen3-moe") == ["the first one"]
    assert hub.answered("PUT", "/lfs/.*/2$"), "large files go up in parts"

    # save_pretrained(push_to_hub=True): the final config.json is what goes up
    in_shards = hub.files("me/in-shards")
    assert in_shards == read_folder(tmp_path / "pushed")
    assert "model.safetensors.index.json" in in_shards
    assert "num_experts" in json.loads(in_shards["config.json"])

    assert result["classes"] == {Qwen3MoeForCausalLM}
    assert result["loaded_from"] == "me/tiny-qwen3-moe"
    original, *others = result["states"]
    for state in others:
        assert state.keys() == original.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in original.items())
    assert result["stock_class"].__module__.startswith("transformers.")
    assert result["logit_difference"] < 1e-5


def publish_kimi(folder: Path) -> dict[str, bytes]:
    """A tiny Kimi K2 as it lies on the Hub, with its own code; returns the files beside the weights."""
    rope = PUBLISHED_KIMI["rope_scaling"] | {"original_max_position_embeddings": 16}
    published = PUBLISHED_KIMI | {"initializer_range": 0.2, "rope_scaling": rope, "pad_token_id": 0}
    config = KimiK2Config(**{key: value for key, value in published.items() if key != "model_type"})
    build(causal_lm_class(config), config, dtype=torch.bfloat16).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(published, indent=4))  # the Hub's own indentation
    generation = {"eos_token_id": [1, 5], "max_length": 131072, "do_sample": True, "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=4))
    for path in REMOTE_CODE.glob("*.py"):
        shutil.copy(path, folder)
    for name in ("LICENSE", "tiktoken.model", "tokenization_kimi.py", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes(b"from the Hub \r\n\xff " + name.encode())
    (folder / "README.md").write_text("# What is said of the published weights")
    (folder / "figures").mkdir()
    (folder / "figures" / "banner.png").write_bytes(b"large")
    return {name: data for name, data in read_folder(folder).items() if not name.endswith(".safetensors")}


def test_what_lies_beside_the_weights_of_a_name_goes_out_as_it_came_in(hub, tmp_path, monkeypatch):
    """Kimi K2: nobody but the repository's own code reads it in plain transformers, before and after."""
    files = publish_kimi(tmp_path / "kimi")
    arguments = {"folder": str(tmp_path / "kimi"), "name": "me/kimi"}
    (ours,) = run_on_ranks("tests.checkpoint.runs:load_published_and_save", 1, **arguments)
    assert ours["loaded_from"] == "me/kimi"
    assert ours["files"] == files.keys() | {WEIGHTS}, "and nothing of the folders below"
    saved = read_folder(tmp_path / "kimi-saved")
    assert saved.keys() == (files.keys() | {WEIGHTS}) - {"README.md"}
    for name, data in files.items():
        assert name == "README.md" or saved[name] == data, name
    before, after = load_file(tmp_path / "kimi" / WEIGHTS), parse_safetensors(saved[WEIGHTS])
    assert before.keys() == after.keys()
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == ["model.norm.weight"]

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    arguments = {"folder": str(tmp_path / "kimi-saved"), "input_ids": tokens()}
    (theirs,) = run_on_ranks("tests.checkpoint.remote:logits", 1, **arguments)
    assert not theirs["knows us"]
    assert "contains custom code" in theirs["refusal"]
    assert theirs["class"].endswith("modeling_deepseek.DeepseekV3ForCausalLM")
    assert theirs["info"] == {"missing_keys": set(), "unexpected_keys": set()}
    assert (theirs["logits"] - ours["logits"]).abs().max() < 1e-4


def test_a_server_that_does_not_play_along(hub):
    hub.fail("PUT", "/lfs/", 500)
    hub.fail("POST", "/objects/batch", 503)
    hub.fail("HEAD", "/me/retried/resolve/v2/config.json", 500)
    hub.fail("HEAD", "/me/forbidden/", 403, times=100)
    hub.fail("GET", "/me/forbidden", 403, times=100)
    errors = run_on_ranks("tests.checkpoint.runs:meet_faults", 1)[0]
    assert hub.answered("PUT", "/lfs/").count(500) == 1
    assert hub.answered("POST", "/objects/batch") == [503, 200]
    assert hub.answered("HEAD", "/me/retried/resolve/v2/config.json") == [500, 404]
    assert hub.titles("me/retried")[0] == "Upload Qwen3MoeForCausalLM"
    assert "me/refused" not in hub.repositories
    for what in ("no token", "wrong token"):
        assert "401" in errors[what], errors[what]
    assert "me/nothing is not a local folder and is not a valid model identifier" in errors["no such model"]
    assert "v2 is not a valid git identifier" in errors["no such revision"]
    assert errors["forbidden"].startswith("OSError")
    assert "connect to" in errors["forbidden"]
    assert "does not appear to have a file named model-00002-of-" in errors["missing shard"]


def test_a_run_pushes_its_end(hub, tmp_path):
    run_on_ranks("tests.checkpoint.runs:train_and_push", 1, folder=str(tmp_path), kind="MoETrainer", model="moe")
    files = hub.files("me/MoETrainer")
    assert files == read_folder(tmp_path / "run")
    assert {"README.md", "config.json", "generation_config.json", WEIGHTS, "tokenizer.json"} <= files.keys()
    assert hub.titles("me/MoETrainer")[-1] == "End of training"

    # bf16=True trains fp32 weights: checkpoints go on with those, and the Hub gets bf16, but for the routers' biases.
    kept = load_file(tmp_path / "run" / "checkpoint-2" / WEIGHTS)
    exported = parse_safetensors(files[WEIGHTS])
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    for name, tensor in exported.items():
        is_bias = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if is_bias else torch.bfloat16), name
        assert torch.equal(tensor, kept[name].to(tensor.dtype)), name
    assert json.loads(files["config.json"])["torch_dtype"] == "bfloat16"

    card = card_of(files)
    assert card.data.library_name == "transformers"
    assert card.data.base_model is None
    assert card.data.datasets is None
    assert "a model trained from random weights." in card.text
    assert "`MoETrainer` of xtuner_hf" in card.text
    assert "`transformers.Trainer`" in card.text
    assert "learning_rate: 0.01" in card.text
    assert "fine-tuned" not in card.text


def test_two_ranks_push_one_model(hub, tmp_path):
    run_on_ranks("tests.checkpoint.runs:train_and_push", 1, folder=str(tmp_path), kind="MoETrainer", model="moe")
    run_on_ranks(
        "tests.checkpoint.runs:train_and_push",
        2,
        folder=str(tmp_path / "sft"),
        kind="MoESFTTrainer",
        model="me/MoETrainer",
        ep_size=2,
    )
    files = hub.files("me/MoESFTTrainer")
    assert files == read_folder(tmp_path / "sft" / "run")
    assert hub.titles("me/MoESFTTrainer").count("End of training") == 1

    card = card_of(files)
    assert card.data.base_model == "me/MoETrainer"
    assert "a fine-tuned version of [me/MoETrainer](https://huggingface.co/me/MoETrainer)." in card.text
    assert "`MoESFTTrainer` of xtuner_hf" in card.text
    assert 'model="me/MoESFTTrainer"' in card.text
    assert {"trl", "sft", "xtuner_hf"} <= set(card.data.tags)

    # model.push_to_hub() on both ranks: one commit, with the weights
    assert hub.titles("me/alone") == ["Upload Qwen3MoeForCausalLM"] * 2  # one of each run
    alone = parse_safetensors(hub.files("me/alone")[WEIGHTS])
    exported = parse_safetensors(files[WEIGHTS])
    assert alone.keys() == exported.keys()
    assert all(torch.equal(tensor.to(exported[name].dtype), exported[name]) for name, tensor in alone.items())
