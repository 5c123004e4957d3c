"""One short run of reinforcement learning with everything about it recorded."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset

from tests.rl.engine import StubEngine, share_of_digits
from tests.rl.toy import char_tokenizer
from tests.trainers.preference_scenario import policy, run_quickly
from tests.trainers.scenario import Recorder, full

GROUP = 4
PROMPTS = ("3+5=", "12+9=", "7-2=", "40*2=", "5=", "say hi", "1+1=", "what?")


def make_trainer(
    kind: Any,
    config_class: Any,
    folder: str,
    *,
    batch: int = 8,
    accumulation: int = 1,
    steps: int = 2,
    engine: dict | None = None,
    reward: Any = share_of_digits,
    **arguments: Any,
):
    """A trainer of class `kind`, its recorder and its engine (None: the model samples itself)."""
    names = ("model", "peft_config", "train_dataset", "rollout_func", "processing_class", "environment_factory")
    keywords = {key: arguments.pop(key) for key in names if key in arguments}
    recorder = Recorder()
    stub = None
    if engine is not None:
        engine = dict(engine)
        scorer = policy(engine.pop("seed", 0)).eval() if engine.pop("scores", False) else None
        stub = StubEngine(scorer, **engine)
    defaults = {
        "max_completion_length": 12,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "max_grad_norm": 0.0,
        "learning_rate": 1e-3,
        "use_cpu": True,
    }
    args = config_class(
        output_dir=folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        logging_steps=1,
        num_generations=GROUP,
        shuffle_dataset=False,
        report_to=[],
        bf16=False,
        seed=3,
        **(defaults | arguments),
    )
    trainer = kind(
        **(
            {
                "model": policy(0),
                "rollout_func": stub,
                "train_dataset": Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
                "processing_class": char_tokenizer(),
            }
            | keywords
        ),
        reward_funcs=reward,
        args=args,
        callbacks=[recorder],
    )
    return trainer, recorder, stub


def train(kind: str = "MoEGRPOTrainer", **settings: Any) -> dict:
    """Train on 2 groups of 4 samples an optimizer step, if batch x ranks x accumulation is 8."""
    import xtuner_hf

    classes = getattr(xtuner_hf, kind), getattr(xtuner_hf, kind.replace("Trainer", "Config"))
    settings = {"engine": {}, "experts_kernel": "reference"} | settings
    evaluates = settings.pop("evaluate", False)
    with tempfile.TemporaryDirectory() as folder:
        trainer, recorder, engine = make_trainer(*classes, folder, **settings)
        run_quickly(trainer)
        evaluated = trainer.evaluate(trainer.train_dataset) if evaluates else {}
    state = {name: full(tensor) for name, tensor in trainer.model.state_dict().items()}
    calls = engine.calls if engine is not None else []
    return {"logs": recorder.logs, "grads": recorder.grads, "state": state, "calls": calls, "evaluated": evaluated}


def train_all(runs: list[dict]) -> list[dict]:
    return [train(**run) for run in runs]


def rollouts(trainer: Any, seed: int = 0, drift: float = 0.3) -> dict:
    """One batch as TRL hands it to the loss, with old log-probabilities that the policy has drifted away from."""
    generator = torch.Generator().manual_seed(seed)
    rows = [{"prompt": prompt} for prompt in PROMPTS[:2] for _ in range(GROUP)]
    trainer.model.train()
    batch = trainer._generate_and_score_completions(rows)
    logps = trainer._current_logps(batch) if hasattr(trainer, "_current_logps") else None
    if logps is not None:
        batch["old_per_token_logps"] = logps - drift * torch.randn(logps.shape, generator=generator).to(logps)
    return batch
