"""`sp_size` as a training argument: the same training as in one process, through every trainer and both doors.

fp64 weights, so that what is compared is the method; the softmax of head and router stays fp32 by design, hence 1e-6.
"""

from __future__ import annotations

import os
import tempfile

import pytest
import torch
from datasets import Dataset

from tests.families import tokens
from tests.ranks import run_on_ranks
from tests.tiny import build, moe_config, uneven_rows
from tests.trainers import resume_scenario
from tests.trainers.scenario import differences, train
from xtuner_hf import MoEGRPOConfig, MoESFTConfig, MoETrainingArguments, Qwen3MoeForCausalLM
from xtuner_hf.attention.ulysses import SequenceRanks
from xtuner_hf.attention.varlen import VARLEN_ATTENTION
from xtuner_hf.checkpoint.folder import CheckpointError
from xtuner_hf.data.balance import TokenBudget, TokenBudgetSampler
from xtuner_hf.parallel.sequence import SequenceParallelModel, split
from xtuner_hf.trainers.sequence import check_losses
from xtuner_hf.trainers.setup import check_attention, prepare_model

LAYOUTS = {
    "padded rows": {"sp_size": 2},
    "packed, EP, accumulation": {"sp_size": 2, "ep_size": 2, "accumulation": 3, "packed": True},
    "SP over all ranks, EP, full recompute": {
        **{"sp_size": 4, "ep_size": 2, "accumulation": 3, "packed": True, "recompute": "full"}
    },
    "selective recompute, inputs and optimizer on the host": {
        **{"sp_size": 2, "ep_size": 2, "accumulation": 3, "packed": True, "recompute": "selective"},
        **{"activation_offload": True, "optimizer_offload": True},
    },
    "copies of the parameters": {"sp_size": 2, "dp_replicate_size": 2, "packed": True},
    "micro-batches of equal work": {"sp_size": 2, "accumulation": 3, "packed": True, "balance_batches": True},
    "SFT": {"sp_size": 2, "ep_size": 2, "accumulation": 3, "packed": True, "trainer_kind": "MoESFTTrainer"},
}
# It draws other rows for a step than transformers' own sampler, for any layout the same.
BALANCED = {"balance_batches": True}
EXACT = {"dtype": torch.float64, "experts_kernel": "reference", "no_dropout": True}
# The last one, in a process that was launched with FSDP in the config.
LAYOUTS["sharded by Accelerate"] = {"sp_size": 2, "ep_size": 2, "accumulation": 3, "packed": True}


@pytest.fixture(scope="module")
def references() -> list[dict]:
    return run_on_ranks("tests.parallel.grid:references", 1, variants=[{}, BALANCED])[0]


@pytest.fixture(scope="module")
def runs() -> dict:
    found = run_on_ranks("tests.parallel.grid:run_layouts", 4, layouts=list(LAYOUTS.values()), through_accelerate=1)[0]
    return dict(zip(LAYOUTS, found, strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_one_process(name, runs, references):
    found = differences(runs[name], references["balance_batches" in LAYOUTS[name]])
    assert max(found.values()) < 1e-6, found


def test_a_run_goes_on_at_another_sp_size(tmp_path):
    """4 ranks with SP 2, then 2 ranks with SP 2, then SP 1: two steps of 4 rows each, in the order of one process."""
    options = {
        "dtype": torch.float64,
        "experts_kernel": "reference",
        "no_dropout": True,
        "save_steps": 2,
        "max_steps": 6,
    }
    reference = resume_scenario.train(str(tmp_path / "one"), **options)
    options |= {"output_dir": str(tmp_path / "many"), "resume": "auto"}
    function = "tests.trainers.resume_scenario:train"
    four = run_on_ranks(function, 4, sp_size=2, ep_size=2, per_device_train_batch_size=2, stop_after=2, **options)[0]
    two = run_on_ranks(function, 2, sp_size=2, per_device_train_batch_size=4, stop_after=4, **options)[0]
    last = resume_scenario.train(**options)
    assert [sorted(run["losses"]) for run in (four, two, last)] == [[1, 2], [3, 4], [5, 6]]
    for run in (four, two, last):
        for step, loss in run["losses"].items():
            assert loss == pytest.approx(reference["losses"][step], rel=1e-5)
            assert run["norms"][step] == pytest.approx(reference["norms"][step], rel=1e-5)
    for name, tensor in reference["state"].items():
        torch.testing.assert_close(last["state"][name], tensor, rtol=1e-5, atol=1e-6)


BUDGET = {"max_tokens_per_micro_batch": 64, "packed": True, "steps": 3}


def test_a_budget_of_tokens():
    """4 micro-batches a step, of one process, of a rank each in turn, or of two ranks that share them; and the first
    step is that of one batch with the same rows."""
    one_process = train(**BUDGET, accumulation=4)
    balanced = {"balance_batches": True}
    runs = [
        {"sp_size": 2, "accumulation": 4, "recompute": "selective"},
        {"sp_size": 2, "accumulation": 4, "trainer_kind": "MoESFTTrainer", "max_length": 64},
        {"accumulation": 2, **balanced},
    ]
    runs = [BUDGET | run for run in runs]
    *shared, apart = run_on_ranks("tests.trainers.scenario:train_each", 2, runs=runs)[0]
    for run in shared:
        assert max(differences(run, one_process).values()) < 1e-6
    assert max(differences(apart, train(**BUDGET, **balanced, accumulation=4)).values()) < 1e-6

    rows = uneven_rows(16)
    lengths = [len(row["input_ids"]) for row in rows]
    ranks = {"dp_size": 1, "grad_accum": 4, "rank": 0, "seed": 3, "drop_last": False}
    first_step = list(TokenBudgetSampler(lengths, lengths, TokenBudget(64, padded=False), **ranks))[:4]
    taken = [rows[row] for batch in first_step for row in batch]
    assert len(taken) > 4
    whole = train(batch=len(taken), rows=taken, packed=True, steps=1)
    one_step = {"logs": one_process["logs"][:1], "grads": one_process["grads"][:1], "state": one_process["state"]}
    found = differences(one_step, whole)
    assert max(found[key] for key in ("grads", "loss", "grad_norm", "router/aux_loss")) < 1e-6, found


def test_a_run_with_a_budget_goes_on_in_its_second_epoch(tmp_path):
    """At another number of ranks with as many micro-batches a step; with another budget it is refused."""
    options = EXACT | {"max_tokens_per_micro_batch": 96, "per_device_train_batch_size": 1, "save_steps": 4}
    reference = resume_scenario.train(str(tmp_path / "one"), gradient_accumulation_steps=4, **options)
    folder = {"output_dir": str(tmp_path / "two"), "resume": "auto"}
    first = resume_scenario.train(stop_after=4, gradient_accumulation_steps=4, **folder, **options)
    many = folder | options | {"gradient_accumulation_steps": 2}
    second = run_on_ranks("tests.trainers.resume_scenario:train", 2, **many)[0]
    assert sorted(second["losses"]) == [5, 6]
    for run in (first, second):
        for step, loss in run["losses"].items():
            assert loss == pytest.approx(reference["losses"][step], rel=1e-6)
    with pytest.raises(CheckpointError, match="with max_tokens_per_micro_batch 96, this one has 80"):
        resume_scenario.train(**folder, **options | {"max_tokens_per_micro_batch": 80})


def test_evaluation_streams_and_counted_tokens():
    """As two ranks with rows of their own: 5 rows to evaluate on, which they do not share evenly; a stream."""
    expected, _ = run_on_ranks("tests.trainers.test_sequence_parallel:evaluate_and_stream", 2)
    for found in run_on_ranks("tests.trainers.test_sequence_parallel:evaluate_and_stream", 4, sp_size=2):
        assert found == pytest.approx(expected, rel=1e-6)


def evaluate_and_stream(sp_size: int = 1) -> dict[str, float]:
    """What a run on 4 rows a step of a stream, evaluated on rows of its own, logs."""
    groups = int(os.environ["WORLD_SIZE"]) // sp_size
    with tempfile.TemporaryDirectory() as folder:
        trainer = resume_scenario.make_trainer(
            folder,
            dataset=resume_scenario.Stream(12),
            per_device_train_batch_size=4 // groups,
            per_device_eval_batch_size=1,
            max_steps=2,
            save_strategy="no",
            sp_size=sp_size,
            # Else Accelerate would try to join the batches of all ranks, which are of unequal length.
            accelerator_config={"dispatch_batches": False},
            **EXACT,
        )
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        held_out = Dataset.from_list(uneven_rows(5, seed=9))
        evaluated = trainer.evaluate(held_out)["eval_loss"]
        trainer.args.average_tokens_across_devices = False
        mean_of_means = trainer.evaluate(held_out)["eval_loss"]
        counted = train("MoESFTTrainer", batch=8 // groups, sp_size=sp_size, packed=True)["logs"][-1]
    return {
        "first loss": losses[0],
        "second loss": losses[1],
        "evaluated": evaluated,
        "evaluated, each rank by its own labels": mean_of_means,
        **{name: counted[name] for name in ("num_tokens", "entropy", "mean_token_accuracy")},
    }


def test_a_row_above_the_budget_is_named():
    message = r"train_dataset\[\d+\] has \d+ tokens, more than max_tokens_per_micro_batch=12 \(and \d+ more rows of 16"
    with pytest.raises(ValueError, match=message):
        train(max_tokens_per_micro_batch=12)


class TestRefusals:
    @pytest.fixture
    def arguments(self, tmp_path, monkeypatch):
        """As if on the first of 4 ranks on 2 nodes."""
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        monkeypatch.setattr(MoETrainingArguments, "world_size", property(lambda _: 4))

        def make(**changes):
            values = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": [], "sp_size": 2}
            return MoETrainingArguments(**(values | changes))

        return make

    def test_more_ranks_than_a_node_has(self, arguments):
        with pytest.raises(ValueError, match=r"sp_size 4 is larger than a node, which has 2 ranks.*sp_across_nodes"):
            prepare_model(build(Qwen3MoeForCausalLM, moe_config()), arguments(sp_size=4))

    def test_heads_that_do_not_divide(self):
        config = moe_config(num_attention_heads=6, num_key_value_heads=2)
        config._attn_implementation = VARLEN_ATTENTION
        with pytest.raises(ValueError, match=r"sp_size 4 does not divide the model's 6 query heads.*one of 1, 2, 3, 6"):
            check_attention(config, sp_size=4)

    def test_attention_of_others(self):
        config = moe_config()
        config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match=r"'flash_attention_2' would attend within each rank's share.*varlen"):
            check_attention(config, sp_size=4)

    def test_other_attention_that_is_chosen_later(self):
        model = build(Qwen3MoeForCausalLM, moe_config())
        shard, inputs = split({"input_ids": tokens(1)}, SequenceRanks(None, 2, 0))
        model.set_attn_implementation("sdpa")
        with pytest.raises(ValueError, match="'sdpa' would attend within each rank's share"):
            model(**inputs)
        assert shard.documents.lengths == [24]

    def test_a_budget_that_cannot_be(self, arguments, tmp_path):
        with pytest.raises(ValueError, match="max_tokens_per_micro_batch is 0; it is a number of tokens"):
            arguments(max_tokens_per_micro_batch=0)
        with pytest.raises(ValueError, match=r"and so does per_device_train_batch_size \(4\): leave one of them out"):
            arguments(max_tokens_per_micro_batch=64, per_device_train_batch_size=4)
        with pytest.raises(ValueError, match="leave out train_sampling_strategy and auto_find_batch_size"):
            arguments(max_tokens_per_micro_batch=64, train_sampling_strategy="group_by_length")
        with pytest.raises(ValueError, match="max_length is 1024 and max_tokens_per_micro_batch 64: a row of that"):
            MoESFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, max_tokens_per_micro_batch=64)
        with pytest.raises(ValueError, match="max_tokens_per_micro_batch would take the answers to a prompt apart"):
            MoEGRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, max_tokens_per_micro_batch=64)

    def test_losses_that_need_logits(self, arguments):
        ranks = SequenceRanks(None, 2, 0)
        with pytest.raises(ValueError, match="needs a loss that is computed without full logits"):
            SequenceParallelModel(None, ranks)(input_ids=tokens(1), labels=tokens(1))
        for changes in ({"label_smoothing_factor": 0.1}, {"train_sampling_strategy": "batch_rebalance"}):
            with pytest.raises(ValueError, match=next(iter(changes))):
                check_losses(arguments(**changes), {})
        with pytest.raises(ValueError, match="compute_metrics gets the logits of whole rows"):
            check_losses(arguments(), {"compute_metrics": print})

    def test_inputs_without_ids(self):
        ranks = SequenceRanks(None, 2, 0)
        with pytest.raises(ValueError, match="this forward has no input_ids"):
            SequenceParallelModel(None, ranks)(inputs_embeds=torch.zeros(1, 4, 8))
