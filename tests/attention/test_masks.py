from __future__ import annotations

import pytest
import torch

from tests.families import WINDOW, deepseek_config, gpt_oss_config
from tests.tiny import dense_config, moe_config
from xtuner_hf.attention.masks import masks_without_cache

LENGTHS = (4, 9, 1, 7)
EMBEDS = torch.zeros(1, sum(LENGTHS), 8)
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]


def visible(config, kind: str | None = None, attention_mask=None, positions=POSITIONS, embeds=EMBEDS) -> torch.Tensor:
    """[S, L] bool of the first row."""
    config._attn_implementation = "eager"
    masks = masks_without_cache(config, embeds, attention_mask, positions)
    return (masks if kind is None else masks[kind])[0, 0] == 0


def expected(window: int | None) -> torch.Tensor:
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    distance = torch.arange(len(document))[:, None] - torch.arange(len(document))[None]
    return (document[:, None] == document[None]) & (distance >= 0) & (distance < (window or len(document)))


@pytest.mark.parametrize(
    ("config", "kind", "window"),
    [
        pytest.param(deepseek_config(), None, None, id="one kind of layer"),
        pytest.param(gpt_oss_config(), "full_attention", None, id="full layers"),
        pytest.param(gpt_oss_config(), "sliding_attention", WINDOW, id="sliding layers"),
        pytest.param(dense_config(), "full_attention", None, id="layer types, all full"),
        pytest.param(moe_config(use_sliding_window=True, sliding_window=3), None, 3, id="all layers sliding"),
    ],
)
def test_documents_are_apart_and_a_window_is_exactly_that_many_keys(config, kind, window):
    found = visible(config, kind)
    assert torch.equal(found, expected(window))
    if window is not None:
        assert found.sum(1).max() == window


def test_padding_is_hidden_and_rows_with_a_padding_mask_are_one_document():
    attention_mask = torch.ones(1, EMBEDS.shape[1], dtype=torch.int64)
    attention_mask[:, -3:] = 0
    found = visible(deepseek_config(), attention_mask=attention_mask, positions=torch.arange(EMBEDS.shape[1])[None])
    causal = torch.ones_like(found).tril()
    causal[:, -3:] = False
    assert torch.equal(found, causal)
