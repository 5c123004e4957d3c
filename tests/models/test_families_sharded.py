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

EP_SIZES = [1, 2]
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


def cases_of(ep_size: int) -> dict[str, dict]:
    """Case -> arguments of `from_pretrained`; a dense family has no experts to share."""
    return {case: given for case, (name, _, given) in CASES.items() if ep_size == 1 or name in FAMILIES}


@pytest.fixture(scope="module")
def on_2_ranks(checkpoints) -> dict[int, list[dict]]:
    """By EP size, then by rank."""
    cases = {ep_size: cases_of(ep_size) for ep_size in EP_SIZES}
    ranks = run_on_ranks("tests.models.sharded:run_all", 2, folder=str(checkpoints), cases=cases)
    return {ep_size: [rank[ep_size] for rank in ranks] for ep_size in EP_SIZES}


@pytest.mark.parametrize("ep_size", EP_SIZES)
def test_two_processes_equal_one(ep_size, checkpoints, on_2_ranks):
    cases = cases_of(ep_size)
    results = on_2_ranks[ep_size]
    for case, keywords in cases.items():
        whole = AutoModelForCausalLM.from_pretrained(checkpoints / case, **keywords)
        expected_loss, expected = loss_and_grads(whole, slice(None))
        for result in results:
            loss, grads, flops, _ = result[case]
            assert flops == TrainingFlops.of_model(whole), case
            assert loss == pytest.approx(expected_loss.item(), rel=2e-6), case
            assert grads.keys() == expected.keys()
            for name, grad in expected.items():
                error = (grads[name] - grad).abs().max() / grad.abs().max()
                assert error < 2e-4, (case, name, error)
        # What the ranks save is what they read, name by name.
        before = load_file(checkpoints / case / "model.safetensors")
        after = load_file(checkpoints / f"{case}-saved-{ep_size}" / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before), case


@pytest.mark.parametrize("case", cases_of(2))
def test_split_sizes_travel_behind_the_shared_experts(case, on_2_ranks):
    """Right after the router they leave for the host, and it waits for them when the shared experts are done."""
    has_shared_experts = CASES[case][0] in ("deepseek_v3", "kimi_k2", "glm4_moe")
    block = ["routed", "sizes leave", *(["shared experts"] if has_shared_experts else []), "sizes awaited"]
    for rank in on_2_ranks[2]:
        calls = rank[case][3]
        assert len(calls) >= 2 * len(block)
        assert calls == block * (len(calls) // len(block))
    assert "sizes leave" not in on_2_ranks[1][0][case][3]
