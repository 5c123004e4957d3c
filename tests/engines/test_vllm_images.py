"""Checkpoints of InternVL and Intern-S1 in a real vLLM on the CPU: the same greedy tokens as our models, with an image
and without."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

from tests import vision
from tests.data.pictures import picture, tiny_processor
from tests.engines.test_vllm import PYTHON, engine_environment
from tests.ranks import REPO
from xtuner_hf import AutoModelForImageTextToText

pytestmark = pytest.mark.engine

TORCHVISION = PYTHON.parent.parent / "images"

# Changes to the language model: vLLM has no windows in some of the layers.
MODELS: dict[str, dict] = {
    "internvl_dense": {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 2},
    "internvl_moe": {},
    "interns1": {},
}
PROMPTS = {
    "text": "<|im_start|>user\nwhat is this?<|im_end|>\n<|im_start|>assistant\n",
    "image": "<|im_start|>user\n<IMG_CONTEXT>\nwhat is this?<|im_end|>\n<|im_start|>assistant\n",
}
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> tuple:
    """The checkpoints, the image, and what vLLM says with each."""
    if not PYTHON.exists() or not TORCHVISION.exists():
        missing = "vLLM" if not PYTHON.exists() else "torchvision"
        pytest.fail(
            f"There is no {missing} in {PYTHON.parent.parent}: run `make engine` to install it (a few minutes)."
        )
    folder = tmp_path_factory.mktemp("checkpoints")
    side = vision.IMAGE_SIZE
    processor = tiny_processor(side=side, tile_length=vision.TOKENS_PER_TILE, max_patches=3)
    for name, changes in MODELS.items():
        model = vision.ours(name, vocab_size=512, image_token_id=processor.image_token_id, text=changes)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    # One tile, so that nothing is resized: Pillow and torchvision do not agree to the last bit.
    image = picture(side, side)
    image.save(folder / "image.png")
    request = {"models": {name: str(folder / name) for name in MODELS}, "image": str(folder / "image.png")}
    request |= {"prompts": PROMPTS, "max_tokens": NEW_TOKENS}
    (folder / "request.json").write_text(json.dumps(request))
    command = [str(PYTHON), str(REPO / "tests" / "engines" / "vllm_images.py"), "request.json", "answer.json"]
    environment = engine_environment() | {"HF_MODULES_CACHE": str(folder / "modules"), "PYTHONPATH": str(TORCHVISION)}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    pixels = processor(images=[image], text=["<IMG_CONTEXT>"], return_tensors="pt")["pixel_values"]
    return folder, pixels, json.loads((folder / "answer.json").read_text())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_vllm_generates_what_our_model_does(name, prompt, served):
    folder, pixels, answers = served
    found = answers[name][prompt]
    model = AutoModelForImageTextToText.from_pretrained(folder / name, dtype=torch.float32).eval()
    whole = torch.tensor([found["prompt"] + found["tokens"]])
    tokens_of_images = int((whole == model.config.image_token_id).sum())
    assert tokens_of_images == (vision.TOKENS_PER_TILE if prompt == "image" else 0)
    with torch.no_grad():
        logits = model(whole, pixel_values=pixels if prompt == "image" else None, use_cache=False).logits
    logprobs = logits[0, len(found["prompt"]) - 1 : -1].log_softmax(-1)
    assert found["tokens"] == logprobs.argmax(-1).tolist()
    chosen = logprobs.gather(1, torch.tensor(found["tokens"])[:, None])[:, 0]
    assert (chosen - torch.tensor(found["logprobs"])).abs().max() < 1e-4
