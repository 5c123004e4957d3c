"""Training models that read images: the same step however it is split, parts frozen, a learning rate each."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from tests import vision
from tests.families import FAMILIES
from tests.ranks import run_on_ranks
from tests.trainers.scenario import differences, train
from xtuner_hf import MoEDPOConfig, MoETrainer, MoETrainingArguments

MODEL = {"family": "internvl_moe", "router_bias_update_rate": 0.0}
SPLIT = {"batch": 2, "accumulation": 2, "packed": True, "gradient_checkpointing": True}
SQRT = {"loss_weighting": "sqrt"}
ON_2_RANKS = {
    "split, experts too": {**MODEL, **SPLIT, "ep_size": 2},
    "rows shared": {**MODEL, **SPLIT, "batch": 4, "sp_size": 2, "trainer_kind": "MoESFTTrainer"},
    "sqrt, split": {**MODEL, **SPLIT, **SQRT, "ep_size": 2, "trainer_kind": "MoESFTTrainer"},
    "sqrt, rows shared": {**MODEL, **SPLIT, **SQRT, "batch": 4, "sp_size": 2},
    "bf16": {**MODEL, **SPLIT, "ep_size": 2, "dtype": torch.float32, "bf16": True},
    "Accelerate's FSDP2, experts split": {**MODEL, **SPLIT, "ep_size": 2, "accelerate_fsdp": True},
}


@pytest.fixture(scope="module")
def on_2_ranks() -> dict[str, list[dict]]:
    """By run, then by rank."""
    ranks = run_on_ranks("tests.trainers.scenario:train_each", 2, runs=list(ON_2_RANKS.values()))
    return {name: [rank[index] for rank in ranks] for index, name in enumerate(ON_2_RANKS)}


@pytest.fixture(scope="module")
def whole() -> dict[str, dict]:
    """In one process and one batch, by weighting."""
    return {weighting: train(**MODEL, loss_weighting=weighting) for weighting in ("token", "sqrt")}


@pytest.mark.parametrize("name", [name for name in ON_2_RANKS if name != "bf16"])
def test_split_over_ranks_and_micro_batches(name, on_2_ranks, whole):
    """Micro-batches of two rows, of which some have no image at all."""
    for run in on_2_ranks[name]:
        found = differences(run, whole[ON_2_RANKS[name].get("loss_weighting", "token")])
        assert max(found.values()) < 2e-6, found


def test_bf16_comes_close(on_2_ranks, whole):
    """Every module of the sharded tower gets the dtype that it computes in."""
    for run in on_2_ranks["bf16"]:
        for found, expected in zip(run["logs"], whole["token"]["logs"], strict=True):
            assert found["loss"] == pytest.approx(expected["loss"], rel=0.02)
            assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.2)


def make_trainer(folder, model=None, rows=None, **arguments) -> MoETrainer:
    settings = {"max_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "remove_unused_columns": False}
    return MoETrainer(
        model=model or vision.ours("internvl_moe"),
        args=MoETrainingArguments(output_dir=str(folder), **(settings | arguments)),
        data_collator=vision.TileCollator(pad_token_id=0, padding_free=True),
        train_dataset=Dataset.from_list(rows or vision.uneven_rows(8)),
    )


@pytest.mark.parametrize(
    "frozen", [["vision", "language"], ["vision"], ["language"], ["projector"]], ids=lambda parts: "+".join(parts)
)
def test_frozen_parts_do_not_move(frozen, tmp_path):
    """The first two are the stages of InternVL's warm-up: the projector alone, then with the language model."""
    model = vision.ours("internvl_moe", drop_path_rate=0.2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = make_trainer(tmp_path, model, learning_rate=1e-2, **{f"freeze_{part}": True for part in frozen})
    trainer.train()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    for part, modules in model.parts.items():
        names = {name for name, p in model.named_parameters() if any(p is q for m in modules for q in m.parameters())}
        assert moved.isdisjoint(names) if part in frozen else moved & names, part
    rate = model.model.vision_tower.encoder.layer[-1].stochastic_depth.rate
    assert rate == (0 if "vision" in frozen else 0.2)
    assert bool(trainer._balance.config.aux_loss_coef) == ("language" not in frozen)


def test_adapters_train_in_the_parts_that_do(tmp_path):
    """Queries and values have the same names in the tower and in the language model."""
    adapters = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(vision.ours("internvl_moe"), adapters)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    make_trainer(tmp_path, model, learning_rate=1e-2, freeze_vision=True).train()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if "lora_" in name and "language_model" in name}
    assert any("lora_" in name and "vision_tower" in name for name in before)


@pytest.mark.parametrize("weighting", ["token", "sqrt"])
def test_evaluation_is_the_loss_of_training(weighting, tmp_path):
    rows = vision.uneven_rows(8)
    settings = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "learning_rate": 0.0}
    trainer = make_trainer(tmp_path, rows=rows, loss_weighting=weighting, logging_steps=1, **settings)
    before = trainer.evaluate(Dataset.from_list(rows))["eval_loss"]
    trainer.train()
    assert before == pytest.approx(trainer.state.log_history[-2]["loss"], rel=1e-5)


def test_parts_are_all_of_the_model():
    model = vision.ours("internvl_gpt_oss")
    found = [p for modules in model.parts.values() for module in modules for p in module.parameters()]
    assert len(found) == len({id(p) for p in found}) == len(list(model.parameters()))


def test_each_part_has_its_learning_rate_and_all_follow_one_schedule(tmp_path):
    rates = {"learning_rate": 3e-4, "vision_lr": 2e-5, "projector_lr": 1e-3}
    trainer = make_trainer(tmp_path, max_steps=4, warmup_steps=2, lr_scheduler_type="linear", logging_steps=1, **rates)
    trainer.create_optimizer_and_scheduler(num_training_steps=4)
    rate_of = {p: group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for part, name in (("vision", "vision_lr"), ("projector", "projector_lr"), ("language", "learning_rate")):
        for module in trainer.model.parts[part]:
            assert {rate_of[p] for p in module.parameters()} == {rates[name]}, part
    decays = {p: group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert len(rate_of) == len(decays) == len(list(trainer.model.parameters()))
    trainer.lr_scheduler.step()
    halved = {group["initial_lr"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert halved == {rate: rate / 2 for rate in rates.values()}
    assert trainer._get_learning_rate() == rates["learning_rate"] / 2  # what is logged


def test_a_run_goes_on_with_its_learning_rates(tmp_path):
    settings = {"max_steps": 4, "vision_lr": 1e-2, "projector_lr": 3e-3, "learning_rate": 1e-3}
    settings |= {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "again", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert [g["lr"] for g in resumed.optimizer.param_groups] == [g["lr"] for g in whole.optimizer.param_groups]
    expected = whole.model.state_dict()
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_the_loss_with_square_root_weights_is_the_formula(tmp_path):
    """Sum over documents of the mean cross entropy times sqrt(labels), over the sum of sqrt(labels)."""
    rows = vision.uneven_rows(8)
    run = train(**MODEL, loss_weighting="sqrt", num_rows=8, steps=1, packed=True, router_aux_loss_coef=0.0)
    model = vision.ours("internvl_moe", torch.float64, "xtuner_reference").train()
    total = weight = 0.0
    for row in rows:
        batch = vision.TileCollator(pad_token_id=0, padding_free=True)([row])
        count = (batch["labels"][:, 1:] != -100).sum()
        total += model(**batch).loss.item() * count.sqrt()
        weight += count.sqrt()
    assert len({len(row["labels"]) for row in rows}) > 4
    assert run["logs"][0]["loss"] == pytest.approx((total / weight).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"freeze_vision": True, "freeze_projector": True, "freeze_language": True}, "leave nothing to train"),
        ({"freeze_vision": True, "vision_lr": 1e-4}, "a part that does not train has no rate"),
        ({"projector_lr": -1.0}, "projector_lr is -1.0; it must be positive"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0"),
        ({"vision_recompute": "some"}, "vision_recompute is 'some'; choose one of none, selective, full"),
        ({"loss_weighting": "square"}, "loss_weighting is 'square'; choose one of token, sqrt"),
    ],
)
def test_arguments_that_cannot_be(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        MoETrainingArguments(output_dir=str(tmp_path), use_cpu=True, **arguments)


def test_arguments_that_do_not_fit_the_trainer_or_the_model(tmp_path):
    with pytest.raises(ValueError, match="MoEDPOConfig trains on whole answers"):
        MoEDPOConfig(output_dir=str(tmp_path), use_cpu=True, loss_weighting="sqrt")
    with pytest.raises(
        ValueError, match="freeze_vision, drop_path_rate speak of a vision tower, and qwen3_moe has none"
    ):
        make_trainer(tmp_path, FAMILIES["qwen3_moe"].ours(), freeze_vision=True, drop_path_rate=0.1)
    with pytest.raises(ValueError, match="label_smoothing_factor asks for another loss"):
        make_trainer(tmp_path, loss_weighting="sqrt", label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="the vision tower recomputes none"):
        make_trainer(tmp_path, vision_activation_offload=True)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, (False, False)),
        ({"recompute": "full"}, (True, True)),
        ({"vision_recompute": "full"}, (True, False)),
        ({"recompute": "selective", "vision_recompute": "none"}, (False, True)),
        ({"vision_recompute": "selective", "vision_activation_offload": True}, (True, False)),
        ({"recompute": "full", "activation_offload": True, "vision_activation_offload": False}, (True, True)),
    ],
)
def test_the_tower_recomputes_and_offloads_for_itself(arguments, expected, tmp_path):
    """(vision, language): whether their layers recompute; gradients are those without."""
    trainer = make_trainer(tmp_path, **arguments)
    trainer.train()
    model = trainer.model.model
    layers = (model.vision_tower.encoder.layer[0], model.language_model.layers[0])
    assert tuple(layer.gradient_checkpointing for layer in layers) == expected
    offloads = trainer.model.layer_checkpoint.offload, getattr(model.vision_tower.layer_checkpoint, "offload", None)
    assert (offloads[0] is not None) == bool(arguments.get("activation_offload"))
    assert (offloads[1] is not None) == bool(arguments.get("vision_activation_offload"))
