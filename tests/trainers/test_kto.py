"""KTO: TRL's numbers; sharded, balanced and counted as the other trainers."""

from __future__ import annotations

import pytest
import torch
from trl import KTOConfig, KTOTrainer

from tests.models.test_mtp import model_with_mtp
from tests.ranks import run_on_ranks
from tests.trainers.kto_scenario import train
from tests.trainers.preference_scenario import expert_lora
from tests.trainers.test_dpo import assert_same_run
from xtuner_hf import MoEKTOConfig, MoEKTOTrainer
from xtuner_hf.trainers.setup import prepare_model

KERNEL = {"experts_kernel": "reference"}


@pytest.mark.parametrize("settings", [{}, {"batch": 2, "accumulation": 2}, {"loss_type": "apo_zero_unpaired"}])
def test_equals_trl(settings):
    ours = train(MoEKTOTrainer, MoEKTOConfig, **KERNEL, **settings)
    trls = train(KTOTrainer, KTOConfig, **settings)
    assert_same_run(ours, trls, 1e-9)
    if not settings:
        assert ours["logs"][0]["kl"] == pytest.approx(trls["logs"][0]["kl"], rel=1e-9)


def test_the_load_is_that_of_the_answers_that_train():
    """Neither the mismatched answers nor the reference, which with adapters goes through the same routers, count."""
    for extra in ({}, {"adapters": True}):
        run = train(MoEKTOTrainer, MoEKTOConfig, **(KERNEL | {"router_aux_loss_coef": 0.05}), **extra)
        assert run["load"] == [2 * run["tokens"]] * 2


def test_several_processes():
    """Expert parallelism changes nothing; two ranks together are the mean over their micro-batches, and so are two
    pairs of ranks that share sequences, with adapters too, whose base is the reference."""
    balanced = KERNEL | {"router_aux_loss_coef": 0.05, "ref_model": None, "batch": 2}
    runs = [balanced | {"ep_size": 1}, balanced | {"ep_size": 2}, balanced | {"adapters": True}]
    experts = balanced | {"peft_config": expert_lora(), "optim": "sgd"}
    runs += [experts | {"ep_size": ep_size} for ep_size in (1, 2)]
    function = "tests.trainers.kto_scenario:train_all"
    plain, expert_parallel, adapted, of_experts, of_shared_experts = run_on_ranks(function, 2, runs=runs)[0]
    assert_same_run(expert_parallel, plain)
    assert_same_run(of_shared_experts, of_experts)
    shared = [balanced | {"sp_size": 2, "ep_size": 2}, balanced | {"sp_size": 2, "adapters": True}]
    for runs in run_on_ranks(function, 4, runs=shared):
        for run, expected in zip(runs, (plain, adapted), strict=True):
            assert_same_run(run, expected)
            assert run["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
            assert (run["load"], run["tokens"]) == (expected["load"], expected["tokens"])
            for name in ("kl", "rewards/chosen", "logits/rejected", "num_tokens", "entropy"):
                assert run["logs"][-1][name] == pytest.approx(expected["logs"][-1][name], rel=1e-5), name


def test_what_kto_cannot_do_is_refused(tmp_path):
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": []}
    model = model_with_mtp(dtype=torch.float32, coef=0.3)
    with pytest.raises(ValueError, match=r"mtp_loss_coef is 0\.3, but MoEKTOConfig trains on whole answers"):
        prepare_model(model, MoEKTOConfig(**settings))
