"""`fp8=True` through the trainers: what becomes FP8, and that ranks compute what one process computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import xtuner_hf
from benchmarks.fp8_loss import train, worst_difference
from tests import vision
from tests.families import ALL_FAMILIES, FAMILIES
from tests.ranks import run_on_ranks
from tests.trainers.fp8_scenario import STEPS, fp8_run
from tests.trainers.scenario import differences
from xtuner_hf.kernels.fp8_linear import Fp8Linear
from xtuner_hf.models.fp8 import use_fp8
from xtuner_hf.moe.router import Router

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def one_process() -> dict:
    return fp8_run(dtype=torch.float32)


@pytest.fixture(scope="module")
def ranks() -> list[list[dict]]:
    runs = [{"ep_size": 1}, {"ep_size": 2}, {"accelerate_door": True}]
    runs = [run | {"ranks": 2, "dtype": torch.float32} for run in runs]
    return run_on_ranks("tests.trainers.fp8_scenario:on_ranks", 2, runs=runs)


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_experts_and_dense_projections_become_fp8(name):
    family = ALL_FAMILIES[name]
    options = {"init": {"mtp_loss_coef": 0}, "num_nextn_predict_layers": 1} if name == "deepseek_v3" else {}
    model, high = (family.ours(**options) for _ in range(2))
    parameters = dict(model.named_parameters())
    use_fp8(model, CPU)
    assert list(dict(model.named_parameters()).items()) == list(parameters.items()), "no other names or tensors"
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert isinstance(module, Fp8Linear) == (".layers." in path and "eh_proj" not in path), path
        assert not (isinstance(module, Router) and isinstance(module, nn.Linear))
    if name in FAMILIES:
        assert model.config._experts_implementation == "xtuner_fp8"
    tokens = torch.randint(2, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    losses = [m.train()(input_ids=tokens, labels=tokens).loss.item() for m in (model, high)]
    assert 0 < abs(losses[0] - losses[1]) < 0.05 * losses[1]


def test_towers_of_images_stay_in_high_precision():
    model = vision.ours("internvl_moe")
    use_fp8(model, CPU)
    made = [path for path, module in model.named_modules() if isinstance(module, Fp8Linear)]
    assert len(made) == len([path for path in made if "language_model.layers." in path]) > 0
    batch = {"input_ids": torch.tensor([vision.row(5, -2, 9)]), "pixel_values": vision.tiles(2)}
    loss = model.train()(**batch, labels=batch["input_ids"], use_cache=False).loss
    loss.backward()
    assert loss.isfinite()


def test_ranks_compute_what_one_process_does(one_process, ranks):
    for sharded, _, by_accelerate in ranks:
        for run in (sharded, by_accelerate):
            worst = differences(run, one_process)
            assert max(worst.values()) < 2e-6, worst


def test_expert_parallelism_differs_by_the_noise_of_fp8(one_process, ranks):
    # Experts see the tokens of both ranks, cut into other blocks.
    for _, run, _ in ranks:
        for name, expected in one_process["grads"][0].items():
            assert (run["grads"][0][name] - expected).norm() < 0.1 * expected.norm(), name


def test_weights_are_quantised_once_a_step(one_process, ranks):
    # Of 3 layers, one dense: q, k, v, o; gate, up, down; the two of the experts.
    weights = 3 * 4 + 3 + 2 * 2
    assert len(one_process["quantised"]) == STEPS * weights
    for run in ranks[0]:
        by_shape = {shape: run["quantised"].count(shape) for shape in run["quantised"]}
        assert by_shape[128, 64] == STEPS * 3, "a rank's half of q_proj, once a step in each layer"
        assert by_shape[4, 96, 64] == by_shape[4, 64, 48] == STEPS * 2, "its half of the experts"
        assert (256, 64) not in by_shape
        # k and v of 64 rows end within a block: gathered whole, quantised at each use.
        assert by_shape[64, 64] > STEPS * 3 * 2


def test_resumes_and_exports_what_it_trained(tmp_path):
    for rank in run_on_ranks("tests.trainers.fp8_scenario:resumed", 2, folder=str(tmp_path)):
        losses, losses_again = rank["losses"]
        assert losses_again == losses[2:]
        trained, trained_again = rank["trained"]
        for name, value in trained.items():
            assert torch.equal(value, trained_again[name]), name
            assert torch.equal(value, rank["exported"][name]), name


def test_arguments_that_exclude_each_other():
    with pytest.raises(ValueError, match=r"fp8=True computes the experts with its own kernel.*'grouped_mm'"):
        xtuner_hf.MoETrainingArguments(output_dir="x", use_cpu=True, bf16=False, fp8=True, experts_kernel="grouped_mm")


def test_experts_without_such_a_kernel_are_refused():
    model = FAMILIES["qwen3_moe"].ours(hidden_act="gelu")
    with pytest.raises(ValueError, match=r"fp8=True has no kernel for these experts.*SwiGLU"):
        use_fp8(model, CPU)


def test_the_loss_follows_bf16():
    bf16, fp8 = train(30, batch=4), train(30, batch=4, fp8=True)
    assert bf16[-1] < bf16[0] - 0.3, "it learns"
    assert bf16 != fp8
    assert worst_difference(fp8, bf16, window=5) < 0.01
