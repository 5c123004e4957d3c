"""Short runs of preferences and of reinforcement with images: rows with none, one and two of them, of several sizes."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from PIL import Image

from tests import vision
from tests.data.pictures import SIDE, picture, tiny_processor
from tests.trainers import preference_scenario, rl_scenario
from tests.trainers.scenario import full

ANSWERS = ("yes it is", "no", "a red one on the left", "two", "the small one", "none at all", "green", "left")


def policy(processor: Any, seed: int = 0) -> torch.nn.Module:
    """In fp64; its tiles are the processor's."""
    torch.manual_seed(seed)
    sizes = {"image_size": [SIDE, SIDE], "patch_size": [SIDE // 4, SIDE // 4]}
    names = {"vocab_size": len(processor.tokenizer), "image_token_id": processor.image_token_id}
    model = vision.ours("internvl_moe", torch.float64, "xtuner_reference", **sizes, **names)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * seed * torch.randn_like(parameter)
    return model


def images_of(index: int) -> list[Image.Image]:
    """0, 1, 2, 0, ...; two of three are cut into several tiles."""
    return [picture(SIDE * (1 + (index + each) % 3), SIDE, seed=10 * index + each) for each in range(index % 3)]


def prompt(index: int) -> list[dict]:
    return [{"role": "user", "content": f"what is number {index} and is it red?"}]


def pairs(number: int = 8) -> list[dict]:
    return [
        {
            "images": images_of(index),
            "prompt": prompt(index),
            "chosen": [{"role": "assistant", "content": ANSWERS[index % 8]}],
            "rejected": [{"role": "assistant", "content": ANSWERS[(3 * index + 1) % 8]}],
        }
        for index in range(number)
    ]


def make(kind: str, folder: str, **settings: Any):
    """A trainer and its recorder."""
    import xtuner_hf

    classes = getattr(xtuner_hf, kind), getattr(xtuner_hf, kind.replace("Trainer", "Config"))
    processor = tiny_processor(max_patches=3)
    common = {"model": policy(processor), "processing_class": processor, "remove_unused_columns": False}
    common |= {"router_aux_loss_coef": 0.0, "max_grad_norm": 0.0, "experts_kernel": "reference"}
    if kind == "MoEGRPOTrainer":
        rows = [{"images": images_of(index), "prompt": prompt(index)} for index in range(8)]
        data = {"train_dataset": Dataset.from_list(rows)}
        return rl_scenario.make_trainer(*classes, folder, **(common | data | settings))[:2]
    data = {"train_dataset": Dataset.from_list(pairs()), "ref_model": policy(processor, seed=1), "max_length": None}
    defaults = {"batch": 8, "accumulation": 1, "steps": 1}
    return preference_scenario.make_trainer(*classes, folder, **(defaults | common | data | settings))


def train(kind: str, folder: str, **settings: Any) -> dict:
    trainer, recorder = make(kind, folder, **settings)
    preference_scenario.run_quickly(trainer)
    state = {name: full(tensor) for name, tensor in trainer.model.state_dict().items()}
    return {"logs": recorder.logs, "grads": recorder.grads, "state": state}


def train_all(runs: list[dict]) -> list[dict]:
    return [train(**run) for run in runs]
