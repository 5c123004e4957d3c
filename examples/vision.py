"""A small InternVL-MoE learns to answer questions about images, from random weights, on a CPU.

    pip install easy-vqa==1.0
    python examples/vision.py --output_dir vision_output

4,000 images of one coloured shape and 38,575 questions about them (package easy-vqa, MIT), such as "what color is the
shape?" and "is there not a circle in the image?", with one of 13 answers. `accuracy.png` shows the share of right
answers to held-out questions about held-out images while training goes on, `answers.png` some of them with their
images, as the model writes them. Right is an answer that greedy decoding writes to the letter, its end included.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from matplotlib.figure import Figure
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import InternVLConfig, PreTrainedTokenizerFast, TrainerCallback, set_seed
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from xtuner_hf import AutoModelForImageTextToText, MoESFTConfig, MoESFTTrainer
from xtuner_hf.data import InternVLProcessor, VisionCollator, prepare_dataset
from xtuner_hf.data.tokenize import internvl_template
from xtuner_hf.trainers.progress import format_duration

SIDE, PATCH = 64, 8
TILE_LENGTH = (SIDE // PATCH // 2) ** 2  # 2 x 2 patches make a token
IMAGE_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
HIDDEN = 96
WINDOW = 1024  # tokens of a packed row: about 24 questions


def questions(split: str) -> list[dict[str, Any]]:
    """Rows of `messages` with an image, and its size, so that no file is opened before a batch needs it."""
    import easy_vqa

    texts, answers, numbers = getattr(easy_vqa, f"get_{split}_questions")()
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    return [
        {
            "messages": [
                {
                    "role": "user",
                    "content": f"<image>\n{text}",
                    "images": [{"path": paths[number], "width": SIDE, "height": SIDE}],
                },
                {"role": "assistant", "content": answer},
            ]
        }
        for text, answer, number in zip(texts, answers, numbers, strict=True)
    ]


def build_processor(rows: list[dict[str, Any]]) -> InternVLProcessor:
    """Byte pairs learned from the questions, InternVL's tokens and template, tiles of the images' size."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *IMAGE_TOKENS.values()]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    texts = (message["content"].removeprefix("<image>") for row in rows for message in row["messages"])
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=IMAGE_TOKENS,
        chat_template=internvl_template(),
    )
    images = GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        image_mean=(0.485, 0.456, 0.406),
        image_std=(0.229, 0.224, 0.225),
        crop_to_patches=True,
    )
    return InternVLProcessor(images, tokenizer, image_seq_length=TILE_LENGTH)


def build_model(processor: InternVLProcessor) -> Any:
    """InternViT, a projector, and Qwen3-MoE with eight experts a layer, of which a token meets two."""
    # Hub models start from 0.02, which suits their width; so small a model learns to look much sooner from more.
    shared = {
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "intermediate_size": 2 * HIDDEN,
        "initializer_range": 0.1,
    }
    config = InternVLConfig(
        vision_config={
            **{"num_hidden_layers": 4, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH], **shared},
            **{"attention_bias": True, "layer_scale_init_value": 1.0},
        },
        text_config={
            **{"model_type": "qwen3_moe", "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": HIDDEN // 4},
            **{"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
            **{"vocab_size": len(processor.tokenizer), "max_position_embeddings": WINDOW, **shared},
            **{"tie_word_embeddings": False, "eos_token_id": processor.tokenizer.eos_token_id},
        },
        image_token_id=processor.image_token_id,
        image_seq_length=TILE_LENGTH,
        tie_word_embeddings=False,
    )
    model = AutoModelForImageTextToText.from_config(config)
    torch.nn.init.normal_(model.model.vision_tower.embeddings.position_embeddings, std=0.1)  # they start at 0
    return model


@torch.no_grad()
def right_answers(model: Any, rows: Dataset, collator: VisionCollator) -> list[bool]:
    """For each document, whether greedy decoding would write its answer: whether each label is the likeliest token."""
    was_training, found = model.training, []
    model.eval()
    for row in rows:
        batch = {
            key: value.to(model.device) if torch.is_tensor(value) else value for key, value in collator([row]).items()
        }
        labels = batch.pop("labels")[0, 1:]
        right = (model(**batch).logits[0, :-1].argmax(-1) == labels) | (labels == -100)
        ends = batch["cu_seq_lens_q"][1:] - 1  # label i is that of token i + 1: the last of a document has none
        wrong_before = torch.cat([right.new_zeros(1).long(), (~right).long().cumsum(0)])
        counts = wrong_before[torch.cat([ends.new_zeros(1), ends]).long()].diff()
        found += (counts == 0).tolist()
    model.train(was_training)
    return found


class Accuracy(TrainerCallback):
    """The share of right answers every so many steps, drawn each time: a run that is stopped leaves its curve."""

    def __init__(self, rows: Dataset, collator: VisionCollator, every: int, draw: Callable[[list], None]):
        self.rows, self.collator, self.every, self.draw = rows, collator, every, draw
        self.curve: list[tuple[int, float]] = []

    def measure(self, step: int, model: Any) -> None:
        right = right_answers(model, self.rows, self.collator)
        self.curve.append((step, sum(right) / len(right)))
        print(f"step {step}: {self.curve[-1][1]:.1%} of {len(right):,} held-out questions answered right")
        self.draw(self.curve)

    def on_train_begin(self, args, state, control, model=None, **_):
        self.measure(0, model)

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.measure(state.global_step, model)


def baselines(train: list[dict[str, Any]], test: list[dict[str, Any]]) -> tuple[float, float]:
    """Held-out accuracy without looking: of the most frequent answer, and of the most frequent one to each question."""
    by_question: dict[str, Counter] = defaultdict(Counter)
    overall: Counter = Counter()
    for row in train:
        question, answer = (message["content"] for message in row["messages"])
        by_question[question][answer] += 1
        overall[answer] += 1
    pairs = [tuple(message["content"] for message in row["messages"]) for row in test]
    (most_frequent, _), *_ = overall.most_common(1)
    blind = sum(answer == most_frequent for _, answer in pairs) / len(pairs)
    of_question = sum(answer == by_question[question].most_common(1)[0][0] for question, answer in pairs) / len(pairs)
    return blind, of_question


def draw_accuracy(curve: list[tuple[int, float]], without_looking: tuple[float, float], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*curve, strict=True), marker="o", label="model, held-out images")
    for value, style, name in zip(
        without_looking, ("--", ":"), ("most frequent answer", "... to each question"), strict=True
    ):
        axes.axhline(value, color="gray", linestyle=style, label=f"{name}: {value:.0%}")
    axes.set(xlabel="optimizer step", ylabel="right answers", ylim=(0, 1.02))
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=110)


@torch.no_grad()
def write_answer(model: Any, processor: InternVLProcessor, row: dict[str, Any]) -> str:
    """What greedy decoding writes under the row's question."""
    question = row["messages"][0]
    text = question["content"].replace("<image>", processor.image_token)
    prompt = processor.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    with Image.open(question["images"][0]["path"]) as image:
        inputs = processor(images=[image.convert("RGB")], text=prompt, return_tensors="pt").to(model.device)
    tokens = model.eval().generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(tokens, skip_special_tokens=True)


def draw_answers(model: Any, processor: InternVLProcessor, rows: list[dict[str, Any]], path: Path) -> None:
    """Images, questions, and what the model writes."""
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    for axes, row in zip(figure.subplots(3, len(rows) // 3).flat, rows, strict=True):
        question, answer = row["messages"]
        written = write_answer(model, processor, row)
        mark = "" if written == answer["content"] else f" (is: {answer['content']})"
        with Image.open(question["images"][0]["path"]) as image:
            axes.imshow(image)
        axes.set_title(question["content"].removeprefix("<image>\n") + f"\n{written}{mark}", fontsize=7)
        axes.axis("off")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("vision_output"))
    parser.add_argument("--max_steps", type=int, default=1500)
    parser.add_argument("--num_questions", type=int, default=None, help="of the training questions; all by default")
    parser.add_argument("--num_held_out", type=int, default=1000, help="held-out questions while training goes on")
    options = parser.parse_args()
    started, folder = time.monotonic(), options.output_dir
    set_seed(0)
    train, test = questions("train")[: options.num_questions], questions("test")
    without_looking = baselines(train, test)
    processor = build_processor(train)
    model = build_model(processor)
    some = test[:: max(1, len(test) // options.num_held_out)]
    held_out, while_training = (
        prepare_dataset(Dataset.from_list(rows), processor, WINDOW, name="held-out questions") for rows in (test, some)
    )
    trainer = MoESFTTrainer(
        model=model,
        args=MoESFTConfig(
            output_dir=str(folder),
            max_steps=options.max_steps,
            per_device_train_batch_size=2,
            packing=True,
            max_length=WINDOW,
            assistant_only_loss=True,
            learning_rate=2e-3,
            router_aux_loss_coef=0.01,
            lr_scheduler_type="cosine",
            warmup_steps=min(50, options.max_steps // 10),
            gradient_checkpointing=False,
            dataloader_num_workers=1,  # decodes images while the model computes
            logging_steps=max(1, options.max_steps // 40),
            save_strategy="no",
            report_to="none",
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list(train),
        processing_class=processor,
    )
    draw = partial(draw_accuracy, without_looking=without_looking, path=folder / "accuracy.png")
    trainer.add_callback(Accuracy(while_training, trainer.data_collator, max(1, options.max_steps // 9), draw))
    trainer.train()
    trainer.save_model()
    right = right_answers(trainer.model, held_out, trainer.data_collator)
    draw_answers(trainer.model, processor, test[:: max(1, len(test) // 15)][:15], folder / "answers.png")
    used = sum(resource.getrusage(who).ru_utime for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(
        f"\n{sum(right) / len(right):.1%} of {len(right):,} held-out questions answered right; always the most "
        f"frequent answer: {without_looking[0]:.1%}, the most frequent one to each question: {without_looking[1]:.1%}\n"
        f"{format_duration(time.monotonic() - started)}, {used:,.0f} CPU seconds\n"
        f"figures  {folder / 'accuracy.png'}  {folder / 'answers.png'}"
    )


if __name__ == "__main__":
    main()
