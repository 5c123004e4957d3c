"""GRPO: TRL's numbers, the papers' formulas, the same numbers for any split; replay and mismatch in training."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from tests.ranks import run_on_ranks
from tests.rl.toy import char_tokenizer
from tests.trainers.preference_scenario import expert_lora, policy, run_quickly
from tests.trainers.rl_scenario import make_trainer, rollouts, train
from tests.trainers.test_dpo import TOLERANCE, assert_same_run, gradients, worst
from xtuner_hf import AutoModelForCausalLM, MoEGRPOConfig, MoEGRPOTrainer
from xtuner_hf.moe.replay import RouterMap
from xtuner_hf.rl.presets import PRESETS

KERNEL = {"experts_kernel": "reference"}
EVERYTHING = KERNEL | {
    "engine": {"scores": True, "with_routes": True, "noise": 0.05, "tool_tokens": True},
    "router_replay": "R3",
    "mismatch_correction": "token_truncate",
    "router_aux_loss_coef": 0.05,
    "router_z_loss_coef": 0.01,
}
# Two iterations over the same rollouts; the learning rate moves the routers away from what they chose.
R2 = KERNEL | {"engine": {}, "router_replay": "R2", "num_iterations": 2, "learning_rate": 0.01}


# ---- TRL's own ----


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batch": 2, "accumulation": 4, "loss_type": "grpo"},
        {"num_iterations": 2, "steps": 4, "epsilon_high": 0.28},
        {"steps_per_generation": 4, "batch": 4, "accumulation": 2},
    ],
    ids=["default", "accumulation", "iterations", "several steps a generation"],
)
@pytest.mark.usefixtures("exact_head")
def test_equals_trl(settings, tmp_path):
    """The model samples itself, from one seed; every log, gradient and answer is the same.

    Prompts are of one length: TRL's positions count padding before them, ours do not, and rotations are fp32.
    """
    prompts = Dataset.from_list([{"prompt": prompt} for prompt in ("3+5=", "12+9", "7-2=", "say.")])
    runs = []
    for kind, config, extra in (
        (GRPOTrainer, GRPOConfig, {"router_aux_loss_coef": 0.0}),
        (MoEGRPOTrainer, MoEGRPOConfig, KERNEL),
    ):
        torch.manual_seed(0)
        folder = str(tmp_path / kind.__name__)
        trainer, recorder, _ = make_trainer(kind, config, folder, train_dataset=prompts, **settings, **extra)
        run_quickly(trainer)
        runs.append({"logs": recorder.logs, "grads": recorder.grads})
    assert_same_run(runs[1], runs[0], 1e-9)
    for log, expected in zip(runs[1]["logs"], runs[0]["logs"], strict=True):
        names = {"reward", "completions/mean_length", "entropy", "clip_ratio/region_mean", "num_tokens"}
        for name in names & expected.keys():  # a step without rollouts of its own logs less
            assert log[name] == pytest.approx(expected[name], rel=1e-6)
    assert any(log["loss"] for log in runs[0]["logs"])


def test_the_reference_is_trls(tmp_path):
    """TRL reads transformers' own class from the checkpoint; ours copies the policy. fp32 router rounding apart."""
    policy(0, torch.float32).save_pretrained(tmp_path / "policy")
    runs = []
    for kind, config, extra in (
        (GRPOTrainer, GRPOConfig, {"router_aux_loss_coef": 0.0}),
        (MoEGRPOTrainer, MoEGRPOConfig, {}),
    ):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
        settings = {"model": model, "beta": 0.5, "learning_rate": 3e-3, "steps": 3, "engine": {}}
        trainer, recorder, _ = make_trainer(kind, config, str(tmp_path / kind.__name__), **(settings | extra))
        run_quickly(trainer)
        runs.append({"logs": recorder.logs, "grads": recorder.grads})
    assert runs[0]["logs"][2]["kl"] > 1e-3
    for log, expected in zip(runs[1]["logs"], runs[0]["logs"], strict=True):
        assert log["kl"] == pytest.approx(expected["kl"], rel=1e-3, abs=1e-6)
        assert log["loss"] == pytest.approx(expected["loss"], rel=1e-4, abs=1e-5)


def test_adapters_off_are_the_reference(tmp_path):
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=4)
    settings = {"peft_config": lora, "beta": 0.1, "learning_rate": 0.05, "engine": {}, **KERNEL}
    trainer, recorder, _ = make_trainer(MoEGRPOTrainer, MoEGRPOConfig, str(tmp_path), **settings)
    run_quickly(trainer)
    assert trainer.ref_model is None
    assert recorder.logs[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert recorder.logs[1]["kl"] > 1e-4


# ---- the papers' formulas ----


def formula(model, ref_model, batch: dict, name: str) -> torch.Tensor:
    """The objective of the paper, sample by sample and token by token, from full logits; a loss to minimise."""
    terms, num_tokens = [], int(batch["completion_mask"].sum())
    for row in range(len(batch["prompt_ids"])):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        length = int(batch["completion_mask"][row].sum())
        answer = batch["completion_ids"][row][:length]

        def logps(of_model, prompt=prompt, answer=answer):
            ids = torch.cat([prompt, answer])[None]
            logits = of_model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            return logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]

        new, old, advantage = logps(model), batch["old_per_token_logps"][row][:length], batch["advantages"][row]
        ratio = (new - old).exp()
        if name == "gspo":
            s = (new - old).mean().exp()
            terms.append(-torch.min(s * advantage, s.clamp(1 - 3e-4, 1 + 4e-4) * advantage) / 8)
            continue
        if name == "cispo":
            terms.append(-(ratio.clamp(max=5.0).detach() * advantage * new).sum() / num_tokens)
            continue
        high = 1.28 if name == "dapo" else 1.2
        clipped = -torch.min(ratio * advantage, ratio.clamp(0.8, high) * advantage)
        if name == "grpo":
            with torch.no_grad():
                ref = logps(ref_model)
            clipped = clipped + 0.04 * ((ref - new).exp() - (ref - new) - 1)
            terms.append(clipped.mean() / 8)
        else:
            terms.append(clipped.sum() / (num_tokens if name == "dapo" else 8 * 12))
    return sum(terms)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_papers_formulas(name, tolerance, tmp_path):
    settings = {"engine": {}, **KERNEL, **PRESETS[name]}
    trainer, _, _ = make_trainer(MoEGRPOTrainer, MoEGRPOConfig, str(tmp_path), **settings)
    trainer.current_gradient_accumulation_steps = 1
    with torch.no_grad():  # away from the reference
        trainer.model.lm_head.weight += 0.05 * torch.randn(128, 64, generator=torch.Generator().manual_seed(5))
    batch = rollouts(trainer)
    loss = trainer._compute_loss(trainer.model, batch)
    expected = formula(trainer.model, policy(0), batch, name)
    # Advantages of a group cancel, and with them most of the loss's value.
    assert loss.item() == pytest.approx(expected.item(), rel=TOLERANCE, abs=1e-6)
    assert worst(gradients(loss, trainer.model), gradients(expected, trainer.model)) < tolerance


# ---- however the step is split ----


@pytest.fixture(scope="module")
def whole() -> dict:
    return train(**EVERYTHING)


@pytest.mark.parametrize(
    "split",
    [{"batch": 2, "accumulation": 4}, {"batch": 4, "accumulation": 2, "gradient_checkpointing": True}],
    ids=["accumulation", "recompute"],
)
def test_one_process(split, whole):
    assert_same_run(train(**EVERYTHING, **split), whole)


def test_two_processes(whole):
    plain = {"engine": {}, "beta": 0.1, "max_grad_norm": 0.5}
    runs = [
        EVERYTHING | {"batch": 4, "ep_size": 1},
        EVERYTHING | {"batch": 2, "accumulation": 2, "ep_size": 2},
        plain | {"batch": 2, "accumulation": 2, "ep_size": 2},
        # The model samples itself, over both processes.
        {"engine": None, "batch": 4, "ep_size": 2, "steps": 1},
    ]
    adapted = EVERYTHING | {"peft_config": expert_lora(), "beta": 0.1, "optim": "sgd", "learning_rate": 0.1}
    runs.append(adapted | {"batch": 2, "accumulation": 2, "ep_size": 2})
    reference, reference_adapted = train(**plain), train(**adapted)
    results = run_on_ranks("tests.trainers.rl_scenario:train_all", 2, runs=runs)
    for first, second, third, fourth, with_adapters in results:
        assert_same_run(first, whole)
        assert_same_run(second, whole)
        assert_same_run(third, reference)
        assert fourth["logs"][0]["completions/max_length"] > 0
        assert_same_run(with_adapters, reference_adapted)


def test_two_processes_that_share_sequences(whole):
    """Routes of an engine (R3) and of this trainer (R2), whose rows both processes have a part of; evaluation."""
    shared = {"batch": 4, "accumulation": 2, "sp_size": 2}
    evaluated = {"engine": {}, "evaluate": True, "per_device_eval_batch_size": 8, "steps": 1}
    plain = {"engine": {}, "beta": 0.1, "max_grad_norm": 0.5}
    adapted = EVERYTHING | {"peft_config": expert_lora(), "beta": 0.1, "optim": "sgd", "learning_rate": 0.1}
    runs = [
        EVERYTHING | shared | {"gradient_checkpointing": True},
        R2 | shared,
        evaluated | shared,
        plain | shared,
        adapted | shared,
        {"engine": None, "batch": 4, "sp_size": 2, "steps": 1},
    ]
    expected = [whole, train(**R2), train(**evaluated), train(**plain), train(**adapted)]
    results = run_on_ranks("tests.trainers.rl_scenario:train_all", 2, runs=runs)
    for found in results:
        for run, reference in zip(found, expected, strict=False):
            assert_same_run(run, reference)
        for name in ("eval_loss", "eval_reward", "eval_completions/mean_length"):
            assert found[2]["evaluated"][name] == pytest.approx(expected[2]["evaluated"][name], rel=1e-6), name
    assert abs(expected[2]["evaluated"]["eval_loss"]) > 1e-3
    # Sampled by each rank in its own way, trained on by both what the first one sampled.
    assert_same_run(*(runs[-1] for runs in results))


# ---- balance and routers ----


def test_balance_losses_never_move_a_model_alone(tmp_path):
    def equal(completions, **_):
        return [1.0] * len(completions)

    balance = KERNEL | {
        "router_aux_loss_coef": 0.5,
        "router_z_loss_coef": 0.5,
        "batch": 2,
        "accumulation": 4,
        "engine": {},
    }
    trainer, recorder, _ = make_trainer(MoEGRPOTrainer, MoEGRPOConfig, str(tmp_path), reward=equal, **balance)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    run_quickly(trainer)
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert recorder.logs[0]["router/aux_loss"] > 1  # counted all the same


def test_balance_losses_are_off_by_default(tmp_path):
    """The checkpoint's own coefficient is 0.001, which TRL would use."""
    trainer, _, _ = make_trainer(MoEGRPOTrainer, MoEGRPOConfig, str(tmp_path), engine={}, **KERNEL)
    assert trainer.model.config.router_aux_loss_coef == 0.001
    assert not trainer._balance.config.has_losses
    assert not trainer.aux_loss_enabled


def test_frozen_routers_stay_and_the_rest_learns():
    run = train(freeze_router=True)
    before = policy(0).state_dict()
    moved = {name for name, tensor in run["state"].items() if not torch.equal(tensor, before[name].double())}
    assert {name for name in before if name not in moved} == {f"model.layers.{i}.mlp.gate.weight" for i in (0, 2)}


# ---- router replay ----


def test_r3_brings_the_trainer_closer_to_the_engine():
    """An engine whose routers choose otherwise: with its routes replayed, KL(engine || trainer) falls."""
    engine = {"scores": True, "noise": 0.02}
    without = train(engine=engine, steps=1)["logs"][0]
    replayed = train(engine=engine | {"with_routes": True}, steps=1, router_replay="R3")["logs"][0]
    assert 0 < replayed["mismatch/k3"] < 0.5 * without["mismatch/k3"]
    assert replayed["mismatch/ess"] > without["mismatch/ess"]


def test_r3_of_the_trainers_own_routes_is_no_change():
    engine = {"scores": True}
    without = train(engine=engine, steps=1)
    replayed = train(engine=engine | {"with_routes": True}, steps=1, router_replay="R3")
    assert_same_run(replayed, without, 1e-12)
    assert replayed["logs"][0]["mismatch/k3"] == pytest.approx(0, abs=1e-9)


def test_r3_needs_routes(tmp_path):
    with pytest.raises(ValueError, match="router_replay is 'R3', but the rollouts carry no 'routed_experts'"):
        train(engine={}, router_replay="R3")


def test_r2_replays_what_the_old_log_probabilities_chose(tmp_path):
    """In a second iteration over the same rollouts the weights have moved; the routes have not."""
    settings = {"engine": {}, "router_replay": "R2", "num_iterations": 2, "learning_rate": 0.1, **KERNEL}
    trainer, _, _ = make_trainer(MoEGRPOTrainer, MoEGRPOConfig, str(tmp_path), **settings)
    used, native = [], []
    router = trainer.model.model.layers[0].mlp.gate

    def by_sample(inputs, ids_TK) -> list[torch.Tensor]:
        return list(ids_TK.split(inputs[1].document_T.bincount().tolist()))

    router.register_forward_hook(lambda _, inputs, routing: used.append(by_sample(inputs, routing.topk_ids_TK)))
    router.register_forward_hook(
        lambda module, inputs, _: native.append(
            by_sample(inputs, module.select(module.scores(module.logits(inputs[0]))))
        )
    )
    run_quickly(trainer)
    old, first, second = used
    assert len(old) == 8
    for sample, again in zip(first, second, strict=True):
        assert torch.equal(sample, again)
        assert any(torch.equal(sample, one) for one in old)  # TRL shuffles samples
    assert not all(torch.equal(*pair) for pair in zip(native[2], second, strict=True))


def test_r2_is_not_of_the_reference(tmp_path):
    """With adapters the reference is the same model; on policy its forward would be the only one, and recorded."""
    lora = LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False)
    settings = {"peft_config": lora, "beta": 0.1, "engine": {}, **KERNEL}
    trainer, _, _ = make_trainer(MoEGRPOTrainer, MoEGRPOConfig, str(tmp_path), router_replay="R2", **settings)
    plain, _, _ = make_trainer(MoEGRPOTrainer, MoEGRPOConfig, str(tmp_path / "plain"), **settings)
    batch = rollouts(trainer, drift=0.0)
    assert "routed_experts" not in batch
    assert torch.equal(batch["ref_per_token_logps"], rollouts(plain, drift=0.0)["ref_per_token_logps"])


# ---- train-inference mismatch ----


def test_the_correction_weighs_every_token(tmp_path):
    """Folded into the advantages: the loss and its gradient are those of the weighted formula."""
    settings = {"engine": {"scores": True, "seed": 1}, "mismatch_correction": "icepop", **KERNEL}
    trainer, _, _ = make_trainer(MoEGRPOTrainer, MoEGRPOConfig, str(tmp_path), **settings)
    trainer.current_gradient_accumulation_steps = 1
    batch = rollouts(trainer, drift=0.0)
    train_logps, engine_logps = batch["old_per_token_logps"], batch["sampling_per_token_logps"]
    ratio = (train_logps - engine_logps).exp()
    weight = torch.where((ratio >= 0.5) & (ratio <= 5), ratio, 0.0)
    on = batch["completion_mask"].bool()
    assert 0 < (weight[on] > 0).float().mean() < 1
    plain, _, _ = make_trainer(
        MoEGRPOTrainer, MoEGRPOConfig, str(tmp_path / "plain"), engine={"scores": True}, **KERNEL
    )
    advantages = rollouts(plain)["advantages"]
    assert torch.allclose(batch["advantages"][on], (advantages[:, None] * weight)[on])
    loss = trainer._compute_loss(trainer.model, batch)
    logps = trainer._current_logps.__wrapped__(trainer, batch)
    expected = -((logps - logps.detach()).exp() * advantages[:, None] * weight * on).sum() / on.sum()
    assert worst(gradients(loss, trainer.model), gradients(expected, trainer.model)) < TOLERANCE
    assert trainer._metrics["train"]["mismatch/kept"][0] == pytest.approx((weight[on] > 0).float().mean().item())


def test_without_log_probabilities_there_is_nothing_to_correct():
    with pytest.raises(ValueError, match="mismatch_correction needs rollouts with the engine's log-probabilities"):
        train(engine={}, mismatch_correction="icepop")


# ---- settings ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "cispo"}, r"epsilon_high is the largest ratio itself, and it is None .* Set epsilon_high=5\.0"),
        ({"router_replay": "R4"}, "router_replay is 'R4'; choose 'R2', 'R3' or None"),
        ({"mismatch_correction": "magic"}, "mismatch_correction is 'magic'; it must be one of geometric_mask,"),
        ({"mismatch_correction": "geometric_mask"}, "no published bounds that fit every length"),
        ({"mismatch_correction": "token_mask", "mismatch_max": 0.9}, "must lie between them"),
        ({"mismatch_veto": 1e-4}, "need a mismatch_correction"),
    ],
)
def test_settings_that_cannot_be(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        MoEGRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_replay_of_a_dense_model(tmp_path):
    with pytest.raises(ValueError, match="the model has no routers"):
        make_trainer(
            MoEGRPOTrainer, MoEGRPOConfig, str(tmp_path), engine={}, router_replay="R2", model=policy(0, dense=True)
        )


def test_the_correction_takes_the_place_of_trls(tmp_path):
    config = MoEGRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, mismatch_correction="icepop")
    assert not config.vllm_importance_sampling_correction


def test_toy_tokenizer_reads_back_what_it_writes():
    tokenizer = char_tokenizer()
    assert tokenizer.decode(tokenizer("12+9= a")["input_ids"]) == "12+9= a"
    assert RouterMap(policy(0)).layers == [0, 2]
