"""`MoESFTTrainer` on conversations with images: the same step packed or padded, whoever decodes; clear refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import set_seed

from tests import vision
from tests.data.pictures import saved, tiny_processor, user
from xtuner_hf import MoESFTConfig, MoESFTTrainer, MoETrainer, MoETrainingArguments
from xtuner_hf.data import ImageTiler, InternVLProcessor, VisionCollator, load_conversations, prepare_dataset
from xtuner_hf.models.auto import model_class
from xtuner_hf.models.flops import TrainingFlops
from xtuner_hf.trainers import throughput
from xtuner_hf.trainers.history import HISTORY_FILE, read_history
from xtuner_hf.trainers.sequence import row_work


def small_model(processor, dtype=torch.float32):
    config = vision.config("internvl_moe")
    config.image_token_id = processor.image_token_id
    config.text_config.vocab_size = len(processor.tokenizer)
    set_seed(0)
    return model_class(config)(config).to(dtype)


@pytest.fixture
def processor():
    return tiny_processor(side=vision.IMAGE_SIZE, tile_length=vision.TOKENS_PER_TILE, max_patches=4)


@pytest.fixture
def rows(tmp_path):
    """Eight conversations; every other one has an image, of one tile or of five."""
    written = []
    for index in range(8):
        path = saved(tmp_path, f"{index}.png", 56 * (1 + index % 4), 56, seed=index)
        question = [{"type": "image", "path": path}] if index % 2 else []
        written.append({"messages": user(*question, "What is it? " * (1 + index % 3))})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in written))
    return load_conversations(path)


def trained(folder: Path, rows, processor, **arguments) -> tuple[dict[str, torch.Tensor], list[dict], MoESFTTrainer]:
    settings = {
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "assistant_only_loss": True,
        "max_length": None,
        "lr_scheduler_type": "constant",
    }
    trainer = MoESFTTrainer(
        model=small_model(processor),
        args=MoESFTConfig(output_dir=str(folder), **(settings | arguments)),
        train_dataset=rows,
        processing_class=processor,
    )
    trainer.train()
    weights = {name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()}
    return weights, read_history(folder / HISTORY_FILE), trainer


def test_packed_split_and_decoded_in_workers_is_the_same_step(tmp_path, rows, processor):
    """Packing changes which tiles are in a micro-batch and in which order, and not what is learned."""
    expected, history, trainer = trained(tmp_path / "padded", rows, processor)
    runs = {
        "padding-free": {"padding_free": True},
        "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "padding_free": True},
        "workers": {"dataloader_num_workers": 2},
    }
    for name, arguments in runs.items():
        weights, other, _ = trained(tmp_path / name, rows, processor, **arguments)
        worst = max((weights[key] - expected[key]).abs().max().item() for key in expected)
        assert worst < 2e-6, (name, worst)
        losses = [[entry["loss"] for entry in entries if "loss" in entry] for entries in (other, history)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert trainer.args.assistant_only_loss, "the arguments are as they were given"
    assert trainer.processing_class is processor
    before = dict(small_model(processor).named_parameters())
    moved = {name.split(".")[1] for name, tensor in expected.items() if not torch.equal(tensor, before[name])}
    assert moved >= {"vision_tower", "multi_modal_projector", "language_model"}


def test_packed_rows_and_evaluation(tmp_path, rows, processor):
    """All rows of a window are one micro-batch, in which everything is as without packing."""
    _, history, trainer = trained(
        tmp_path / "packed", rows, processor, packing=True, max_length=512, max_steps=1, balance_batches=True
    )
    _, padded, _ = trained(tmp_path / "padded", rows, processor, max_steps=1)
    losses = [next(entry["loss"] for entry in entries if "loss" in entry) for entries in (history, padded)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert trainer.evaluate(rows.select(range(4)))["eval_loss"] > 0


def test_the_processor_is_found_by_the_models_name(tmp_path, rows, processor):
    small_model(processor).save_pretrained(tmp_path / "tiny")
    processor.save_pretrained(tmp_path / "tiny")
    trainer = MoESFTTrainer(
        model=str(tmp_path / "tiny"),
        args=MoESFTConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, on_bad_image="skip"),
        train_dataset=rows,
        eval_dataset={"few": rows.select(range(2))},
    )
    assert isinstance(trainer.processing_class, InternVLProcessor)
    assert isinstance(trainer.data_collator, VisionCollator)
    assert trainer.data_collator.on_bad_image == "skip"
    assert [len(dataset["image_refs"]) for dataset in (trainer.train_dataset, trainer.eval_dataset["few"])] == [8, 2]
    trainer.save_model()
    assert InternVLProcessor.from_pretrained(str(tmp_path / "out")).to_dict() == processor.to_dict()


def test_pre_training_on_prepared_rows(tmp_path, rows, processor):
    """`MoETrainer` is given the collator, as for text."""
    trainer = MoETrainer(
        model=small_model(processor),
        args=MoETrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, logging_steps=1),
        data_collator=VisionCollator(pad_token_id=0, padding_free=True, tiler=ImageTiler(processor)),
        train_dataset=prepare_dataset(rows, processor, 256),
    )
    seen = []
    trainer.model.model.vision_tower.register_forward_pre_hook(
        lambda _, positional, keywords: seen.append(
            len(keywords.get("pixel_values", positional[0] if positional else ()))
        ),
        with_kwargs=True,
    )
    trainer.train()
    assert max(seen) > 1, "tiles reached the tower"


def test_work_of_a_row_counts_its_tiles(tmp_path, rows, processor):
    flops = TrainingFlops.of_model(small_model(processor))
    prepared = list(prepare_dataset(rows, processor, 512, packing=False))
    for index, row in enumerate(prepared):
        tiles = sum(token == processor.image_token_id for token in row["input_ids"]) // vision.TOKENS_PER_TILE
        length = len(row["input_ids"])
        assert row_work(flops, row) == pytest.approx(
            flops.per_token * length + flops.per_squared_length * length**2 + flops.per_tile * tiles
        )
        assert bool(tiles) == bool(index % 2)


def test_throughput_counts_tiles(tmp_path, rows, processor, monkeypatch):
    seen = []
    monkeypatch.setattr(throughput.ThroughputMeter, "stop", lambda self, totals: seen.append(totals.tolist()))
    trained(tmp_path / "run", rows, processor, max_steps=1)
    prepared = list(prepare_dataset(rows, processor, 512, packing=False))
    ids = [token for row in prepared for token in row["input_ids"]]
    tokens, documents, squares, tiles = seen[0]
    assert (tokens, documents) == (len(ids), 8)
    assert squares == sum(len(row["input_ids"]) ** 2 for row in prepared)
    assert tiles == ids.count(processor.image_token_id) // vision.TOKENS_PER_TILE


@pytest.mark.parametrize(
    ("config", "arguments"), [({"chat_template_path": "chat.jinja"}, {}), ({}, {"formatting_func": str})]
)
def test_what_comes_too_late_is_refused(tmp_path, rows, processor, config, arguments):
    (name,) = {**config, **arguments}
    with pytest.raises(ValueError, match=f"{name} .*, and processing_class is a processor: .*leave {name} out"):
        MoESFTTrainer(
            model=small_model(processor),
            args=MoESFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **config),
            train_dataset=rows,
            processing_class=processor,
            **arguments,
        )


def test_a_tokenizer_alone_is_refused(tmp_path, rows, processor):
    problem = r"^train_dataset\[1\]: the row has 1 images, and a tokenizer alone makes nothing of them: pass"
    with pytest.raises(ValueError, match=problem):
        MoESFTTrainer(
            model=small_model(processor),
            args=MoESFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False),
            train_dataset=rows,
            processing_class=processor.tokenizer,
        )
