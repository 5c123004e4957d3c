"""A run stopped and continued is the run left alone: bit for bit in the same layout, to rounding in another."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import REPO, run_on_ranks
from tests.trainers import resume_scenario
from xtuner_hf.checkpoint.folder import MARKER, CheckpointError
from xtuner_hf.cli import main

TRAIN = "tests.trainers.resume_scenario:train"


def assert_equal_bits(run: dict, reference: dict) -> None:
    assert run["losses"], "the continued run has no steps"
    assert run["losses"] == {step: reference["losses"][step] for step in run["losses"]}
    for part in ("state", "optimizer"):
        assert run[part].keys() == reference[part].keys()
        assert all(torch.equal(run[part][name], tensor) for name, tensor in reference[part].items()), part
    assert run["learning_rate"] == reference["learning_rate"]


def assert_close(run: dict, reference: dict, tolerance: float) -> None:
    for step, loss in run["losses"].items():
        assert abs(loss - reference["losses"][step]) < tolerance * abs(reference["losses"][step]), step
        assert abs(run["norms"][step] - reference["norms"][step]) < tolerance * reference["norms"][step], step
    for part in ("state", "optimizer"):
        assert run[part].keys() == reference[part].keys()
        for name, tensor in reference[part].items():
            assert (run[part][name] - tensor).abs().max() < tolerance * max(tensor.abs().max().item(), 1.0), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[str, dict]:
    """Two ranks, ep_size 2, 6 steps; checkpoints after 3 and 6. An epoch has 5 steps, so step 6 is in the second."""
    folder = str(tmp_path_factory.mktemp("run"))
    return folder, run_on_ranks(TRAIN, 2, output_dir=folder, ep_size=2, per_device_train_batch_size=2)[0]


def test_same_layout_is_equal_to_the_last_bit(uninterrupted):
    """With dropout, a schedule, weight decay, all balance terms, and an epoch's end after the checkpoint."""
    folder, reference = uninterrupted
    run = run_on_ranks(
        TRAIN, 2, output_dir=folder, resume=f"{folder}/checkpoint-3", ep_size=2, per_device_train_batch_size=2
    )[0]
    assert sorted(run["losses"]) == [4, 5, 6]
    assert_equal_bits(run, reference)


def test_states_that_rest_elsewhere_go_on_to_the_last_bit(tmp_path):
    """bf16 moments on the host, stepped in backward: a checkpoint has them as they rest."""
    options = {"optimizer_states": "bf16", "optimizer_offload": True, "optimizer_in_backward": True, "max_grad_norm": 0}
    reference = resume_scenario.train(output_dir=str(tmp_path), **options)
    run = resume_scenario.train(output_dir=str(tmp_path), resume=f"{tmp_path}/checkpoint-3", **options)
    assert sorted(run["losses"]) == [4, 5, 6]
    assert_equal_bits(run, reference)


def test_logs_of_several_steps_go_on(tmp_path):
    """A checkpoint between two logs: the next log is the mean over all steps since the last one."""
    options = {"logging_steps": 4, "max_steps": 8, "save_steps": 3}
    reference = resume_scenario.train(output_dir=str(tmp_path), **options)
    run = resume_scenario.train(output_dir=str(tmp_path), resume=f"{tmp_path}/checkpoint-3", **options)
    assert sorted(run["losses"]) == [4, 8]
    assert_equal_bits(run, reference)


def test_other_layouts_and_doors_are_equal_to_rounding(tmp_path):
    """Each job goes on for two steps where the one before stopped: EP 4 -> 2 -> 1, 4 ranks -> 2 -> 1, and from one door
    to the other. What each exports is what `xtuner-hf convert` makes of its last checkpoint, to the last bit.

    fp64 and no dropout, so that only the layout differs; the router's and the head's softmax stay fp32.
    """
    options = {
        "dtype": torch.float64,
        "experts_kernel": "reference",
        "no_dropout": True,
        "save_steps": 2,
        "max_steps": 10,
    }
    reference = resume_scenario.train(str(tmp_path / "one"), export_to=str(tmp_path / "reference"), **options)
    options |= {"output_dir": str(tmp_path / "many"), "resume": "auto"}
    jobs = [
        (4, {"ep_size": 4}),
        (4, {"ep_size": 2, "accelerate_fsdp": True}),
        (2, {"ep_size": 1}),
        (2, {"ep_size": 2, "accelerate_fsdp": True}),
    ]
    for index, (num_ranks, layout) in enumerate(jobs):
        step = 2 * (index + 1)
        exported, converted = tmp_path / f"exported-{step}", tmp_path / f"converted-{step}"
        run = run_on_ranks(
            TRAIN,
            num_ranks,
            stop_after=step,
            per_device_train_batch_size=4 // num_ranks,
            export_to=str(exported),
            **options,
            **layout,
        )[0]
        assert ("FSDP" in run["door"]) == ("accelerate_fsdp" in layout)
        assert sorted(run["losses"]) == [step - 1, step]
        assert all(loss == pytest.approx(reference["losses"][at], rel=1e-5) for at, loss in run["losses"].items())
        main(["convert", str(tmp_path / "many" / f"checkpoint-{step}"), str(converted)])
        found, expected = (load_file(folder / "model.safetensors") for folder in (converted, exported))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    last = resume_scenario.train(export_to=str(tmp_path / "exported"), **options)
    assert sorted(last["losses"]) == [9, 10]
    assert_close(last, reference, 1e-5)
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("exported", "reference"))
    assert found.keys() == expected.keys()
    assert all((found[name] - tensor).abs().max() < 1e-5 for name, tensor in expected.items())


def test_adapters(tmp_path):
    """A PEFT model's checkpoint holds what trains, not the base model."""
    reference = resume_scenario.train(str(tmp_path), lora=True)
    shards = sum(path.stat().st_size for path in (tmp_path / "checkpoint-3" / "dcp").iterdir())
    assert shards < 200_000 < sum(t.numel() * 4 for t in reference["state"].values())
    run = resume_scenario.train(str(tmp_path), resume=f"{tmp_path}/checkpoint-3", lora=True)
    assert sorted(run["losses"]) == [4, 5, 6]
    assert_equal_bits(run, reference)


def test_kill_9(tmp_path):
    """Two kills, one within a checkpoint; `benchmarks/kill_resume.py` has twenty."""
    path = REPO / "benchmarks" / "kill_resume.py"
    spec = importlib.util.spec_from_file_location("kill_resume", path)
    kill_resume = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kill_resume)
    result = kill_resume.run(tmp_path, kills=2, processes=2, steps=30, save_steps=3, seed=1)
    assert result["that differ"] == 0
    assert result["reached the end"]
    assert max(result["resumed from step"]) > 0


class TestWhichCheckpoint:
    def test_true_takes_the_newest_complete_one(self, tmp_path):
        folder = str(tmp_path)
        resume_scenario.train(output_dir=folder, max_steps=4, save_steps=1)
        (tmp_path / "checkpoint-4" / "dcp" / "__0_0.distcp").write_bytes(b"cut short")
        (tmp_path / "checkpoint-3" / MARKER).unlink()
        (tmp_path / "incomplete-checkpoint-5").mkdir()
        run = resume_scenario.train(output_dir=folder, resume=True, max_steps=4, save_steps=1)
        assert sorted(run["losses"]) == [3, 4]
        assert run["checkpoints"] == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-4"]

    def test_no_complete_one(self, tmp_path):
        (tmp_path / "checkpoint-3").mkdir()
        with pytest.raises(CheckpointError, match=r"no complete checkpoint in .*resume_from_checkpoint='auto'"):
            resume_scenario.train(str(tmp_path), resume=True, max_steps=1)
        run = resume_scenario.train(output_dir=str(tmp_path), resume="auto", max_steps=1)
        assert sorted(run["losses"]) == [1]

    def test_another_number_of_rows_in_a_step(self, uninterrupted):
        folder, _ = uninterrupted
        with pytest.raises(CheckpointError, match="run with 4 rows in an optimizer step, this one has 3"):
            resume_scenario.train(output_dir=folder, resume=True, per_device_train_batch_size=3)

    def test_another_model(self, uninterrupted, tmp_path):
        folder, _ = uninterrupted
        with pytest.raises(CheckpointError, match=r"4 tensors differ, the first is .*experts.down_proj"):
            resume_scenario.train(output_dir=folder, resume=True, config={"moe_intermediate_size": 32})

    def test_the_best_and_the_newest_stay(self, tmp_path):
        run = resume_scenario.train(str(tmp_path), save_steps=1, save_total_limit=2, best_step=2)
        assert run["checkpoints"] == ["checkpoint-2", "checkpoint-6"]
        assert run["best"].endswith("checkpoint-2")

    def test_model_only(self, tmp_path):
        """`save_only_model` writes a Hub checkpoint into checkpoint-N, from which nothing can go on."""
        from xtuner_hf import Qwen3MoeForCausalLM

        run = resume_scenario.train(output_dir=str(tmp_path), save_only_model=True, max_steps=3)
        loaded = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
        assert all(torch.equal(t.double(), run["state"][name]) for name, t in loaded.state_dict().items())
        assert not json.loads((tmp_path / "checkpoint-3" / MARKER).read_text())["resumable"]
        with pytest.raises(CheckpointError, match="saved with save_only_model=True"):
            resume_scenario.train(output_dir=str(tmp_path), resume=True)
