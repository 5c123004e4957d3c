"""What our subclasses lean on in TRL 1.16: signatures, attributes and the keys of rollouts. Fails when one moves.

TRL's own tests are neither in its wheel nor in its source distribution: `python -m benchmarks.trl_tests` runs those of
a checkout with our classes. Here each of our trainers runs against TRL's (test_equals_trl in
test_{sft,dpo,grpo,kto}.py).
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import trl

from tests.trainers import preference_scenario, rl_scenario
from xtuner_hf.trainers.trl import prepare_reference

SIGNATURES = {
    "DPOTrainer": {
        "_compute_loss": ["self", "model", "inputs", "return_outputs"],
        "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
        "compute_ref_log_probs": ["self", "model", "inputs"],
    },
    "GRPOTrainer": {
        "_compute_loss": ["self", "model", "inputs"],
        "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
        "_generate": ["self", "prompts"],
        "_generate_and_score_completions": ["self", "inputs"],
        "_generate_single_turn": [
            *("self", "prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"),
        ],
        "_prepare_inputs": ["self", "generation_batch"],
        "_tool_call_loop": [
            *("self", "prompts", "prompt_ids", "completion_ids", "completions", "logprobs", "images"),
            "multimodal_fields",
        ],
    },
    "KTOTrainer": {
        "_compute_kl_logps": ["self", "model", "batch"],
        "_compute_loss": ["self", "model", "inputs", "return_outputs"],
        "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
        "compute_ref_log_probs": ["self", "model", "inputs"],
    },
    "SyncRefModelCallback": {"__init__": ["self", "ref_model", "accelerator"]},
}
ATTRIBUTES = {
    "MoEDPOTrainer": (
        *("aux_loss_enabled", "beta", "loss_types", "loss_weights", "precompute_ref_logps", "ref_model", "_metrics"),
    ),
    "MoEDAPOTrainer": (
        *("aux_loss_enabled", "beta", "ref_model", "temperature", "num_generations", "max_completion_length"),
        *("reward_funcs", "reward_func_names", "reward_processing_classes", "reward_weights", "state"),
        *("top_p", "top_k", "min_p", "repetition_penalty", "eos_token_ids"),
        *("_step", "_current_train_step_time", "_entropy_bonus_enabled", "_metrics", "_tokenizer", "_buffered_inputs"),
    ),
}


@pytest.mark.parametrize(("name", "method"), [(n, m) for n, methods in SIGNATURES.items() for m in methods])
def test_signatures(name, method):
    assert list(inspect.signature(getattr(getattr(trl, name), method)).parameters) == SIGNATURES[name][method]


def test_the_log_probabilities_take_what_we_pass():
    method = trl.GRPOTrainer._get_per_token_logps_and_entropies
    names = list(inspect.signature(method).parameters)
    assert names[:6] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]
    from xtuner_hf.trainers.grpo import _IMAGE_KEYS

    assert set(_IMAGE_KEYS) == set(names[6:]) - {"compute_entropy", "compute_aux_loss"}


def test_losses_are_scaled_as_we_expect():
    assert trl.DPOTrainer.loss_is_scaled_for_ga is False  # ours does it over the step
    assert trl.GRPOTrainer.loss_is_scaled_for_ga is True


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes(name, tmp_path):
    import xtuner_hf

    classes = getattr(xtuner_hf, name), getattr(xtuner_hf, name.replace("Trainer", "Config"))
    if name == "MoEDPOTrainer":
        trainer, _ = preference_scenario.make_trainer(*classes, str(tmp_path), batch=8, accumulation=1, steps=1)
    else:
        trainer, _, _ = rl_scenario.make_trainer(*classes, str(tmp_path), engine={})
    assert all(hasattr(trainer, attribute) for attribute in ATTRIBUTES[name])


def test_accelerate_shards_no_reference():
    args = SimpleNamespace(world_size=2, fsdp=True)
    with pytest.raises(ValueError, match="asks Accelerate for FSDP, which shards the policy and no reference model"):
        prepare_reference(None, args)


def test_keys_of_rollouts(tmp_path):
    engine = {"scores": True, "tool_tokens": True}
    trainer, _, _ = rl_scenario.make_trainer(
        trl.GRPOTrainer, trl.GRPOConfig, str(tmp_path), engine=engine, num_iterations=2, router_aux_loss_coef=0.0
    )
    batch = rl_scenario.rollouts(trainer)
    assert set(batch) == {
        *("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch"),
        *("old_per_token_logps", "sampling_per_token_logps", "tool_mask"),
    }
