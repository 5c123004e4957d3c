"""Every family on two gloo processes (FSDP2, with and without expert parallelism) against one process, in fp32."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.families import ALL_FAMILIES, FAMILIES
from tests.models.sharded import loss_and_grads
from tests.ranks import run_on_ranks
from xtuner_hf import AutoModelForCausalLM
from xtuner_hf.models.flops import TrainingFlops

# Name -> (family, changes to its configuration, arguments of from_pretrained).
CASES = {name: (name, {}, {}) for name in ALL_FAMILIES} | {
    "deepseek_v3_mtp": ("deepseek_v3", {"num_nextn_predict_layers": 1}, {"mtp_loss_coef": 0.3})
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for case, (name, changes, arguments) in CASES.items():
        ALL_FAMILIES[name].ours(init=arguments, **changes).save_pretrained(folder / case)
    return folder


@pytest.mark.parametrize("ep_size", [1, 2])
def test_two_processes_equal_one(ep_size, checkpoints):
    cases = {case: given for case, (name, _, given) in CASES.items() if ep_size == 1 or name in FAMILIES}
    arguments = {"folder": str(checkpoints), "ep_size": ep_size, "cases": cases}
    results = run_on_ranks("tests.models.sharded:run", 2, **arguments)
    for case, keywords in cases.items():
        whole = AutoModelForCausalLM.from_pretrained(checkpoints / case, **keywords)
        expected_loss, expected = loss_and_grads(whole, slice(None))
        for result in results:
            loss, grads, flops = result[case]
            assert flops == TrainingFlops.of_model(whole), case
            assert loss == pytest.approx(expected_loss.item(), rel=2e-6), case
            assert grads.keys() == expected.keys()
            for name, grad in expected.items():
                error = (grads[name] - grad).abs().max() / grad.abs().max()
                assert error < 2e-4, (case, name, error)
        # What the ranks save is what they read, name by name.
        before = load_file(checkpoints / case / "model.safetensors")
        after = load_file(checkpoints / f"{case}-saved" / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before), case
