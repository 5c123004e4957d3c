"""Mistakes that people make: each gets one sentence that says what to change, and nothing is lost or overwritten."""

from __future__ import annotations

import pytest
import transformers
from datasets import Dataset

from tests.ranks import run_on_ranks
from tests.tiny import build, dense_config, moe_config, uneven_rows
from xtuner_hf import MoETrainer, MoETrainingArguments, Qwen3ForCausalLM, Qwen3MoeForCausalLM


def arguments(folder, **changes) -> MoETrainingArguments:
    values = {"output_dir": str(folder), "max_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no"}
    return MoETrainingArguments(**(values | changes))


def rows() -> Dataset:
    return Dataset.from_list(uneven_rows(4))


def trainer(folder, model=None, **changes) -> MoETrainer:
    model = model or build(Qwen3MoeForCausalLM, moe_config())
    from xtuner_hf.data import PackedCollator

    collator = PackedCollator(pad_token_id=0)
    return MoETrainer(model=model, args=arguments(folder, **changes), train_dataset=rows(), data_collator=collator)


def test_an_output_folder_that_holds_another_run_is_left_alone(tmp_path):
    trainer(tmp_path).train()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert before
    with pytest.raises(FileExistsError, match=r"holds another run \(history\.jsonl\): choose another output_dir"):
        trainer(tmp_path).train()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_training_twice_with_one_trainer_is_no_other_run(tmp_path):
    twice = trainer(tmp_path)
    twice.train()
    twice.train()


def test_an_empty_data_set(tmp_path):
    model = build(Qwen3MoeForCausalLM, moe_config())
    with pytest.raises(ValueError, match="train_dataset is empty: there is nothing to train on"):
        MoETrainer(model=model, args=arguments(tmp_path), train_dataset=Dataset.from_list([]))


def test_a_model_of_another_package(tmp_path):
    stock = build(transformers.Qwen3MoeForCausalLM, moe_config())
    with pytest.raises(TypeError, match=r"transformers\..*needs one of xtuner_hf: load it with its Auto"):
        trainer(tmp_path, stock)


def test_several_gpus_in_one_process_are_no_data_parallel(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 8  # what transformers counts without a launcher
    with pytest.raises(ValueError, match=r"sees 8 GPUs.*accelerate launch.*CUDA_VISIBLE_DEVICES=0"):
        MoETrainer(model=build(Qwen3MoeForCausalLM, moe_config()), args=args, train_dataset=rows())


def test_deepspeed_beside_our_sharding(tmp_path):
    args = arguments(tmp_path)
    args.deepspeed = "zero3.json"
    with pytest.raises(ValueError, match=r"asks for DeepSpeed.*FSDP2.*accelerate_configs/"):
        MoETrainer(model=build(Qwen3MoeForCausalLM, moe_config()), args=args, train_dataset=rows())


def test_arguments_of_another_trainer(tmp_path):
    with pytest.raises(TypeError, match="MoETrainer needs its own arguments class, got TrainingArguments"):
        MoETrainer(model=None, args=transformers.TrainingArguments(output_dir=str(tmp_path)))


@pytest.mark.parametrize(
    "name",
    ["router_aux_loss_coef", "router_z_loss_coef", "router_sequence_loss_coef", "router_bias_update_rate"],
)
def test_a_negative_coefficient(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name} is -0\.1; it must be 0 \(off\) or positive"):
        arguments(tmp_path, **{name: -0.1})


def test_a_bias_update_for_a_model_without_bias(tmp_path):
    with pytest.raises(ValueError, match="routers of this qwen3_moe have no correction bias"):
        trainer(tmp_path, router_bias_update_rate=1e-3)
    with pytest.raises(ValueError, match="routers of this qwen3 have no correction bias"):
        trainer(tmp_path, build(Qwen3ForCausalLM, dense_config()), router_bias_update_rate=1e-3)


def test_an_ep_size_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="ep_size is 0; it must be 1 or more"):
        arguments(tmp_path, ep_size=0)


def test_an_ep_size_that_one_process_cannot_have(tmp_path):
    with pytest.raises(ValueError, match="ep_size 2 does not divide the 1 ranks that hold one copy"):
        trainer(tmp_path, ep_size=2)


def ep_size_error(num_experts: int, ep_size: int) -> str:
    import tempfile

    with tempfile.TemporaryDirectory() as folder, pytest.raises(ValueError, match="ep_size") as error:
        trainer(folder, build(Qwen3MoeForCausalLM, moe_config(num_experts=num_experts)), ep_size=ep_size)
    return str(error.value)


def test_an_ep_size_that_does_not_fit_the_ranks_or_the_experts():
    for message in run_on_ranks("tests.trainers.test_bad_input:ep_size_error", 2, num_experts=8, ep_size=3):
        assert "ep_size 3 does not divide the 2 ranks that hold one copy" in message
    for message in run_on_ranks("tests.trainers.test_bad_input:ep_size_error", 2, num_experts=7, ep_size=2):
        assert "ep_size 2 does not divide the model's 7 experts" in message


def test_fsdp_in_one_process(tmp_path):
    with pytest.raises(ValueError, match="fsdp only works in distributed training"):  # transformers' own words
        trainer(tmp_path, fsdp=True)
