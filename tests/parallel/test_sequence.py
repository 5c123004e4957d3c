"""Sequence parallelism against one process, fp32: loss, every gradient, balance losses, load of the experts.

SP {1, 2, 4} x EP {1, 2} x FSDP on 4 ranks, rows of unequal documents and of a length that SP does not divide.
"""

from __future__ import annotations

import pytest
import torch

from tests.parallel.shared_sequences import model_of, run, step
from tests.ranks import run_on_ranks

assert run  # what the ranks run
MODELS = {
    "qwen3_moe": {"family": "qwen3_moe"},
    "deepseek_v3": {"family": "deepseek_v3"},
    "deepseek_v3, multi-token prediction": {
        "family": "deepseek_v3",
        "config": {"num_nextn_predict_layers": 2},
        "init": {"mtp_loss_coef": 0.3},
    },
    "gpt_oss": {"family": "gpt_oss"},
    "1 key and value head": {"family": "qwen3_moe", "config": {"num_key_value_heads": 1}},
    "3 key and value heads": {
        "family": "qwen3_moe",
        "config": {"num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 8},
    },
}
EVERY_LAYOUT = [(sp_size, ep_size) for sp_size in (1, 2, 4) for ep_size in (1, 2)]
CASES = [
    *((name, "packed", layout) for name in ("qwen3_moe", "deepseek_v3", "gpt_oss") for layout in EVERY_LAYOUT),
    *((name, "padded", (4, 2)) for name in ("qwen3_moe", "gpt_oss")),
    *(("deepseek_v3, multi-token prediction", "packed", layout) for layout in ((2, 1), (4, 2))),
    *((name, "packed", (4, 1)) for name in ("1 key and value head", "3 key and value heads")),
]


@pytest.fixture(scope="module")
def results() -> dict:
    cases = [
        {**MODELS[name], "kind": kind, "sp_size": sp_size, "ep_size": ep_size}
        for name, kind, (sp_size, ep_size) in CASES
    ]
    found = run_on_ranks("tests.parallel.shared_sequences:run", 4, cases=cases)[0]
    return dict(zip(CASES, found, strict=True))


@pytest.fixture(scope="module")
def one_process() -> dict:
    return {}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}-sp{case[2][0]}-ep{case[2][1]}")
def test_equals_one_process(case, results, one_process):
    name, kind, _ = case
    if (name, kind) not in one_process:
        one_process[name, kind] = step(model_of(MODELS[name]), kind, slice(None))
    found, expected = results[case], one_process[name, kind]
    assert torch.equal(found["load"], expected["load"])
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(found["aux"], expected["aux"], rtol=1e-5, atol=0)
    assert found["grads"].keys() == expected["grads"].keys()
    for parameter, grad in expected["grads"].items():
        error = (found["grads"][parameter] - grad).norm() / grad.norm()
        assert error < 1e-5, (parameter, error)
