"""DPO, MPO and GRPO with images: each row sees its own, whatever its neighbours have."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.image_utils import make_flat_list_of_images

from tests.data.pictures import tiny_processor
from tests.ranks import run_on_ranks
from tests.trainers.preference_scenario import run_quickly
from tests.trainers.test_dpo import TOLERANCE, assert_same_run, gradients, worst
from tests.trainers.vision_alignment import images_of, make, pairs, policy, prompt, train
from xtuner_hf.data.preference import with_image_list

RUNS = {
    "DPO, split": {"kind": "MoEDPOTrainer", "batch": 2, "accumulation": 2, "ep_size": 2},
    "MPO, split": {"kind": "MoEMPOTrainer", "batch": 2, "accumulation": 2, "ep_size": 2},
    "DPO, rows shared": {"kind": "MoEDPOTrainer", "batch": 4, "accumulation": 2, "sp_size": 2},
}


@pytest.fixture(scope="module")
def on_2_ranks(tmp_path_factory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("ranks")
    runs = [{**run, "folder": str(folder / str(index))} for index, run in enumerate(RUNS.values())]
    ranks = run_on_ranks("tests.trainers.vision_alignment:train_all", 2, runs=runs)
    return {name: [rank[index] for rank in ranks] for index, name in enumerate(RUNS)}


def answer_logps(model, processor, row: dict, answer: list[dict]) -> torch.Tensor:
    """Log-probability of each token of an answer, the row alone and its images alone."""
    images = [{"type": "image"} for _ in row["images"]]
    question = [{"role": "user", "content": [*images, {"type": "text", "text": row["prompt"][0]["content"]}]}]
    asked = processor.apply_chat_template(question, add_generation_prompt=True)
    said = processor.apply_chat_template([*question, *answer])
    assert said.startswith(asked)
    inputs = processor(images=row["images"] or None, text=[asked], return_tensors="pt")
    ids = processor.tokenizer(said[len(asked) :], return_tensors="pt")["input_ids"]
    whole = torch.cat([inputs["input_ids"], ids], 1)
    logits = model(whole, pixel_values=inputs.get("pixel_values"), use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, whole[0, 1:, None])[:, 0][-ids.shape[1] :]


def test_dpo_is_the_formula(tmp_path, tolerance):
    run = train("MoEDPOTrainer", str(tmp_path))
    processor = tiny_processor(max_patches=3)
    model, reference = policy(processor), policy(processor, seed=1)
    loss = 0.0
    for row in pairs():
        logps = {name: answer_logps(model, processor, row, row[name]) for name in ("chosen", "rejected")}
        with torch.no_grad():
            before = {name: answer_logps(reference, processor, row, row[name]) for name in ("chosen", "rejected")}
        rewards = {name: 0.3 * (logps[name].sum() - before[name].sum()) for name in logps}
        loss = loss - F.logsigmoid(rewards["chosen"] - rewards["rejected"]) / 8
    assert run["logs"][0]["loss"] == pytest.approx(loss.item(), rel=TOLERANCE)
    expected = gradients(loss, model)
    expected = {name: grad for name, grad in expected.items() if "k_proj.bias" not in name}
    found = {name: grad for name, grad in run["grads"][0].items() if name in expected}
    assert expected["model.vision_tower.embeddings.patch_embeddings.projection.weight"].abs().max() > 1e-4
    # Gradients of the tower are sums over many tokens that nearly cancel: rounding of the kernel shows more in them.
    assert worst(found, expected) < 5 * tolerance


@pytest.mark.parametrize("name", RUNS)
def test_split_over_ranks_experts_and_micro_batches(name, on_2_ranks, tmp_path):
    """Rows with 0, 1 and 2 images, padded to one length."""
    whole = train(RUNS[name]["kind"], str(tmp_path))
    for run in on_2_ranks[name]:
        assert_same_run(run, whole)


def note_images(image_processor) -> list:
    """A list that gets every image that the processor cuts into tiles."""
    seen: list = []

    class Noted(type(image_processor)):
        def __call__(self, images, *args, **kwargs):
            seen.extend(make_flat_list_of_images(images))
            return super().__call__(images, *args, **kwargs)

    image_processor.__class__ = Noted
    return seen


def test_each_image_goes_through_the_processor_once(tmp_path):
    trainer, _ = make("MoEDPOTrainer", str(tmp_path))
    processor = trainer.processing_class
    seen = note_images(processor.image_processor)
    batch = trainer.data_collator(pairs())
    assert len(seen) == sum(len(images_of(index)) for index in range(8)) == 7
    tiles_of_both = batch["pixel_values"]
    half = len(tiles_of_both) // 2
    assert torch.equal(tiles_of_both[:half], tiles_of_both[half:])
    assert (batch["input_ids"] == processor.image_token_id).sum() == len(tiles_of_both) * processor.image_seq_length


def test_rows_without_a_list_of_images():
    image = images_of(1)[0]
    assert with_image_list({"prompt": "", "image": image}) == {"prompt": "", "images": [image]}
    assert with_image_list({"prompt": "", "image": None}) == {"prompt": "", "images": []}
    assert with_image_list({"prompt": "", "images": None}) == {"prompt": "", "images": []}
    assert with_image_list({"prompt": ""}) == {"prompt": ""}


def test_grpo_gives_each_sample_its_own_images(tmp_path):
    """Log-probabilities of mixed rows in slices equal those of each sample alone."""
    trainer, _ = make("MoEGRPOTrainer", str(tmp_path), reward=lambda completions, **_: [0.0] * len(completions))
    trainer.model.train()
    rows = [{"images": images_of(index), "prompt": prompt(index)} for index in range(4) for _ in range(2)]
    trainer.num_generations = 2
    seen = note_images(trainer.processing_class.image_processor)
    rollouts = trainer._generate_and_score_completions([dict(row) for row in rows])
    assert len(seen) == sum(len(row["images"]) for row in rows) == 6  # each goes through once; TRL asks three times
    assert rollouts["num_images"] == [len(row["images"]) for row in rows]
    trainer.args.per_device_train_batch_size = 3  # slices that cut through groups
    found = trainer._current_logps(rollouts)
    processor = trainer.processing_class
    for index, row in enumerate(rows):
        prompt_ids = rollouts["prompt_ids"][index][rollouts["prompt_mask"][index].bool()]
        ids = rollouts["completion_ids"][index][rollouts["completion_mask"][index].bool()]
        pixels = None
        if row["images"]:
            text = [processor.image_token * len(row["images"])]
            pixels = processor(images=row["images"], text=text, return_tensors="pt")["pixel_values"]
        whole = torch.cat([prompt_ids, ids])[None]
        with torch.no_grad():
            logits = trainer.model(whole, pixel_values=pixels, use_cache=False).logits[0, :-1] / trainer.temperature
        expected = logits.log_softmax(-1).gather(1, whole[0, 1:, None])[-len(ids) :, 0]
        assert (found[index, : len(ids)] - expected).abs().max() < 1e-5


def test_grpo_trains_on_prompts_with_and_without_images(tmp_path):
    def reward(completions, **_):
        return [float(len(completion[0]["content"]) % 3) for completion in completions]

    trainer, recorder = make("MoEGRPOTrainer", str(tmp_path), reward=reward, batch=4, accumulation=2)
    run_quickly(trainer)
    assert len(recorder.logs) == 2
    tower = [grad for name, grad in recorder.grads[0].items() if "vision_tower" in name and "k_proj.bias" not in name]
    assert all(log["grad_norm"] > 0 for log in recorder.logs)
    assert tower
    assert all(grad.isfinite().all() for grad in tower)
    assert max(grad.abs().max() for grad in tower) > 0
