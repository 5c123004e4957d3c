"""What lies beside the weights in InternVL's two layouts: `config.json`, the image processor's and the tokenizer's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from .quantised_format import CheckpointFormatError
from .side_files import copy_side_files

# (transformers', InternVL's) name of a field of `vision_config`.
_VISION_FIELDS = (
    *((name, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")),
    *((name, name) for name in ("hidden_act", "norm_type", "layer_norm_eps", "num_channels", "initializer_range")),
    *((name, name) for name in ("attention_dropout", "drop_path_rate")),
    ("attention_bias", "qkv_bias"),
    ("use_qk_norm", "qk_normalization"),
    ("projection_dropout", "dropout"),
    ("layer_scale_init_value", "initializer_factor"),
)
# Pairs of height and width in transformers' words, one number in InternVL's.
_SQUARES = ("image_size", "patch_size")
_IMAGE_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
# Of one layout alone, so that the other's are written instead.
_OWN_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_MODULES = "configuration_internvl_chat", "modeling_internvl_chat"


def chat_config(config: dict[str, Any]) -> dict[str, Any]:
    """transformers' `config.json` in the words of InternVL's own code."""
    vision = config["vision_config"]
    own = {ours: vision[name] for name, ours in _VISION_FIELDS if name in vision}
    own |= {name: _side(vision[name]) for name in _SQUARES}
    own |= {"architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", "use_flash_attn": True}
    code, modeling = _MODULES
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": f"{code}.InternVLChatConfig",
            "AutoModel": f"{modeling}.InternVLChatModel",
            "AutoModelForCausalLM": f"{modeling}.InternVLChatModel",
        },
        "downsample_ratio": config.get("downsample_ratio", 0.5),
        "dynamic_image_size": True,
        "force_image_size": own["image_size"],
        "llm_config": config["text_config"],
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": config.get("vision_feature_layer", -1),
        "template": "internvl2_5",
        "tie_word_embeddings": config.get("tie_word_embeddings", True),
        "torch_dtype": config.get("torch_dtype", "bfloat16"),
        "use_thumbnail": True,
        "vision_config": own,
    }


def hf_config(config: dict[str, Any], image_token_id: int) -> dict[str, Any]:
    """The `config.json` of InternVL's own code in transformers' words.

    Args:
        image_token_id: of `<IMG_CONTEXT>`, which only the tokenizer knows there.

    Raises:
        CheckpointFormatError: pixels are shuffled in the old order.
    """
    if config.get("ps_version", "v1") != "v2":
        raise CheckpointFormatError(
            f"ps_version is {config.get('ps_version')!r}: pixels are shuffled in another order than transformers' and "
            "our InternVL do, which is 'v2' (InternVL 2.5 and newer)."
        )
    vision = config["vision_config"]
    own = {name: vision[theirs] for name, theirs in _VISION_FIELDS if theirs in vision}
    own |= {name: [_side(vision[name])] * 2 for name in _SQUARES}
    ratio = config.get("downsample_ratio", 0.5)
    patches = (own["image_size"][0] // own["patch_size"][0]) ** 2
    text = config["llm_config"]
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": ratio,
        "image_seq_length": int(patches * ratio**2),
        "image_token_id": image_token_id,
        "model_type": "internvl",
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)),
        "torch_dtype": config.get("torch_dtype", "bfloat16"),
        "vision_config": own | {"model_type": "internvl_vision"},
        "vision_feature_layer": config.get("select_layer", -1),
        "vision_feature_select_strategy": "default",
    }


def write_chat_files(source: Path, target: Path, like: Path | None) -> None:
    """All but the weights, for `to_chat_layout`."""
    config = chat_config(_read(source / "config.json"))
    if like is not None:
        published = _read(like / "config.json")
        _check_same_architecture(config, published, like)
        config = published | {"torch_dtype": config["torch_dtype"]}
        for path in sorted(like.glob("*.py")):
            shutil.copyfile(path, target / path.name)
    _dump(target / "config.json", config)
    side = config["vision_config"]["image_size"]
    images = {"crop_size": side, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3}
    images |= {"feature_extractor_type": "CLIPFeatureExtractor", "size": side} | _IMAGENET
    _dump(target / "preprocessor_config.json", images)
    _copy_others(source, target)


def write_hf_files(source: Path, target: Path) -> None:
    """All but the weights, for `to_hf_layout`."""
    published = _read(source / "config.json")
    config = hf_config(published, image_token_id(source))
    _dump(target / "config.json", config)
    side = config["vision_config"]["image_size"][0]
    images = {
        "crop_to_patches": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_processor_type": "GotOcr2ImageProcessor",
        "max_patches": published.get("max_dynamic_patch", 12),
        "min_patches": published.get("min_dynamic_patch", 1),
        "processor_class": "InternVLProcessor",
        "resample": 3,
        "size": {"height": side, "width": side},
    }
    _dump(target / "preprocessor_config.json", images | _IMAGENET)
    processor = {"image_seq_length": config["image_seq_length"], "processor_class": "InternVLProcessor"}
    _dump(target / "processor_config.json", processor)
    _copy_others(source, target)
    for path in source.glob("*.py"):  # of InternVLChatModel, which nobody reads here
        (target / path.name).unlink(missing_ok=True)
    tokenizer = target / "tokenizer_config.json"
    if tokenizer.exists():
        said = _read(tokenizer)
        extra = said.get("extra_special_tokens") or {}
        said |= {"extra_special_tokens": extra | _IMAGE_TOKENS, "processor_class": "InternVLProcessor"}
        _dump(tokenizer, said)


def image_token_id(folder: Path) -> int:
    """The id of the image token in a folder's tokenizer.

    Raises:
        CheckpointFormatError: if no file there says it.
    """
    wanted = _IMAGE_TOKENS["context_image_token"]
    found: dict[str, int] = {}
    if (folder / "tokenizer.json").exists():
        found |= {each["content"]: each["id"] for each in _read(folder / "tokenizer.json").get("added_tokens", [])}
    if (folder / "tokenizer_config.json").exists():
        decoder = _read(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
        found |= {each["content"]: int(number) for number, each in decoder.items()}
    if (folder / "added_tokens.json").exists():
        found |= _read(folder / "added_tokens.json")
    if wanted not in found:
        raise CheckpointFormatError(
            f"{folder} has no tokenizer with a token {wanted}: put the tokenizer's files (added_tokens.json, "
            "tokenizer_config.json or tokenizer.json) next to the weights."
        )
    return found[wanted]


def _check_same_architecture(config: dict[str, Any], published: dict[str, Any], like: Path) -> None:
    for part in ("llm_config", "vision_config"):
        for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "vocab_size"):
            ours, theirs = (each.get(part, {}).get(name) for each in (config, published))
            if ours is not None and theirs is not None and ours != theirs:
                raise CheckpointFormatError(
                    f"{like} is no checkpoint of this architecture: its {part}.{name} is {theirs}, and here {ours}."
                )


def _copy_others(source: Path, target: Path) -> None:
    """The files that both layouts have alike."""
    for name in copy_side_files(source, target):
        if name in _OWN_FILES:
            (target / name).unlink()


def _side(size: Any) -> int:
    return size if isinstance(size, int) else size[0]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _dump(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
