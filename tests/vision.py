"""Models that read images, in tiny, and rows with images in them.

Both kinds of InternViT: layer norm with biases, RMS norm with norms on queries and keys. A tile of 56 x 56 pixels has
16 patches and 4 image tokens.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers import InternVLConfig, PreTrainedConfig, PreTrainedModel

from tests import tiny
from tests.families import cast, gpt_oss_config, qwen3_config
from tests.tiny import build, moe_config
from xtuner_hf.data import PackedCollator
from xtuner_hf.models.auto import model_class
from xtuner_hf.models.interns1.configuration import InternS1Config

IMAGE_TOKEN = 127
TOKENS_PER_TILE = 4
IMAGE_SIZE = 56

_TOWER = {"num_hidden_layers": 2, "image_size": [IMAGE_SIZE, IMAGE_SIZE], "patch_size": [14, 14]}
VIT_300M = _TOWER | {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "attention_bias": True}
VIT_6B = _TOWER | {
    **{"hidden_size": 40, "num_attention_heads": 5, "intermediate_size": 64},
    **{"attention_bias": False, "norm_type": "rms_norm", "use_qk_norm": True},
}
TEXTS = {"dense": qwen3_config, "moe": moe_config, "gpt_oss": gpt_oss_config}
# Name -> (configuration class, text, vision tower)
MODELS: dict[str, tuple[type[PreTrainedConfig], str, dict[str, Any]]] = {
    "internvl_dense": (InternVLConfig, "dense", VIT_300M),
    "internvl_moe": (InternVLConfig, "moe", VIT_6B),
    "internvl_gpt_oss": (InternVLConfig, "gpt_oss", VIT_300M),
    "interns1": (InternS1Config, "moe", VIT_6B),
    "interns1_mini": (InternS1Config, "dense", VIT_300M),
}


def config(
    name: str,
    vocab_size: int = IMAGE_TOKEN + 1,
    image_token_id: int = IMAGE_TOKEN,
    tied: bool = False,
    text: dict[str, Any] | None = None,
    **vision: Any,
) -> PreTrainedConfig:
    """`text` and `vision`: changes to the configuration of the language model and of the tower."""
    config_class, family, tower = MODELS[name]
    text_config = TEXTS[family](tie_word_embeddings=tied, vocab_size=vocab_size, **(text or {}))
    # The text's own `architectures` are what engines choose its class by.
    text_config.architectures = [model_class(text_config).__name__]
    return config_class(
        text_config=text_config.to_dict(),
        vision_config=copy.deepcopy(tower | vision),
        image_token_id=image_token_id,
        image_seq_length=TOKENS_PER_TILE,
        tie_word_embeddings=tied,
    )


def ours(
    name: str, dtype=torch.float32, kernel: str = "xtuner_grouped_mm", attention: str | None = None, **changes: Any
) -> PreTrainedModel:
    wanted = config(name, **changes)
    wanted._experts_implementation, wanted._attn_implementation = kernel, attention
    model = build(model_class(wanted), wanted)
    randomize_vision_(model)
    return cast(model, dtype)


def stock(model: PreTrainedModel, attention: str = "eager") -> PreTrainedModel:
    """transformers' own InternVL, eager throughout, with the weights of one of ours."""
    name = next(n for n, (_, text, _) in MODELS.items() if n.startswith("internvl") and text_of(model) == text)
    wanted = config(name)
    wanted._attn_implementation = wanted._experts_implementation = attention
    found = cast(transformers.InternVLForConditionalGeneration(wanted), model.dtype)
    found.load_state_dict(model.state_dict())
    return found.train(model.training)


def text_of(model: PreTrainedModel) -> str:
    return {"qwen3": "dense", "qwen3_moe": "moe", "gpt_oss": "gpt_oss"}[model.config.text_config.model_type]


@torch.no_grad()
def randomize_vision_(model: PreTrainedModel, seed: int = 1) -> None:
    """Move what starts at 0, or alike for all channels, away from there, and widen the rest."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "vision_tower" not in name and "projector" not in name:
            continue
        if "token" in name or "position" in name or "lambda" in name or parameter.dim() > 1:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def row(*parts: int, seed: int = 0) -> list[int]:
    """Token ids: for each part n > 0 so many of text, for n < 0 the tokens of -n tiles."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    for part in parts:
        if part < 0:
            ids += [IMAGE_TOKEN] * (-part * TOKENS_PER_TILE)
        else:
            ids += torch.randint(2, IMAGE_TOKEN, (part,), generator=generator).tolist()
    return ids


def tiles(number: int, seed: int = 3, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator).to(dtype)


def uneven_rows(num_rows: int = 16) -> list[dict]:
    """Rows of very different lengths; every third one begins with some tiles, made from their seeds."""
    rows = tiny.uneven_rows(num_rows, vocab_size=IMAGE_TOKEN)
    for index, row_ in enumerate(rows):
        row_["tile_seeds"] = list(range(index, index + 1 + index % 4)) if index % 3 == 0 else []
        image = [IMAGE_TOKEN] * (TOKENS_PER_TILE * len(row_["tile_seeds"]))
        row_["input_ids"] = image + row_["input_ids"]
        row_["labels"] = [-100] * len(image) + row_["labels"]
    return rows


class TileCollator(PackedCollator):
    """`PackedCollator` for the rows above, with `pixel_values` if there are tiles."""

    def torch_call(self, examples):
        seeds = [seed for example in examples for seed in example["tile_seeds"]]
        batch = super().torch_call([{k: v for k, v in each.items() if k != "tile_seeds"} for each in examples])
        return batch | ({"pixel_values": torch.cat([tiles(1, seed) for seed in seeds])} if seeds else {})
