"""A tokenizer of single characters, and a task with a reward that can be verified: enough to learn from on a CPU.

The task: `3+5=` is to be answered with the first operand, `3`, and then the end. Chance is one in the vocabulary for a
model at its random start, so that groups with and without a right answer both occur.
"""

from __future__ import annotations

import string

from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " "


def char_tokenizer(characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """One token a character; `<pad>` is 0 and `<eos>` is 1."""
    vocab = {"<pad>": 0, "<eos>": 1} | {character: 2 + index for index, character in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def first_operand_task(operands: str = "0123", other: str = "4567") -> Dataset:
    """Rows of `prompt` and `answer`."""
    return Dataset.from_list([{"prompt": f"{a}+{b}=", "answer": a} for a in operands for b in other])


def first_operand_reward(completions: list[str], answer: list[str], **_) -> list[float]:
    """1 for an answer that begins with the right character."""
    return [float(text.startswith(right)) for text, right in zip(completions, answer, strict=True)]
