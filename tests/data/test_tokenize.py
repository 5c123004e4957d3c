"""Token ids are those of the chat template for the whole conversation; labels are what the assistant says."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
from datasets import Dataset, IterableDataset

from tests.data.chat import TOOLS, learned_text, tiny_tokenizer, tool_conversation, trl_template, turns
from xtuner_hf.data import load_conversations
from xtuner_hf.data import tokenize as module
from xtuner_hf.data.tokenize import (
    tokenize_conversations,
    tokenize_texts,
    training_chat_template,
    warn_if_no_stop,
)

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TEMPLATES = ("qwen3", "qwen3_instruct_2507", "qwen2_5", "llama3", "gptoss", "deepseekv3", "glm4moe", "phi3", "lfm2_v2")


def load(tmp_path, *rows) -> Dataset:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_conversations(path)


def tokenize(dataset, tokenizer=None, **arguments):
    tokenizer = tokenizer or tiny_tokenizer()
    if arguments.setdefault("assistant_only_loss", True):
        arguments.setdefault("chat_template", training_chat_template(tokenizer))
    return tokenize_conversations(dataset, tokenizer, **arguments)


@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_are_the_templates_and_labels_the_assistants(tmp_path, template):
    tokenizer = tiny_tokenizer(template)
    conversations = [
        turns(" What?\n", "First 😀 answer.", "再来", "Second\n\nanswer."),
        [{"role": "system", "content": "Be brief."}, *turns("Hi", "Hello")],
    ]
    rows = tokenize(load(tmp_path, *({"messages": messages} for messages in conversations)), tokenizer)
    marked = training_chat_template(tokenizer)
    for row, messages in zip(rows, conversations, strict=True):
        whole = tokenizer.apply_chat_template(messages, chat_template=marked, return_dict=True)
        assert row["input_ids"] == whole["input_ids"]
        assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
        learned = learned_text(tokenizer, row)
        for message in messages:
            assert (message["content"].strip() in learned) == (message["role"] == "assistant")


def test_what_is_learned_to_the_letter(tmp_path):
    rows = tokenize(load(tmp_path, {"messages": turns("Hi", "Hello", "Bye", "See you")}))
    thought = "<think>\n\n</think>\n\n"
    assert learned_text(tiny_tokenizer(), rows[0]) == f"{thought}Hello<|im_end|>\n{thought}See you<|im_end|>\n"


def test_tools_reach_the_template(tmp_path):
    tokenizer = tiny_tokenizer()
    messages = tool_conversation(city="Oslo", degrees=0.3, unit=None)
    (row,) = tokenize(load(tmp_path, {"messages": messages, "tools": TOOLS}))
    whole = tokenizer.apply_chat_template(
        messages, tools=TOOLS, chat_template=training_chat_template(tokenizer), return_dict=True
    )
    assert row["input_ids"] == whole["input_ids"]
    learned = learned_text(tokenizer, row)
    assert '{"name": "weather", "arguments": {"city": "Oslo", "degrees": 0.3, "unit": null}}' in learned
    assert "It is 20 degrees." in learned
    assert "tool_response" not in learned


def test_structs_of_arrow_give_no_keys_to_the_template():
    """Rows of a data set that was not loaded by us: Arrow gave `city` and `unit` to all arguments."""
    rows = [{"messages": tool_conversation(city="Oslo")}, {"messages": tool_conversation(unit="C")}]
    dataset = Dataset.from_list(rows, on_mixed_types=None)
    assert dataset[1]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"city": None, "unit": "C"}
    text = learned_text(tiny_tokenizer(), tokenize(dataset)[1])
    assert '"arguments": {"unit": "C"}' in text


def test_template_arguments_of_a_row_reach_the_template(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ style }}")
    dataset = load(tmp_path, {"messages": turns("a", "b"), "chat_template_kwargs": {"style": "!"}})
    (row,) = tokenize(dataset, tokenizer, assistant_only_loss=False)
    assert "a!<|im_end|>" in tokenizer.decode(row["input_ids"])


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("flag", [{"loss": False}, {"weight": 0}])
def test_a_turn_that_is_flagged_off_is_read_but_not_learned(tmp_path, template, flag):
    tokenizer = tiny_tokenizer(template)
    plain = turns("one", "First", "two", "Second", "three", "Third")
    flagged = [dict(message) for message in plain]
    flagged[3] |= flag
    flagged[5] |= {"loss": True}
    everything, some = tokenize(load(tmp_path, {"messages": plain}, {"messages": flagged}), tokenizer)
    assert some["input_ids"] == everything["input_ids"]
    learned = learned_text(tokenizer, some)
    assert "First" in learned
    assert "Third" in learned
    pairs = zip(everything["labels"], some["labels"], strict=True)
    missing = [index for index, (label, other) in enumerate(pairs) if label != other]
    assert missing == list(range(missing[0], missing[-1] + 1)), "one span"
    assert "Second" in tokenizer.decode([everything["labels"][index] for index in missing])
    assert {some["labels"][index] for index in missing} == {-100}


def test_flags_that_cannot_be_applied_are_an_error(tmp_path):
    dataset = load(tmp_path, {"messages": turns("a", "b")}, {"messages": [*turns("a"), *answers(False)]})
    with pytest.raises(ValueError, match=r"^dataset\[1\]: a turn is flagged 'loss': false, which needs assistant_only"):
        tokenize(dataset, assistant_only_loss=False)
    # gpt-oss writes consecutive answers into one marked span.
    with pytest.raises(ValueError, match=r"^chats\[0\]: the chat template marks 1 spans for 2 assistant turns"):
        tokenize(
            load(tmp_path, {"messages": [*turns("a"), *answers(True, False)]}), tiny_tokenizer("gptoss"), name="chats"
        )


def answers(*flags: bool) -> list[dict]:
    return [{"role": "assistant", "content": "b", "loss": flag} for flag in flags]


def test_conversations_with_nothing_to_learn_are_counted(tmp_path, caplog):
    rows = [turns("a"), [*turns("a"), *answers(False)], turns("a", "b")]
    dataset = load(tmp_path, *({"messages": messages} for messages in rows))
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        assert len(tokenize(dataset)) == 1
        assert "left out 2 of 3 rows that have nothing to learn from" in caplog.text
    with pytest.raises(ValueError, match="dataset has no row to learn from"):
        tokenize(dataset.select([0, 1]))


def test_every_token_is_learned_if_asked(tmp_path):
    (row,) = tokenize(load(tmp_path, {"messages": turns("a", "b")}), assistant_only_loss=False)
    assert row["labels"] == row["input_ids"]


def test_a_malformed_row_of_a_data_set_is_named(monkeypatch):
    monkeypatch.setattr(module, "ROWS_PER_SHARD", 2)
    dataset = Dataset.from_list([{"messages": turns("a", "b")}] * 4 + [{"messages": []}])
    with pytest.raises(ValueError, match=r"^dataset\[4\]: 'messages' is empty"):
        tokenize(dataset)


def test_a_tokenizer_without_template():
    with pytest.raises(ValueError, match=r"no chat template, .*: set tokenizer.chat_template .*'text'\.$"):
        training_chat_template(tiny_tokenizer(None))


def test_a_template_that_marks_nothing():
    tokenizer = tiny_tokenizer(None)
    tokenizer.chat_template = CHATML
    with pytest.raises(ValueError, match=r"does not mark what the assistant says.*assistant_only_loss=False"):
        training_chat_template(tokenizer)
    dataset = Dataset.from_list([{"messages": turns("a", "b")}])
    tokenizer.chat_template = CHATML + "{% generation %}{% endgeneration %}"
    with pytest.raises(ValueError, match=r"dataset\[0\]: the chat template marks none of the assistant's tokens here"):
        tokenize(dataset, tokenizer, chat_template=None)


def test_a_template_that_does_not_teach_to_stop(caplog):
    tokenizer = tiny_tokenizer(None)
    tokenizer.chat_template = CHATML.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
    with caplog.at_level(logging.WARNING):
        warn_if_no_stop(tiny_tokenizer(), training_chat_template(tiny_tokenizer()))
        assert not caplog.records
        warn_if_no_stop(tokenizer, training_chat_template(tokenizer))
    assert "may not learn to stop" in caplog.text


def test_texts_get_an_end_and_labels_everywhere(caplog):
    tokenizer = tiny_tokenizer(None)
    dataset = Dataset.from_dict({"text": ["Once upon", "", "ends<|im_end|>"], "id": [1, 2, 3]})
    rows = tokenize_texts(dataset, tokenizer)
    assert [tokenizer.decode(ids) for ids in rows["input_ids"]] == ["Once upon<|im_end|>", "ends<|im_end|>"]
    assert rows["labels"][:] == rows["input_ids"][:]
    assert rows.column_names == ["input_ids", "labels"]
    assert "left out 1 of 3 rows" in caplog.text
    with pytest.raises(ValueError, match=r"^corpus\[1\]: 'text' is NoneType, not text"):
        tokenize_texts(Dataset.from_dict({"text": ["a", None]}), tokenizer, name="corpus")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        tokenize_texts(dataset, tokenizer)


def test_streamed_data_sets():
    rows = [{"messages": turns("a", "b")}] * 3
    streamed = list(tokenize(IterableDataset.from_generator(lambda: iter(rows))))
    assert streamed == list(tokenize(Dataset.from_list(rows)))


class Calls:
    """Counts the conversations that are tokenised; the cache must not know."""

    def __init__(self, monkeypatch):
        self.count, self.limit = 0, None
        original = module.tokenize_conversation

        def counted(*args):
            self.count += 1
            if self.count == self.limit:
                raise KeyboardInterrupt
            return original(*args)

        monkeypatch.setattr(module, "tokenize_conversation", counted)

    def __call__(self, *args, **kwargs) -> int:
        self.count = 0
        tokenize(*args, **kwargs)
        return self.count


def test_a_second_run_takes_tokens_from_the_cache(tmp_path, monkeypatch):
    calls = Calls(monkeypatch)
    rows = [{"messages": turns(f"a{i}", f"b{i}")} for i in range(5)]
    assert calls(load(tmp_path, *rows)) == 5
    assert calls(load_conversations(tmp_path / "rows.jsonl"), tiny_tokenizer()) == 0
    changed = tiny_tokenizer()
    changed.chat_template = trl_template("qwen3_instruct_2507")
    assert calls(load_conversations(tmp_path / "rows.jsonl"), changed) == 5
    assert calls(load_conversations(tmp_path / "rows.jsonl"), assistant_only_loss=False) == 5
    assert calls(load(tmp_path, *rows[:4])) == 4, "the file changed"


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROWS_PER_SHARD", 3)
    calls = Calls(monkeypatch)
    dataset = load(tmp_path, *({"messages": turns(f"a{i}", f"b{i}")} for i in range(10)))
    calls.limit = 8
    with pytest.raises(KeyboardInterrupt):
        calls(dataset)
    calls.limit = None
    assert calls(dataset) == 10 - 6, "two shards of three (10 rows in 4 shards: 3, 3, 2, 2) were done"
    tokenizer = tiny_tokenizer()
    rows = tokenize(dataset, tokenizer)
    assert [learned_text(tokenizer, row)[-13:-11] for row in rows] == [f"b{i}" for i in range(10)]


def test_another_process_finds_the_cache(tmp_path, own_cache):
    tokenized = tokenize(load(tmp_path, {"messages": turns("a", "b")}))
    code = f"""
import pathlib, datasets
datasets.config.HF_DATASETS_CACHE = pathlib.Path({str(own_cache)!r})
from tests.data.test_tokenize import tokenize
from xtuner_hf.data import load_conversations
print(tokenize(load_conversations({str(tmp_path / "rows.jsonl")!r})).cache_files[0]["filename"])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split()[-1] == tokenized.cache_files[0]["filename"]
    assert len(list(own_cache.rglob("cache-*.arrow"))) == 1
