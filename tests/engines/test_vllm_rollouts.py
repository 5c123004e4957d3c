"""Reinforcement learning with a real vLLM on the CPU: rollouts, new weights in place, and a model that learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.engines.server import VllmServer
from tests.rl.toy import char_tokenizer, first_operand_reward, first_operand_task
from tests.tiny import build, moe_config
from tests.trainers.preference_scenario import run_quickly
from tests.trainers.scenario import Recorder
from xtuner_hf import MoEGRPOConfig, MoEGRPOTrainer, Qwen3MoeForCausalLM
from xtuner_hf.moe.lora import adopt_wrappers
from xtuner_hf.rl.engines.contract import Sampling
from xtuner_hf.rl.engines.vllm import VllmEngine
from xtuner_hf.rl.rollouts import EngineRollouts
from xtuner_hf.rl.weight_sync import WeightSync, WeightSyncError

STEPS = 40


def model_of(seed: int, initializer_range: float = 0.2) -> Qwen3MoeForCausalLM:
    # vLLM's kernels for CPUs want multiples of 32.
    config = moe_config(moe_intermediate_size=32, num_attention_heads=2, initializer_range=initializer_range)
    return build(Qwen3MoeForCausalLM, config, seed=seed)


def logps(model, prompt: list[int], new: list[int], temperature: float) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + new]), use_cache=False).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(new)[:, None])[:, 0]


def check_rollouts(engine: VllmEngine, model, version: str) -> None:
    prompts = [[5, 6, 7], [9] * 10, [100, 20, 33, 44]]
    for temperature in (1.0, 0.7):
        completions = engine.generate(prompts, Sampling(8, temperature, stop_token_ids=(1,), seed=0))
        for prompt, completion in zip(prompts, completions, strict=True):
            expected = logps(model, prompt, completion.token_ids, temperature)
            assert (torch.tensor(completion.logprobs) - expected).abs().max() < 1e-4
            assert completion.versions == [(0, len(completion.token_ids), version)]


def grpo(engine: VllmEngine, folder: Path) -> list[dict]:
    recorder = Recorder()
    trainer = MoEGRPOTrainer(
        model=model_of(2, initializer_range=0.05),
        args=MoEGRPOConfig(
            output_dir=str(folder / "run"),
            per_device_train_batch_size=64,
            num_generations=8,
            max_completion_length=1,
            max_steps=STEPS,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            mismatch_correction="token_truncate",
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
        ),
        reward_funcs=first_operand_reward,
        train_dataset=first_operand_task(),
        processing_class=char_tokenizer(),
        rollout_func=EngineRollouts(engine, folder / "weights", seed=0, probe_tokens=100),
        callbacks=[recorder],
    )
    run_quickly(trainer)
    return recorder.logs


@pytest.mark.engine
def test_a_real_engine_samples_takes_new_weights_and_the_model_learns(tmp_path):
    first, second = model_of(0), model_of(1)
    first.save_pretrained(tmp_path / "served")
    with VllmServer(tmp_path / "served", tmp_path) as server:
        engine = VllmEngine(server.url, deadline=60)
        check_rollouts(engine, first, "default")

        sync = WeightSync(engine, tmp_path / "weights", probe_tokens=100)
        for version, model in (("1", second), ("2", first), ("3", second)):
            assert sync(model, version)["weight_sync/probe_difference"] < 1e-4
            check_rollouts(engine, model, version)

        # Adapters arrive merged.
        targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets, init_lora_weights=False)
        adapted = get_peft_model(model_of(0), lora)
        adopt_wrappers(adapted)
        assert sync(adapted, "adapted")["weight_sync/probe_difference"] < 1e-4
        check_rollouts(engine, adapted, "adapted")

        # An update that loses tensors on its way does not go unnoticed.
        class Loses(VllmEngine):
            def load(self, files):
                for file in files:
                    save_file({name: t for name, t in load_file(file).items() if ".experts." not in name}, file)
                super().load(files)

        with pytest.raises(WeightSyncError, match="it takes no notice of its experts"):
            WeightSync(Loses(server.url, deadline=60), tmp_path / "weights", probe_tokens=100)(first, "4")

        logs = grpo(engine, tmp_path)
    rewards = [log["reward"] for log in logs]
    print(f"mean reward of five steps: {sum(rewards[:5]) / 5:.2f} at first, {sum(rewards[-5:]) / 5:.2f} after {STEPS}")
    assert max(log["weight_sync/probe_difference"] for log in logs) < 1e-3
    assert max(log["mismatch/logp_difference_max"] for log in logs) < 1e-3
    assert sum(rewards[:5]) / 5 < 0.2
    assert sum(rewards[-5:]) / 5 > 0.6, rewards
