"""The data of `MoESFTTrainer`: what TRL's trainer takes gives the same rows, and what TRL lacks is there."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, IterableDataset
from trl import SFTConfig, SFTTrainer

from tests.data.chat import TOOLS, learned_text, tiny_tokenizer, tool_conversation, turns
from tests.data.conftest import own_cache  # noqa: F401
from tests.ranks import run_on_ranks
from tests.tiny import build, moe_config
from xtuner_hf import MoESFTConfig, MoESFTTrainer, Qwen3MoeForCausalLM
from xtuner_hf.data import PackedCollator, load_conversations, prepare_dataset

LENGTHS = [3, 70, 11, 45, 130, 8, 25, 61, 90, 17, 33, 5]


def trainer(folder, dataset, ours: bool = True, tokenizer=None, **arguments):
    eval_dataset = arguments.pop("eval_dataset", None)
    args = (MoESFTConfig if ours else SFTConfig)(
        output_dir=str(folder),
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **({"max_length": 1024} | arguments),
    )
    return (MoESFTTrainer if ours else SFTTrainer)(
        model=build(Qwen3MoeForCausalLM, moe_config(vocab_size=260)),
        args=args,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer or tiny_tokenizer(),
    )


def conversations() -> Dataset:
    return Dataset.from_list([{"messages": turns("q" * (length % 7 + 1), "a" * length)} for length in LENGTHS])


DATASETS = {
    "messages": conversations(),
    "tools": Dataset.from_list(
        [{"messages": tool_conversation(city=city), "tools": json.dumps(TOOLS)} for city in ("Oslo", "Rome")]
    ),
    "prompt-completion": Dataset.from_list([{"prompt": "q" * 9, "completion": "a" * length} for length in LENGTHS]),
    "conversational prompt-completion": Dataset.from_list(
        [{"prompt": turns("q"), "completion": turns("q", "a" * length)[1:]} for length in LENGTHS]
    ),
    "text": Dataset.from_list([{"text": "t" * length} for length in LENGTHS]),
    "tokens": Dataset.from_list([{"input_ids": list(range(length))} for length in LENGTHS]),
    "from-value": Dataset.from_list(
        [{"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]}]
    ),
}
SETTINGS = {
    "plain": {},
    "cut at the end": {"max_length": 80, "on_long_row": "truncate"},
    "cut at the start": {"max_length": 80, "on_long_row": "truncate", "truncation_mode": "keep_end"},
    "packed": {"max_length": 256, "packing": True},
    "split and packed": {"max_length": 80, "packing": True, "packing_strategy": "bfd_split"},
    "cut and packed": {"max_length": 80, "packing": True, "on_long_row": "truncate"},
    "wrapped": {"max_length": 80, "packing": True, "packing_strategy": "wrapped"},
    "shuffled": {"max_length": 80, "on_long_row": "truncate", "shuffle_dataset": True},
    "shuffled and packed": {"max_length": 1024, "packing": True, "shuffle_dataset": True},
}


@pytest.mark.parametrize("kind", DATASETS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_rows_are_trls(tmp_path, kind, setting):
    arguments = SETTINGS[setting] | ({"max_length": 2048} if kind == "tools" else {})
    if kind in ("messages", "tools"):
        arguments["assistant_only_loss"] = True
    dataset = DATASETS[kind]
    ours = trainer(tmp_path, dataset, eval_dataset=dataset, **arguments)
    arguments.pop("on_long_row", None)
    trls = trainer(tmp_path, dataset, ours=False, eval_dataset={"held out": dataset}, **arguments)
    compare = ["input_ids", "labels"] + ["seq_lengths"] * ("seq_lengths" in trls.train_dataset.column_names)
    expected = trls.train_dataset.select_columns(compare)[:]
    assert ours.train_dataset.select_columns(compare)[:] == expected
    assert ours.eval_dataset.select_columns(compare)[:] == expected
    assert len(expected["input_ids"]) > 0
    assert trls.padding_free == ours.padding_free == ours.data_collator.padding_free


def test_every_token_is_learned_by_default_as_in_trl(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        ours = trainer(tmp_path, conversations())
    assert ours.train_dataset["labels"][:] == ours.train_dataset["input_ids"][:]
    trls = trainer(tmp_path, conversations(), ours=False)
    assert ours.train_dataset[:] == trls.train_dataset.select_columns(["input_ids", "labels"])[:]
    assert caplog.text.count("assistant_only_loss is False, as in TRL") == 1


def test_flags_and_tools_of_loaded_conversations(tmp_path):
    rows = [
        {"messages": turns("one", "First", "two", "Second")},
        {"messages": tool_conversation(city="Oslo", degrees=0.3), "tools": TOOLS},
    ]
    rows[0]["messages"][1]["loss"] = False
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = tiny_tokenizer()
    ours = trainer(tmp_path, load_conversations(path), assistant_only_loss=True, max_length=2048)
    learned = [learned_text(tokenizer, row) for row in ours.train_dataset]
    assert "Second" in learned[0]
    assert "First" not in learned[0]
    assert '"arguments": {"city": "Oslo", "degrees": 0.3}}' in learned[1]
    assert '"name": "add"' in tokenizer.decode(ours.train_dataset[1]["input_ids"])


@pytest.mark.parametrize("pad_to_multiple_of", [None, 64])
def test_prepared_rows_are_taken_as_they_are(tmp_path, pad_to_multiple_of):
    packed = prepare_dataset(conversations(), tiny_tokenizer(), 256)
    keywords = {"max_length": 256, "packing": True, "per_device_train_batch_size": 1, "max_steps": 2}
    ours = trainer(tmp_path, packed, pad_to_multiple_of=pad_to_multiple_of, eval_dataset=conversations(), **keywords)
    assert ours.train_dataset[:] == packed[:]
    assert type(ours.data_collator) is PackedCollator
    batch = next(iter(ours.get_train_dataloader()))
    assert (batch["position_ids"] == 0).sum() > 1
    assert ("token_mask" in batch) == (pad_to_multiple_of is not None)
    assert ours.train().training_loss > 0
    assert ours.evaluate()["eval_loss"] > 0
    unpacked = trainer(tmp_path, packed, max_length=256)
    with pytest.raises(ValueError, match=r"packed \('seq_lengths'\).*packing=True"):
        next(iter(unpacked.get_train_dataloader()))


def test_packed_rows_above_the_budget_are_split_or_named(tmp_path):
    """Packed to 256 tokens, trained on with a budget of 128."""
    packed = prepare_dataset(conversations(), tiny_tokenizer(), 256)
    budget = {"max_length": 128, "max_tokens_per_micro_batch": 128, "packing": True, "max_steps": 1}
    with pytest.raises(ValueError, match=r"\d+ of \d+ rows have more than max_tokens_per_micro_batch=128"):
        trainer(tmp_path, packed, **budget)
    ours = trainer(tmp_path, packed, on_long_row="split", eval_dataset=packed, **budget)
    lengths = [sum(row) for row in ours.train_dataset["seq_lengths"]]
    assert sum(lengths) == sum(map(len, packed["input_ids"]))
    assert max(lengths) <= 128 < max(map(len, packed["input_ids"]))
    assert all(batch["input_ids"].shape[1] <= 128 for batch in ours.get_train_dataloader())
    assert ours.eval_dataset[:] == packed[:]


def test_a_streamed_data_set(tmp_path):
    rows = list(conversations())
    streamed = IterableDataset.from_generator(lambda: iter(rows))
    arguments = {"assistant_only_loss": True, "max_length": 256, "packing": True, "max_steps": 1}
    ours = trainer(tmp_path, streamed, **arguments)
    assert list(ours.train_dataset) == list(trainer(tmp_path, conversations(), **arguments).train_dataset)


def test_bad_input_is_one_sentence(tmp_path):
    cases = [
        (Dataset.from_dict({"messages": []}), {}, "train_dataset is empty"),
        (
            Dataset.from_list([{"messages": []}]),
            {"assistant_only_loss": True},
            r"train_dataset\[0\]: 'messages' is empty",
        ),
        (
            Dataset.from_list([{"messages": turns("a", "b")}, {"messages": []}]),
            {},
            r"train_dataset\[1\]: 'messages' is",
        ),
        (conversations(), {"tokenizer": tiny_tokenizer(None)}, "has no chat template"),
        (conversations(), {"max_length": 100}, r"train_dataset: 4 of 12 rows have more than max_length=100 tokens"),
        (conversations(), {"packing": True, "max_length": None}, "packing needs a window"),
        (
            conversations(),
            {"tokenizer": unmarked(), "assistant_only_loss": True},
            "does not mark what the assistant says",
        ),
    ]
    for dataset, arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, dataset, **arguments)
    with pytest.raises(ValueError, match=r"eval_dataset\[0\]: message 1 has role 'bot'"):
        trainer(
            tmp_path,
            conversations(),
            eval_dataset=Dataset.from_list([{"messages": [{"role": "bot", "content": "x"}]}]),
        )


def unmarked():
    tokenizer = tiny_tokenizer(None)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    return tokenizer


def test_the_tokenizer_comes_with_the_checkpoint(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    build(Qwen3MoeForCausalLM, moe_config(vocab_size=260)).save_pretrained(checkpoint)
    args = MoESFTConfig(output_dir=str(tmp_path / "out"), report_to=[], use_cpu=True, bf16=False)
    tiny_tokenizer(None).save_pretrained(checkpoint)
    with pytest.raises(ValueError, match="has no chat template"):
        MoESFTTrainer(model=str(checkpoint), args=args, train_dataset=conversations())
    tiny_tokenizer().save_pretrained(checkpoint)
    made = MoESFTTrainer(model=str(checkpoint), args=args, train_dataset=conversations())
    assert made.train_dataset[0]["input_ids"] == trainer(tmp_path, conversations()).train_dataset[0]["input_ids"]
    with pytest.raises(ValueError, match="pass one as processing_class"):
        MoESFTTrainer(
            model=build(Qwen3MoeForCausalLM, moe_config(vocab_size=260)), args=args, train_dataset=conversations()
        )


def train_from_file(path: str, cache: str, folder: str) -> dict:
    """One rank of a job: from a file of conversations to two optimizer steps on packed rows."""
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    made = trainer(
        folder,
        load_conversations(path, on_bad_row="skip"),
        assistant_only_loss=True,
        packing=True,
        max_length=256,
        per_device_train_batch_size=1,
        max_steps=2,
        save_strategy="no",
    )
    made.train()
    return {"rows": made.train_dataset[:], "files": made.train_dataset.cache_files}


def test_ranks_share_one_preparation(tmp_path, own_cache):  # noqa: F811
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in conversations()) + '{"messages": []}\n')
    ranks = run_on_ranks(
        "tests.trainers.test_sft:train_from_file",
        2,
        path=str(path),
        cache=str(own_cache),
        folder=str(tmp_path / "out"),
    )
    assert ranks[0] == ranks[1]
    assert (
        ranks[0]["rows"]
        == trainer(tmp_path, conversations(), assistant_only_loss=True, packing=True, max_length=256).train_dataset[:]
    )
    files = {Path(file["filename"]).name for file in ranks[0]["files"]}
    assert files <= {file.name for file in own_cache.rglob("cache-*.arrow")}
    assert not list(own_cache.rglob("tmp*")), "no rank wrote beside the cache"
