"""`config.json`, generation config, tokenizer and remote code: out as they came in."""

import json

import pytest
import torch
from transformers import DeepseekV3Config, GenerationConfig

from tests.checkpoint.families import deepseek_config
from tests.checkpoint.official import DEEPSEEK_YARN, FP8_CONFIG
from xtuner_hf.checkpoint.hub_config import to_hub_dialect
from xtuner_hf.checkpoint.hub_source import quantization_config_of
from xtuner_hf.checkpoint.side_files import (
    copy_side_files,
    without_quantisation,
    write_config_like,
    write_generation_config_like,
)

# In the words, order and indentation of a published file, with entries that transformers does not know.
PUBLISHED = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_size": 256,
    "max_position_embeddings": 64,
    "model_type": "deepseek_v3",
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 1,
    "quantization_config": FP8_CONFIG,
    "rope_scaling": DEEPSEEK_YARN,
    "rope_theta": 10000,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "vocab_size": 64,
}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PUBLISHED, indent=4))
    return folder


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


def loaded_config(source, dtype: str = "bfloat16") -> DeepseekV3Config:
    """As a model has it after loading and training: with what those set."""
    config = DeepseekV3Config.from_pretrained(source)
    del config.quantization_config
    config.use_cache = False
    config.dtype = dtype
    config.architectures = ["Other"]
    return config


def test_unchanged_config_keeps_its_bytes(source, target):
    write_config_like(source, target, loaded_config(source, dtype="float32"), quantised=True)
    assert (target / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_bf16_export_loses_the_quantization_config_alone(source, target):
    write_config_like(source, target, loaded_config(source), quantised=False)
    written = json.loads((target / "config.json").read_text())
    assert written == {key: value for key, value in PUBLISHED.items() if key != "quantization_config"}
    assert list(written) == [key for key in PUBLISHED if key != "quantization_config"]


def test_the_dtype_is_that_of_the_weights(source, target):
    write_config_like(source, target, loaded_config(source, dtype="float32"), quantised=False)
    written = json.loads((target / "config.json").read_text())
    assert written == {k: v for k, v in PUBLISHED.items() if k != "quantization_config"} | {"torch_dtype": "float32"}


def test_the_dtype_of_an_export_is_not_the_models(source, target):
    config = loaded_config(source, dtype="float32")
    write_config_like(source, target, config, quantised=False, dtype=torch.float16)
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == "float16"
    assert config.to_dict()["dtype"] == "float32"


def test_what_changed_changes(source, target):
    config = loaded_config(source)
    config.vocab_size = 72
    config.rope_parameters["factor"] = 80.0
    config.router_bias_update_rate = 0.01
    write_config_like(source, target, config, quantised=True)
    written = json.loads((target / "config.json").read_text())
    expected = PUBLISHED | {"vocab_size": 72, "router_bias_update_rate": 0.01}
    expected["rope_scaling"] = PUBLISHED["rope_scaling"] | {"factor": 80.0}
    assert written == expected


def test_a_config_that_transformers_5_wrote_is_put_in_the_words_of_the_hub(source, target):
    config = deepseek_config(dtype="bfloat16")
    config.save_pretrained(source)
    before = json.loads((source / "config.json").read_text())
    assert {"rope_parameters", "dtype"} <= before.keys()
    config.vocab_size = 72
    write_config_like(source, target, config, quantised=False)
    after = json.loads((target / "config.json").read_text())
    assert after == to_hub_dialect(before) | {"vocab_size": 72}


def test_generation_config(source, target):
    text = '{"bos_token_id": 0, "eos_token_id": [1, 2], "temperature": 0.6, "transformers_version": "4.39.3"}\n'
    (source / "generation_config.json").write_text(text)
    config = GenerationConfig.from_pretrained(source)
    write_generation_config_like(source, target, config)
    assert (target / "generation_config.json").read_text() == text
    config.eos_token_id = 5
    write_generation_config_like(source, target, config)
    assert json.loads((target / "generation_config.json").read_text()) == json.loads(text) | {"eos_token_id": 5}


def test_other_files(source, target):
    carried = ["LICENSE", "chat_template.jinja", "modeling_deepseek.py", "tiktoken.model", "tokenizer.json"]
    for name in [
        *carried,
        "README.md",
        ".gitattributes",
        "model.safetensors.index.json",
        "a.safetensors",
        "b.bin",
        "trainer_state.json",
    ]:
        (source / name).write_bytes(b"from the source \r\n\xff")
    (source / "original").mkdir()
    (target / "tokenizer.json").write_text("trained with another template")
    assert copy_side_files(source, target) == [name for name in carried if name != "tokenizer.json"]
    assert (target / "tiktoken.model").read_bytes() == b"from the source \r\n\xff"
    assert (target / "tokenizer.json").read_text() == "trained with another template"
    assert sorted(path.name for path in target.iterdir()) == carried


def test_a_quantised_text_model_inside_another():
    config = {"text_config": {"hidden_size": 8, "quantization_config": FP8_CONFIG}, "model_type": "internvl"}
    assert quantization_config_of(config) == FP8_CONFIG
    assert without_quantisation(config) == {"text_config": {"hidden_size": 8}, "model_type": "internvl"}
