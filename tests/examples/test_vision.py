"""The example on images of its kind, a few steps; the stages of InternVL as arguments of the trainer."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from transformers import HfArgumentParser

from xtuner_hf import MoESFTConfig
from xtuner_hf.data import ImageTiler

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
COLORS = ("red", "green", "blue", "black")


@pytest.fixture
def example(monkeypatch):
    def load(name: str):
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return __import__(name)

    return load


def shapes(folder: Path, number: int) -> list[dict]:
    """As `questions` of the example gives them."""
    rows = []
    for index in range(number):
        color, is_circle = COLORS[index % 4], index % 3 > 0
        image = Image.new("RGB", (64, 64), "white")
        draw = ImageDraw.Draw(image)
        (draw.ellipse if is_circle else draw.rectangle)((20, 20, 44, 44), fill=color)
        path = str(folder / f"{index}.png")
        image.save(path)
        shown = {"role": "user", "images": [{"path": path, "width": 64, "height": 64}]}
        asked = {"what color is the shape?": color, "is there a circle?": "yes" if is_circle else "no"}
        rows += [
            {"messages": [shown | {"content": f"<image>\n{text}"}, {"role": "assistant", "content": answer}]}
            for text, answer in asked.items()
        ]
    return rows


@pytest.mark.skipif(find_spec("easy_vqa") is None, reason="`make` installs easy-vqa, for this example alone")
def test_the_questions(example):
    vision = example("vision")
    train, test = vision.questions("train"), vision.questions("test")
    assert (len(train), len(test)) == (38_575, 9_673)
    assert vision.baselines(train, test) == pytest.approx((0.3733, 0.6700), abs=1e-4)
    question, answer = train[5]["messages"]
    assert (question["content"], answer["content"]) == ("<image>\ndoes the image not contain a gray shape?", "yes")
    assert Path(question["images"][0]["path"]).is_file()


def test_a_few_steps(example, tmp_path, monkeypatch, capsys):
    vision = example("vision")
    rows = shapes(tmp_path, 40)
    monkeypatch.setattr(vision, "questions", lambda split: rows[:60] if split == "train" else rows[60:])
    monkeypatch.setattr(sys, "argv", ["vision.py", "--output_dir", str(tmp_path / "out"), "--max_steps", "4"])
    vision.main()
    printed = capsys.readouterr().out
    assert "% of 20 held-out questions answered right; always the most frequent answer: " in printed
    for name in ("accuracy.png", "answers.png", "training.png", "processor_config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).stat().st_size > 1000 or name == "processor_config.json"
    blind, of_question = vision.baselines(rows[:60], rows[60:])
    assert (blind, of_question) == (pytest.approx(0.35, abs=0.11), pytest.approx(0.45, abs=0.11))


def test_right_answers_are_those_that_greedy_decoding_writes(example, tmp_path):
    """Against generate() itself, with a model that has learned one of two answers by heart."""
    vision = example("vision")
    rows = shapes(tmp_path, 6)
    processor = vision.build_processor(rows)
    model = vision.build_model(processor)
    prepared = vision.prepare_dataset(vision.Dataset.from_list(rows), processor, 1024, name="rows")
    collator = vision.VisionCollator(pad_token_id=0, tiler=ImageTiler(processor), padding_free=True)
    optimizer = vision.torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(12):
        batch = collator(list(prepared))
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    right = vision.right_answers(model, prepared, collator)
    written = [vision.write_answer(model, processor, row) == row["messages"][1]["content"] for row in rows]
    assert len(right) == len(rows)
    assert sorted(right) == sorted(written), "packing changes their order alone"
    assert 0 < sum(right) < len(rows)


@pytest.mark.parametrize("stage", ["projector-2.5", "vision-2.5", "sft-3.5-241b"])
def test_stages_are_arguments_of_the_trainer(example, stage, tmp_path):
    stages = example("vision_stages")
    given = ["--output_dir", str(tmp_path), "--use_cpu", "--max_length", "512"]
    parser = HfArgumentParser(MoESFTConfig)
    (args,) = parser.parse_args_into_dataclasses(stages.stage_arguments(stage, given) + given)
    for name, value in {**stages.COMMON, **stages.STAGES[stage]}.items():
        assert getattr(args, name) == (512 if name == "max_length" else value), name


def test_every_stage_can_be_asked_for(example, tmp_path):
    stages = example("vision_stages")
    for settings in stages.STAGES.values():
        MoESFTConfig(output_dir=str(tmp_path), use_cpu=True, **stages.COMMON, **settings)


def test_help_of_the_stages_asks_for_none(example, monkeypatch, capsys):
    stages = example("vision_stages")
    monkeypatch.setattr(sys, "argv", ["vision_stages.py", "--help"])
    stages.main()
    assert "--stage STAGE" in capsys.readouterr().out
