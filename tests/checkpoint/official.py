"""Tiny checkpoints in the quantised formats of the Hub, made from the formats' descriptions and not with our code.

Random codes and scales are drawn first; what they stand for is looked up in tables written out here, in fp64.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

# As DeepSeek V3 has it, in the words of its remote code.
DEEPSEEK_YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
FP8_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
MXFP4_CONFIG = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}
INT4_CONFIG = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": 32,
                "num_bits": 4,
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "quant_method": "compressed-tensors",
}

# Linear layers that published FP8 checkpoints store in blocks, by the last part of their names.
FP8_LINEARS = {
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
}


def e4m3_values() -> np.ndarray:
    """What each of the 256 bytes stands for: sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinities."""
    values = []
    for byte in range(256):
        exponent, mantissa = byte >> 3 & 15, byte & 7
        value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        value = float("nan") if byte & 127 == 127 else value
        values.append(-value if byte >> 7 else value)
    return np.array(values)


def e2m1_values() -> np.ndarray:
    """What each of the 16 codes stands for: sign, 2 bits of exponent with bias 1, 1 of mantissa."""
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    return np.array(positive + [-value for value in positive])


def fp8_tensor(shape: tuple[int, int], rng: np.random.Generator) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """({suffix: stored}, fp32 values) of a weight whose edges may be ragged."""
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    codes[codes & 127 == 127] = 126  # no NaN
    scales = rng.uniform(1e-4, 4e-4, (-(-shape[0] // 128), -(-shape[1] // 128))).astype(np.float32)
    each = np.kron(scales.astype(np.float64), np.ones((128, 128)))[: shape[0], : shape[1]]
    values = torch.from_numpy(e4m3_values()[codes] * each).float()  # one rounding: the fp64 product is exact
    stored = {"": torch.from_numpy(codes).view(torch.float8_e4m3fn), "_scale_inv": torch.from_numpy(scales)}
    return stored, values


def mxfp4_tensor(shape: tuple[int, int, int], rng: np.random.Generator):
    """({suffix: stored}, fp32 values) of experts [E, I, O]."""
    experts, inputs, outputs = shape
    codes = rng.integers(0, 16, (experts, outputs, inputs // 32, 32), dtype=np.uint8)
    scales = rng.integers(118, 124, codes.shape[:3], dtype=np.uint8)
    values = e2m1_values()[codes] * 2.0 ** (scales.astype(np.float64) - 127)[..., None]
    values_EOI = torch.from_numpy(values.reshape(experts, outputs, inputs)).float()
    blocks = codes[..., 0::2] + 16 * codes[..., 1::2]
    stored = {"_blocks": torch.from_numpy(blocks), "_scales": torch.from_numpy(scales)}
    return stored, values_EOI.transpose(1, 2).contiguous()


def int4_tensor(shape: tuple[int, int], rng: np.random.Generator):
    """({suffix: stored}, fp32 values)."""
    rows, cols = shape
    codes = rng.integers(0, 16, shape, dtype=np.int64)
    scales = torch.from_numpy(rng.uniform(0.001, 0.01, (rows, cols // 32))).bfloat16()
    values = (codes - 8) * np.kron(scales.double().numpy(), np.ones((1, 32)))
    words = sum(codes[:, place::8] << (4 * place) for place in range(8))
    packed = torch.from_numpy(words.astype(np.uint32).view(np.int32))
    stored = {"_packed": packed, "_scale": scales, "_shape": torch.tensor(shape, dtype=torch.int32)}
    return stored, torch.from_numpy(values).float()


def is_fp8(name: str, shape) -> bool:
    return name.endswith(".weight") and name.split(".")[-2] in FP8_LINEARS and len(shape) == 2


def is_mxfp4(name: str, shape) -> bool:
    return name.endswith((".experts.gate_up_proj", ".experts.down_proj"))


def is_int4(name: str, shape) -> bool:
    return ".mlp.experts." in name and name.endswith("_proj.weight")


FORMATS = {
    "fp8": (is_fp8, fp8_tensor),
    "mxfp4": (is_mxfp4, mxfp4_tensor),
    "compressed-tensors": (is_int4, int4_tensor),
}


def write_official(
    folder: Path, plain: dict[str, torch.Tensor], config: dict, num_shards: int = 2, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Write shards, index and `config.json`; returns the plain values, fp32 where quantised.

    Args:
        plain: names, shapes and, of what the format does not quantise, values.
    """
    is_quantised, make = FORMATS[config["quantization_config"]["quant_method"]]
    rng = np.random.default_rng(seed)
    stored, values = {}, {}
    for name, tensor in plain.items():
        if is_quantised(name, tensor.shape):
            parts, values[name] = make(tuple(tensor.shape), rng)
            stored |= {name + suffix: part for suffix, part in parts.items()}
        else:
            stored[name] = values[name] = tensor
    write_folder(folder, stored, config, num_shards)
    return values


def write_folder(folder: Path, stored: dict[str, torch.Tensor], config: dict, num_shards: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = list(stored)
    weight_map = {}
    for number in range(num_shards):
        file = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        shard = {name: stored[name].contiguous() for name in names[number::num_shards]}
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in stored.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder as it is stored."""
    from safetensors.torch import load_file

    stored: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
    return stored


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))
    )
