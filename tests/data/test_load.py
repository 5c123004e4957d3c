"""`load_conversations`: every good row arrives as it was written, every bad one is named."""

from __future__ import annotations

import json
import logging

import datasets
import pytest
from datasets import Dataset

from tests.data.chat import TOOLS, tool_conversation, turns
from xtuner_hf.data import load_conversations


def write(path, *lines) -> str:
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return str(path)


GOOD = {"messages": turns("Hi", "Hello")}


def test_rows_arrive_as_they_were_written(tmp_path):
    rows = [
        {"messages": turns("你好 😀", "Hello\n\n  there ")},
        {"messages": tool_conversation(city="Oslo"), "tools": TOOLS},
        {"messages": [*turns("2+2?", "4"), {"role": "user", "content": [{"type": "text", "text": "a"}]}]},
        {"messages": [{**turns("a", "b")[0]}, {"role": "assistant", "content": "b", "reasoning_content": "so"}]},
    ]
    loaded = load_conversations(write(tmp_path / "rows.jsonl", *rows))
    assert len(loaded) == 4
    assert loaded[0]["messages"] == rows[0]["messages"]
    assert loaded[0]["tools"] is None
    assert json.loads(loaded[1]["tools"]) == TOOLS
    message = loaded[1]["messages"][1]
    assert message.keys() == {"role", "tool_calls"}, "no key that the row did not have"
    assert json.loads(message["tool_calls"]) == rows[1]["messages"][1]["tool_calls"]
    assert loaded[2]["messages"][2] == {"role": "user", "content": "a"}
    assert loaded[3]["messages"] == rows[3]["messages"]


def test_no_number_of_a_tool_call_changes(tmp_path):
    """The JSON type of `datasets` reads 0.3 as 0.30000000000000004 and refuses integers beyond 64 bits."""
    arguments = {"x": 0.3, "big": 12345678901234567890123, "none": None, "nested": [{"y": 1e-7}]}
    loaded = load_conversations(write(tmp_path / "rows.jsonl", {"messages": tool_conversation(**arguments)}))
    call = json.loads(loaded[0]["messages"][1]["tool_calls"])[0]
    assert call["function"]["arguments"] == arguments


def test_blank_lines_and_a_missing_last_line_end_are_fine(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\ufeff" + json.dumps(GOOD) + "\n\n" + json.dumps(GOOD), encoding="utf-8")
    assert len(load_conversations(path)) == 2


def test_other_kinds_of_sources(tmp_path):
    as_list = tmp_path / "rows.json"
    as_list.write_text(json.dumps([GOOD, GOOD], indent=2))
    Dataset.from_list([GOOD]).to_parquet(tmp_path / "rows.parquet")
    write(tmp_path / "lines.json", GOOD)
    assert len(load_conversations(as_list)) == 2
    assert len(load_conversations(tmp_path / "lines.json")) == 1
    assert len(load_conversations([as_list, tmp_path / "rows.parquet"])) == 3
    assert len(load_conversations(tmp_path)) == 4


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return Dataset.from_list([GOOD, {"messages": []}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_conversations("someone/chats", "skip", split="test")[:] == {"messages": [GOOD["messages"]]}
    assert asked == [("someone/chats", "test")]
    with pytest.raises(ValueError, match=r"^someone/chats \(train\), row 2: 'messages' is empty"):
        load_conversations("someone/chats")


def test_arrow_gives_no_keys_to_messages_and_arguments(tmp_path):
    """A parquet file unifies the structs of all rows; templates must not see keys that a row did not have."""
    rows = [
        {"messages": tool_conversation(city="Oslo"), "tools": TOOLS[:1]},
        {"messages": tool_conversation(unit="C"), "tools": TOOLS[1:]},
        {"messages": turns("Hi", "Hello"), "tools": None},
    ]
    Dataset.from_list(rows, on_mixed_types=None).to_parquet(tmp_path / "rows.parquet")
    assert "unit" in str(datasets.load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"))["train"][0])
    loaded = load_conversations(tmp_path / "rows.parquet")
    calls = [json.loads(row["messages"][1]["tool_calls"])[0]["function"] for row in loaded.select([0, 1])]
    assert [call["arguments"] for call in calls] == [{"city": "Oslo"}, {"unit": "C"}]
    assert loaded[2]["messages"] == rows[2]["messages"]
    assert [json.loads(tools) for tools in loaded["tools"][:2]] == [TOOLS[:1], TOOLS[1:]]


def test_sharegpt(tmp_path):
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    assert load_conversations(write(tmp_path / "rows.jsonl", row))[0]["messages"] == GOOD["messages"]


def message(**keys) -> dict:
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", **keys}]}


BAD = {
    "not an object": ([1], "the row is a list"),
    "no messages": ({"text": "Hi"}, r"no 'messages' in the row \(keys: 'text'\)"),
    "messages not a list": ({"messages": "Hi"}, "'messages' is text; it must be a list"),
    "empty messages": ({"messages": []}, "'messages' is empty"),
    "message not an object": ({"messages": [7]}, "message 1 is a number"),
    "unknown role": (message(role="bot"), "message 2 has role 'bot'; use one of system, developer, user, assistant"),
    "no content": (message(content=None), "message 2 has no content"),
    "content of the wrong type": (message(content=3), "message 2 has content that is a number"),
    "malformed tool_calls": (message(tool_calls={"name": "f"}), "'tool_calls' is an object; it must be a list"),
    "malformed loss flag": (message(weight=0.5), "message 2 has weight 0.5"),
    "malformed tools": ({**GOOD, "tools": "[{]"}, "'tools' is text that is not JSON"),
    "malformed chat_template_kwargs": ({**GOOD, "chat_template_kwargs": 1}, "'chat_template_kwargs' is a number"),
    "invalid JSON": ('{"messages": [}', "the line is not JSON"),
    "not Unicode": ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "half of a surrogate pair"),
}
MORE_BAD = [
    (
        message(content=[{"type": "audio", "url": "x"}]),
        "message 2 has a part of type 'audio'; parts of type 'text', 'image' and 'video' are read",
    ),
    (message(content=["Hello"]), "message 2 has a part that is text"),
    (message(tool_calls=[{"function": {"arguments": {}}}]), "message 2: a tool call has no function name"),
    (
        message(tool_calls=[{"function": {"name": "f", "arguments": "{1"}}]),
        "message 2: 'arguments' is text that is not",
    ),
    (message(tool_calls=[{"name": "f", "arguments": [1]}]), "the arguments of 'f' are a list; make them an object"),
    ({"messages": [{"role": "user", "content": "Hi", "loss": True}]}, "asks for a loss on a turn of role 'user'"),
    ({"messages": [{"content": "Hi"}]}, "message 1 has no role; use one of"),
    ('{"messages": [{"role": "user", "content": NaN}]}', "NaN is no JSON number"),
]


@pytest.mark.parametrize(("row", "problem"), [*BAD.values(), *MORE_BAD])
def test_a_malformed_row_is_named(tmp_path, row, problem):
    path = write(tmp_path / "rows.jsonl", GOOD, row, GOOD)
    with pytest.raises(ValueError, match=problem) as error:
        load_conversations(path)
    text = str(error.value)
    assert text.startswith(f"{path}, line 2: ")
    assert text.endswith("Set on_bad_row='skip' to leave such rows out.")
    assert "\n" not in text


def test_skipped_rows_are_counted_by_reason_and_no_good_row_is_lost(tmp_path, caplog):
    good = [{"messages": turns(f"Hi {i}", f"Hello {i}")} for i in range(len(BAD))]
    lines = [line for row, (bad, _) in zip(good, BAD.values(), strict=True) for line in (row, bad)]
    path = write(tmp_path / "rows.jsonl", *lines, BAD["unknown role"][0])
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            loaded = load_conversations(path, on_bad_row="skip")
        assert loaded["messages"][:] == [row["messages"] for row in good]
        (record,) = caplog.records
        assert f"Left out {len(BAD) + 1} of {2 * len(BAD) + 1} rows: 2 unknown role, 1 " in record.message
        assert all(f"1 {reason}" in record.message for reason in BAD if reason != "unknown role")
        assert f"The first, {path}, line 2: the row is a list" in record.message


def test_a_cut_off_last_line(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD)[:-9])
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: the last line is not JSON .* the file seems cut off"):
        load_conversations(path)
    assert len(load_conversations(path, on_bad_row="skip")) == 1
    assert "1 cut-off last line" in caplog.text


def test_a_line_that_is_not_utf8(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"messages": "\xff"}\n')
    with pytest.raises(ValueError, match=r"line 2: the line is not UTF-8 .*convert the file"):
        load_conversations(path)


def test_a_broken_list_is_no_row_to_skip(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([GOOD, GOOD])[:-5])
    with pytest.raises(ValueError, match=r"rows.json is a JSON list that cannot be read \(.*line 1 column"):
        load_conversations(path, on_bad_row="skip")


def test_nothing_to_load(tmp_path):
    empty, bad = tmp_path / "empty.jsonl", write(tmp_path / "bad.jsonl", "[]", "{")
    empty.write_text("\n")
    with pytest.raises(ValueError, match=r"empty.jsonl is empty: there is no conversation in it"):
        load_conversations(empty)
    with pytest.raises(ValueError, match=r"All 2 rows are malformed \(1 not an object, 1 invalid JSON\)\. The first,"):
        load_conversations(bad, on_bad_row="skip")
    with pytest.raises(FileNotFoundError, match=r"There is no file 'none.jsonl'"):
        load_conversations("none.jsonl")
    with pytest.raises(ValueError, match=r"rows.csv' is of a kind that is not read here"):
        load_conversations(write(tmp_path / "rows.csv", "a,b"))
    with pytest.raises(ValueError, match="on_bad_row is 'ignore'"):
        load_conversations(empty, on_bad_row="ignore")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no .jsonl"):
        load_conversations(tmp_path / "folder")


def test_a_changed_file_is_read_anew(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert len(load_conversations(write(path, GOOD))) == 1
    assert len(load_conversations(write(path, GOOD, GOOD))) == 2
