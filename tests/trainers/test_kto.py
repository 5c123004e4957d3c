"""KTO: TRL's numbers; sharded, balanced and counted as the other trainers."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from trl import KTOConfig, KTOTrainer

from tests.models.test_mtp import model_with_mtp
from tests.ranks import run_on_ranks
from tests.trainers.kto_scenario import train
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
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=4)
    for extra in ({}, {"ref_model": None, "peft_config": lora}):
        run = train(MoEKTOTrainer, MoEKTOConfig, **(KERNEL | {"router_aux_loss_coef": 0.05}), **extra)
        assert run["load"] == [2 * run["tokens"]] * 2


def test_two_processes():
    """Expert parallelism changes nothing; both ranks together are the mean over their micro-batches."""
    balanced = KERNEL | {"router_aux_loss_coef": 0.05, "ref_model": None}
    runs = [balanced | {"batch": 2, "ep_size": ep_size} for ep_size in (1, 2)]
    for plain, expert_parallel in run_on_ranks("tests.trainers.kto_scenario:train_all", 2, runs=runs):
        assert_same_run(expert_parallel, plain)


def test_what_kto_cannot_do_is_refused(tmp_path):
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": []}
    with pytest.raises(ValueError, match="sp_size is 2, and KTO averages its loss over ranks"):
        MoEKTOConfig(sp_size=2, **settings)
    model = model_with_mtp(dtype=torch.float32, coef=0.3)
    with pytest.raises(ValueError, match=r"mtp_loss_coef is 0\.3, but MoEKTOConfig trains on whole answers"):
        prepare_model(model, MoEKTOConfig(**settings))
