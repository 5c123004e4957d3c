"""`prepare_dataset`: from conversations or texts to what the trainers take, and `MoETrainer` training on it."""

from __future__ import annotations

import itertools
import json

import pytest
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback

from tests.data.chat import learned_text, tiny_tokenizer, turns
from tests.tiny import build, moe_config
from xtuner_hf import MoETrainer, MoETrainingArguments, Qwen3MoeForCausalLM
from xtuner_hf.data import PackedCollator, load_conversations, prepare_dataset


def conversations(tmp_path, count: int = 24) -> Dataset:
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": turns(f"question {i}", "word " * (1 + i % 7))} for i in range(count)]
    if not path.exists():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_conversations(path)


def documents(packed: Dataset) -> list[list[int]]:
    found = []
    for row in packed:
        ends = list(itertools.accumulate(row["seq_lengths"], initial=0))
        found += [row["input_ids"][start:end] for start, end in itertools.pairwise(ends)]
    return sorted(found)


def test_conversations(tmp_path):
    tokenizer = tiny_tokenizer()
    plain = prepare_dataset(conversations(tmp_path), tokenizer, 256, packing=False)
    packed = prepare_dataset(conversations(tmp_path), tokenizer, 256)
    assert plain.column_names == ["input_ids", "labels"]
    assert packed.column_names == ["input_ids", "labels", "seq_lengths"]
    assert documents(packed) == sorted(plain["input_ids"][:])
    assert len(packed) < len(plain) / 2
    assert "question" not in learned_text(tokenizer, packed[0])
    assert "question" in learned_text(
        tokenizer, prepare_dataset(conversations(tmp_path), tokenizer, 256, assistant_only_loss=False)[0]
    )


def test_texts_and_tokens():
    texts = Dataset.from_dict({"text": ["a", "bcd", "ef"] * 10})
    packed = prepare_dataset(texts, tiny_tokenizer(None), 32)
    tokens = prepare_dataset(texts, tiny_tokenizer(None), 32, packing=False).remove_columns("labels")
    assert prepare_dataset(tokens, tiny_tokenizer(None), 32)[:] == packed[:]
    assert prepare_dataset(packed, tiny_tokenizer(None), 32) is packed
    streamed = IterableDataset.from_generator(lambda: iter(texts))
    assert list(prepare_dataset(streamed, tiny_tokenizer(None), 32)) == list(packed)


def test_a_second_run_takes_all_from_the_cache(tmp_path):
    files = [prepare_dataset(conversations(tmp_path), tiny_tokenizer(), 256).cache_files for _ in range(2)]
    assert files[0] == files[1]
    assert files[0]
    assert prepare_dataset(conversations(tmp_path), tiny_tokenizer(), 200).cache_files != files[0]


def test_bad_input(tmp_path):
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="corpus is empty: there is nothing to train on"):
        prepare_dataset(Dataset.from_dict({"text": []}), tokenizer, 32, name="corpus")
    with pytest.raises(ValueError, match="corpus has the columns question, answer; prepare_dataset reads 'messages'"):
        prepare_dataset(Dataset.from_dict({"question": ["a"], "answer": ["b"]}), tokenizer, 32, name="corpus")
    with pytest.raises(ValueError, match="has no chat template"):
        prepare_dataset(conversations(tmp_path), tiny_tokenizer(None), 256, assistant_only_loss=False)
    with pytest.raises(ValueError, match="dataset: 24 of 24 rows have more than max_length=20 tokens"):
        prepare_dataset(conversations(tmp_path), tokenizer, 20)
    assert (
        max(map(len, prepare_dataset(conversations(tmp_path), tokenizer, 20, on_long_row="split")["input_ids"])) == 20
    )


class RecordingCollator(PackedCollator):
    """Notes the rows of each batch."""

    def torch_call(self, examples):
        self.seen.append([(tuple(row["input_ids"]), tuple(row["seq_lengths"])) for row in examples])
        return super().torch_call(examples)


class StopAfter(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def run(folder, rows: Dataset, stop: int | None = None, resume: bool = False, seed: int = 3) -> list:
    collator = RecordingCollator(pad_token_id=256, padding_free=True, pad_to_multiple_of=16)
    collator.seen = []
    args = MoETrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        save_strategy="steps",
        save_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        seed=seed,
    )
    trainer = MoETrainer(
        model=build(Qwen3MoeForCausalLM, moe_config(vocab_size=260)),
        args=args,
        train_dataset=rows,
        data_collator=collator,
        callbacks=[StopAfter(stop)] if stop else [],
    )
    trainer.train(resume_from_checkpoint=resume)
    return collator.seen


def test_packed_rows_keep_their_documents_and_their_order_on_resume(tmp_path):
    """`seq_lengths` reaches the collator with the default arguments, and a resumed run skips what was seen."""
    rows = prepare_dataset(conversations(tmp_path), tiny_tokenizer(), 256)
    rows = rows.select(range(6))  # whole steps of two
    whole = run(tmp_path / "whole", rows)
    assert len(whole) == 2 * len(rows)
    first_epoch, second_epoch = whole[: len(rows)], whole[len(rows) :]
    assert sorted(first_epoch) == sorted(second_epoch)
    assert first_epoch != second_epoch, "each epoch has its own order"
    assert run(tmp_path / "other", rows, seed=4) != whole
    begun = run(tmp_path / "stopped", rows, stop=2)
    again = prepare_dataset(conversations(tmp_path), tiny_tokenizer(), 256).select(range(6))
    rest = run(tmp_path / "stopped", again, resume=True)
    assert begun[:4] == whole[:4], "two steps of two rows; the loader fetches one ahead"
    assert rest == whole[4:]
