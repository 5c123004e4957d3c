from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from tests.families import ALL_FAMILIES
from xtuner_hf.parallel.layout import ParallelLayout
from xtuner_hf.plan.devices import PlanError, find_device
from xtuner_hf.plan.job import Job
from xtuner_hf.plan.planning import plan_job
from xtuner_hf.plan.search import search, table, write_launch_files
from xtuner_hf.trainers.arguments import MoETrainingArguments

SMALL = {"num_hidden_layers": 3, "mlp_only_layers": [], "vocab_size": 1024}


def job(memory_gib: float) -> Job:
    device = replace(find_device("h100"), memory_gib=memory_gib, outside_gib=0.0, ranks_per_node=4)
    config = ALL_FAMILIES["qwen3_moe"].make_config(**SMALL)
    return Job(config, ParallelLayout(4, 4), device, seq_len=8192)


@pytest.fixture(scope="module")
def found():
    return search(job(memory_gib=0.2), workers=1)


def test_those_that_fit_come_first_and_the_fastest_of_them(found):
    fits = [candidate.plan.fits for candidate in found]
    assert fits == sorted(fits, reverse=True)
    assert fits[0]
    assert not fits[-1]
    speeds = [candidate.plan.tokens_per_second for candidate in found if candidate.plan.fits]
    assert speeds == sorted(speeds, reverse=True)
    assert {candidate.plan.job.layout.ep_size for candidate in found} == {1, 4}
    assert "lacks" in found[-1].why
    assert "computes" in found[0].why
    assert len(table(found).splitlines()) == 1 + min(len(found), 20)


def test_the_chosen_ones_plan_is_the_one_that_it_would_get_by_itself(found):
    alone = plan_job(found[0].plan.job)
    assert alone.verdict == found[0].plan.verdict
    assert alone.tokens_per_second == found[0].plan.tokens_per_second
    assert alone.report.peaks == found[0].plan.report.peaks


def test_the_chosen_one_can_be_launched(found, tmp_path):
    write_launch_files(found, tmp_path)
    arguments = yaml.safe_load((tmp_path / "arguments.yaml").read_text())
    made = MoETrainingArguments(output_dir=str(tmp_path), use_cpu=True, **arguments)
    best = found[0].plan.job
    assert (made.ep_size, made.recompute) == (best.layout.ep_size, best.recompute)
    assert made.per_device_train_batch_size == best.micro_batch
    launch = yaml.safe_load((tmp_path / "accelerate.yaml").read_text())
    assert (launch["num_processes"], launch["distributed_type"]) == (4, "MULTI_GPU")


def test_nothing_fits():
    with pytest.raises(PlanError, match="take more ranks"):
        search(job(memory_gib=0.0001), workers=1)
