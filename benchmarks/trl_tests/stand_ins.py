"""Tiny models and data sets under the names that TRL's tests give them, in a folder that the tests run in.

`from_pretrained` and `load_dataset` look for a relative folder before they ask the Hub, so nothing is patched.

Models are always made here: TRL's tests train a Qwen2 mostly, which is no family of this package, and under its name
they find a Qwen3 of the same size. All have random weights, as TRL's have, and the chat template of their family. Data
sets are made only where the Hub cannot be reached.

There are two such folders. `words` has Qwen's real tokenizer and few rows, for tests that write ids out or count
tokens. All others run in `bytes`, whose models have 260 tokens: nine tenths of a test's time are logits of 151,669.
"""

from __future__ import annotations

import codecs
import contextlib
import importlib
import io
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset, Features, Image, List, Value
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.data.chat import tiny_tokenizer, trl_template

ORGANISATION = "trl-internal-testing"
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

SIZES = {
    "hidden_size": 8,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
QWEN3 = SIZES | {"head_dim": 8}
MOE = QWEN3 | {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
SCORES = {"num_labels": 1}

# name -> (class, configuration, chat template)
MODELS: dict[str, tuple[Any, Any, str]] = {
    "tiny-Qwen2ForCausalLM-2.5": (Qwen3ForCausalLM, Qwen3Config(**QWEN3), "qwen2_5"),
    "tiny-Qwen3ForCausalLM": (Qwen3ForCausalLM, Qwen3Config(**QWEN3), "qwen3"),
    "tiny-Qwen3MoeForCausalLM": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**MOE, num_experts=4), "qwen3"),
    "tiny-GptOssForCausalLM": (GptOssForCausalLM, GptOssConfig(**QWEN3, num_local_experts=4), "gptoss"),
    "tiny-Glm4MoeForCausalLM": (
        Glm4MoeForCausalLM,
        Glm4MoeConfig(**MOE, n_routed_experts=4, first_k_dense_replace=1),
        "glm4moe",
    ),
    # Reward models are not ours, and stay what they are.
    "tiny-Qwen2ForSequenceClassification-2.5": (
        Qwen2ForSequenceClassification,
        Qwen2Config(**SIZES, **SCORES),
        "qwen2_5",
    ),
    "tiny-Qwen3ForSequenceClassification": (Qwen3ForSequenceClassification, Qwen3Config(**QWEN3, **SCORES), "qwen3"),
    "tiny-LlamaForSequenceClassification-3.2": (
        LlamaForSequenceClassification,
        LlamaConfig(**SIZES, **SCORES),
        "llama3_2",
    ),
}
LLAMA_PAD = "<|finetune_right_pad_id|>"

# Words of each line of the Zen of Python that are the prompt, as the tests expect them; half of the further lines.
PROMPT_WORDS = [4, 2, 3, 1, 4, 3, 1, 4, 3, 3, 2, 6]
TEST_ROWS = 2


def build(folder: Path, with_datasets: bool) -> None:
    """Make the folders `bytes` and `words` in `folder`."""
    datasets.disable_progress_bars()
    _build_models(folder / "bytes", tiny_tokenizer())
    _build_models(folder / "words", _qwen_tokenizer(folder / "tokenizer"))
    if with_datasets:
        lines = _zen()
        _build_datasets(folder / "bytes", lines)
        _build_datasets(folder / "words", lines[: 3 * TEST_ROWS])


def _build_models(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for name, (model_class, config, template) in MODELS.items():
        tokenizer.chat_template = trl_template(template)
        if "Llama" in name:
            tokenizer.add_special_tokens({"additional_special_tokens": [LLAMA_PAD]})
        config.vocab_size = len(tokenizer)
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        config.bos_token_id = None
        torch.manual_seed(0)
        target = folder / ORGANISATION / name
        model_class(config).save_pretrained(target)
        tokenizer.save_pretrained(target)


def _qwen_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module("qwen3_tokenizer").build_qwen3_tokenizer(folder)


# ---- data sets ----


def _build_datasets(folder: Path, zen: list[tuple[str, str, str]]) -> None:
    """TRL's data sets by name and columns, with rows like theirs."""
    _save(folder, "zen", {config: [_row_as(config, *line) for line in zen] for config in ZEN_CONFIGS})
    _save(folder, "harmony", {"preference": [_harmony_row(*line) for line in zen]})
    _save(folder, "toolcall", {"preference": [_tool_row(number) for number in range(len(zen))]})
    image = io.BytesIO()
    _picture().save(image, "PNG")
    rows = [_row_as("conversational_preference", *line) | {"images": [{"bytes": image.getvalue()}]} for line in zen]
    features = Features({name: _turns() for name in ("prompt", "chosen", "rejected")} | {"images": List(Image())})
    _save(folder, "zen-image", {"conversational_preference": rows}, features)


ZEN_CONFIGS = (
    "standard_prompt_only",
    "conversational_prompt_only",
    "standard_preference",
    "conversational_preference",
    "standard_implicit_prompt_preference",
    "conversational_implicit_prompt_preference",
)


def _zen() -> list[tuple[str, str, str]]:
    """Lines of the Zen of Python as prompt, its end, and the end of another line."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    lines = [line for line in codecs.decode(this.s, "rot13").splitlines()[2:] if line]
    cuts = [*PROMPT_WORDS, *(len(line.split()) // 2 for line in lines[len(PROMPT_WORDS) :])]
    split = [(line.split()[:cut], line.split()[cut:]) for line, cut in zip(lines, cuts, strict=True)]
    ends = [" " + " ".join(end) for _, end in split]
    others = [ends[-1], *ends[:-1]]
    return [(" ".join(start), *pair) for (start, _), *pair in zip(split, ends, others, strict=True)]


def _row_as(config: str, prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    conversational = config.startswith("conversational")

    def as_turns(role: str, text: str) -> Any:
        return [{"role": role, "content": text.strip()}] if conversational else text

    asked, good, bad = as_turns("user", prompt), as_turns("assistant", chosen), as_turns("assistant", rejected)
    if config.endswith("prompt_only"):
        return {"prompt": asked}
    if "implicit" in config:
        return {"chosen": asked + good, "rejected": asked + bad}
    return {"prompt": asked, "chosen": good, "rejected": bad}


def _harmony_row(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    def answer(text: str) -> list[dict]:
        return [{"role": "assistant", "thinking": f"How does it end? {text}", "content": text.strip()}]

    asked = [{"role": "system", "content": "Finish the line."}, {"role": "user", "content": prompt}]
    return {"prompt": asked, "chosen": answer(chosen), "rejected": answer(rejected)}


def _tool_row(number: int) -> dict[str, Any]:
    def answer(value: int) -> list[dict]:
        arguments = {"a": number, "b": value}
        call = {"type": "function", "function": {"name": "multiply", "arguments": arguments}}
        return [{"role": "assistant", "content": "", "tool_calls": [call]}]

    integer = {"type": "integer", "description": "A factor."}
    parameters = {"type": "object", "properties": {"a": integer, "b": integer}, "required": ["a", "b"]}
    tool = {
        "type": "function",
        "function": {"name": "multiply", "description": "Multiplies two integers.", "parameters": parameters},
    }
    asked = [{"role": "user", "content": f"What is {number} times 3?"}]
    return {"prompt": asked, "chosen": answer(3), "rejected": answer(4), "tools": [tool]}


def _turns() -> Any:
    return List({"role": Value("string"), "content": Value("string")})


def _picture():
    from PIL import Image as Pillow

    return Pillow.new("RGB", (16, 16), "red")


def _save(folder: Path, name: str, configs: dict[str, list[dict]], features: Features | None = None) -> None:
    target = folder / ORGANISATION / name
    card = ["---", "configs:"]
    for config, rows in configs.items():
        card += [f"- config_name: {config}", "  data_files:"]
        for split, part in (("train", rows[:-TEST_ROWS]), ("test", rows[-TEST_ROWS:])):
            path = f"{config}/{split}.parquet"
            (target / config).mkdir(parents=True, exist_ok=True)
            Dataset.from_list(part, features=features).to_parquet(target / path)
            card += [f"  - split: {split}", f"    path: {path}"]
    (target / "README.md").write_text("\n".join([*card, "---", ""]))
