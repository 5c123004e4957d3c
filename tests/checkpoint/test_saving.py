"""What lies on disk after a run: the same bytes as a single process saves, in the Hub's layout and dialect."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.checkpoint.runs import models, tiny_tokenizer
from tests.ranks import run_on_ranks
from tests.tiny import build, moe_config
from xtuner_hf import MoETrainingArguments, Qwen3MoeForCausalLM

# config.json of Qwen/Qwen3-30B-A3B with other sizes: all the keys that the Hub holds, and no other.
PUBLISHED_CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 3,
    "decoder_sparse_step": 1,
    "eos_token_id": 1,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "max_window_layers": 2,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 128,
}
PUBLISHED_GENERATION_CONFIG = {
    "bos_token_id": 3,
    "do_sample": True,
    "eos_token_id": [1, 3],
    "pad_token_id": 0,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "transformers_version": "4.51.0",
}


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def assert_same_tensors(found: Path, expected: Path) -> None:
    a, b = load_file(found / "model.safetensors"), load_file(expected / "model.safetensors")
    assert a.keys() == b.keys()
    different = [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]
    assert not different


def save_alone(model: str, state: dict, folder: Path, export_dtype: torch.dtype | None = None) -> Path:
    """The same weights, saved by a single process that never sharded them."""
    alone = models()[model]()
    alone.load_state_dict(state)
    alone.export_dtype = export_dtype
    alone.save_pretrained(folder)
    return folder


RUNS = {
    "fsdp": {"kind": "MoETrainer", "model": "moe"},
    "ep, SFT": {"kind": "MoESFTTrainer", "model": "moe", "ep_size": 2},
    "tied": {"kind": "MoETrainer", "model": "tied"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    """Runs on two ranks, one of them from a published checkpoint: their folders, and what they trained."""
    folder = tmp_path_factory.mktemp("trained")
    source = folder / "published"
    config = transformers.Qwen3MoeConfig(**PUBLISHED_CONFIG)
    build(transformers.Qwen3MoeForCausalLM, config, dtype=torch.bfloat16).save_pretrained(source)
    (source / "config.json").write_text(json.dumps(PUBLISHED_CONFIG))
    (source / "generation_config.json").write_text(json.dumps(PUBLISHED_GENERATION_CONFIG))
    runs = RUNS | {"from published": {"kind": "MoESFTTrainer", "model": str(source)}}
    return folder, run_on_ranks("tests.checkpoint.runs:train_and_save", 2, folder=str(folder), runs=runs)[0]


@pytest.mark.parametrize("run", RUNS)
def test_a_sharded_run_saves_what_one_process_would(run, trained, tmp_path):
    model, saved, state = RUNS[run]["model"], trained[0] / run, trained[1][run]
    alone = save_alone(model, state, tmp_path / "alone")
    assert_same_tensors(saved, alone)
    assert_same_tensors(saved / "checkpoint-2", alone)
    assert_same_tensors(saved / "bf16", save_alone(model, state, tmp_path / "alone_bf16", torch.bfloat16))
    assert read(saved / "bf16" / "config.json")["torch_dtype"] == "bfloat16"
    for folder in (saved, saved / "checkpoint-2"):
        assert read(folder / "config.json") == read(alone / "config.json")
        assert (folder / "generation_config.json").exists()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    for folder in (saved, saved / "bf16"):
        assert ("lm_head.weight" in load_file(folder / "model.safetensors")) == (model != "tied")

    # The trained weights are not those of the start, and stock transformers computes the same with them.
    start = models()[model]()
    assert any(not torch.equal(tensor, state[name]) for name, tensor in start.state_dict().items())
    start.load_state_dict(state)
    stock = transformers.AutoModelForCausalLM.from_pretrained(saved)
    assert type(stock).__module__.startswith("transformers.")
    tokens = torch.randint(2, 128, (2, 15), generator=torch.Generator().manual_seed(2))
    if model == "moe":  # stock classes have no correction bias: compare routing without it
        for layer in (0, 2):
            start.model.layers[layer].mlp.gate.e_score_correction_bias.zero_()
    assert (stock(tokens).logits - start.eval()(tokens).logits).abs().max() < 1e-5


def test_a_trained_checkpoint_s_config_is_the_one_that_it_came_from(trained):
    source, saved = trained[0] / "published", trained[0] / "from published"
    tokenizer = {"pad_token_id": 0}  # transformers' trainer writes the tokenizer's into both files
    assert read(saved / "bf16" / "config.json") == PUBLISHED_CONFIG | tokenizer
    # fp32 master weights, said so
    assert read(saved / "config.json")["torch_dtype"] == "float32"
    found = read(saved / "bf16" / "generation_config.json")
    assert found == PUBLISHED_GENERATION_CONFIG | tokenizer
    published, exported = (load_file(path / "model.safetensors") for path in (source, saved / "bf16"))
    assert {name: t.dtype for name, t in exported.items()} == {name: t.dtype for name, t in published.items()}


def test_export_dtype_is_checked_and_follows_the_run():
    assert MoETrainingArguments(use_cpu=True, bf16=True).exported_dtype == torch.bfloat16
    assert MoETrainingArguments(use_cpu=True, bf16=False).exported_dtype is None
    assert MoETrainingArguments(use_cpu=True, bf16=True, export_dtype="float32").exported_dtype == torch.float32
    with pytest.raises(ValueError, match=r"export_dtype is 'bf16'; choose one of auto, float32, bfloat16, float16\."):
        MoETrainingArguments(export_dtype="bf16")


def test_names_of_transformers_own_are_not_pushed(tmp_path):
    model = build(Qwen3MoeForCausalLM, moe_config())
    with pytest.raises(ValueError, match="which no engine reads"):
        model.save_pretrained(tmp_path, distributed_checkpoint=True, push_to_hub=True)


def test_what_one_rank_misses_all_ranks_raise(tmp_path):
    good = tmp_path / "good"
    build(Qwen3MoeForCausalLM, moe_config()).save_pretrained(good)
    name = "model.layers.2.mlp.experts.5.down_proj.weight"
    breaks = {
        "one expert": lambda tensors: tensors.pop(name),
        "a part of one expert": lambda tensors: tensors.pop("model.layers.0.mlp.experts.7.gate_proj.weight"),
        "other shape": lambda tensors: tensors.update({name: tensors[name][:32].contiguous()}),
        "dense": lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.weight"),
    }
    for what, spoil in breaks.items():
        tensors = load_file(good / "model.safetensors")
        spoil(tensors)
        (tmp_path / what).mkdir()
        (tmp_path / what / "config.json").write_text((good / "config.json").read_text())
        save_file(tensors, tmp_path / what / "model.safetensors", metadata={"format": "pt"})
    outcomes = run_on_ranks(
        "tests.checkpoint.runs:load_sharded",
        2,
        timeout=90,
        good=str(good),
        broken=[str(tmp_path / what) for what in breaks],
        target=str(tmp_path),
    )
    for rank, errors in enumerate(outcomes):
        one, part, shape, dense = (errors[index : index + 2] for index in range(0, 8, 2))  # for ep_size 1 and 2 each
        assert all(error.startswith("IncompleteCheckpointError") for error in one + dense)
        assert all("experts.down_proj (3, 64, 48) instead of (4, 64, 48)" in error for error in one)
        assert all("model.layers.0.self_attn.q_proj.weight" in error for error in dense)
        assert all(error.startswith("RuntimeError") for error in part + shape)  # transformers' own: cannot be joined
        assert all(("on rank 1: " in error) == (rank == 0) for error in one + part + shape)
    for ep_size in (1, 2):
        assert_same_tensors(tmp_path / f"ep{ep_size}", good)
        assert read(tmp_path / f"ep{ep_size}" / "config.json") == read(good / "config.json")
