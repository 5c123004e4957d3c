"""`config.json` of published checkpoints comes back as it was after transformers 5 has read and written it."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig
from transformers import __version__ as transformers_version

from tests.checkpoint.test_saving import PUBLISHED_CONFIG
from xtuner_hf.checkpoint.hub_config import to_hub_dialect, write_hub_config

MOE_KEYS = (
    "decoder_sparse_step",
    "mlp_only_layers",
    "moe_intermediate_size",
    "norm_topk_prob",
    "num_experts",
    "num_experts_per_tok",
    "output_router_logits",
    "router_aux_loss_coef",
)
# config.json of Qwen/Qwen3-8B with other sizes: the same keys but for the experts'.
PUBLISHED_DENSE_CONFIG = {key: value for key, value in PUBLISHED_CONFIG.items() if key not in MOE_KEYS} | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    "published",
    [
        pytest.param(PUBLISHED_CONFIG, id="MoE"),
        pytest.param(PUBLISHED_CONFIG | {"rope_scaling": YARN}, id="yarn"),
        pytest.param(PUBLISHED_CONFIG | {"pad_token_id": 0}, id="pad token"),
        pytest.param(PUBLISHED_DENSE_CONFIG, id="dense"),
        pytest.param(PUBLISHED_DENSE_CONFIG | {"tie_word_embeddings": True}, id="tied"),
        pytest.param(
            PUBLISHED_DENSE_CONFIG | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
            id="sliding window",
        ),
    ],
)
def test_a_published_config_comes_back(published, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(published))
    config = AutoConfig.from_pretrained(tmp_path)
    config.use_cache = False  # as transformers' Trainer leaves it
    config.save_pretrained(tmp_path)
    write_hub_config(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    assert found == published | {"transformers_version": transformers_version}
    again = AutoConfig.from_pretrained(tmp_path)
    config.use_cache = True
    assert again.to_dict() == config.to_dict()


def test_layer_types_that_do_not_follow_from_the_other_keys_stay():
    config = {"model_type": "qwen3", "num_hidden_layers": 2, "max_window_layers": 2, "sliding_window": 64}
    kinds = ["sliding_attention", "full_attention"]
    assert to_hub_dialect(config | {"layer_types": kinds})["layer_types"] == kinds
    assert "layer_types" not in to_hub_dialect(config | {"layer_types": ["full_attention"] * 2})


def test_the_dtype_of_the_weights_can_be_given(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "dtype": "float32"}')
    write_hub_config(tmp_path, torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": "qwen3", "torch_dtype": "bfloat16"}
