"""A small MoE with random weights learns a task by reinforcement alone, with GRPO and with DAPO; 15 s on a CPU.

    python examples/grpo.py --output_dir grpo_output

The task is generated: of two digits the larger one is asked for (`1>4=`), or the smaller one (`1<4=`); the answer is
verified, 1 or 0, and nothing else is ever shown to the model. A run ends when the mean reward of ten optimizer steps is
above 0.95. `curve.png` holds the rewards of both runs.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from matplotlib.figure import Figure
from small import character_tokenizer, small_moe
from transformers import TrainerCallback, set_seed

from xtuner_hf import MoEDAPOConfig, MoEDAPOTrainer, MoEGRPOConfig, MoEGRPOTrainer
from xtuner_hf.trainers.progress import format_duration

DIGITS = "01234"
SOLVED = 0.95
TRAINERS = {"grpo": (MoEGRPOTrainer, MoEGRPOConfig), "dapo": (MoEDAPOTrainer, MoEDAPOConfig)}


def questions() -> Dataset:
    """Rows of `prompt` and `answer`."""
    rows = [
        {"prompt": f"{a}{sign}{b}=", "answer": choose(a, b)}
        for sign, choose in ((">", max), ("<", min))
        for a in DIGITS
        for b in DIGITS
    ]
    return Dataset.from_list(rows).shuffle(seed=0)


def is_right(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [float(text.startswith(right)) for text, right in zip(completions, answer, strict=True)]


class StopWhenSolved(TrainerCallback):
    def __init__(self) -> None:
        self.rewards: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" in logs:
            self.rewards.append(logs["reward"])
            control.should_training_stop = first_step_above(self.rewards) is not None


def train(algorithm: str, output_dir: Path, max_steps: int, seed: int = 0, **changes: Any) -> list[float]:
    """Mean reward of each optimizer step; DAPO's is that of all that it sampled, chosen or not."""
    trainer_class, config_class = TRAINERS[algorithm]
    set_seed(seed)
    tokenizer = character_tokenizer(DIGITS + "<>=+-")
    settings = {
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 128,
        "num_generations": 8,
        "max_completion_length": 1,
        "loss_type": algorithm,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
    }
    if algorithm == "dapo":
        settings |= {"soft_overlong_fraction": 0.0}  # answers have one token
    trainer = trainer_class(
        model=small_moe(len(tokenizer), hidden_size=64, max_length=64),
        args=config_class(output_dir=str(output_dir), max_steps=max_steps, seed=seed, **(settings | changes)),
        reward_funcs=is_right,
        train_dataset=questions(),
        processing_class=tokenizer,
        callbacks=[stop := StopWhenSolved()],
    )
    trainer.train()
    return stop.rewards


def smoothed(rewards: list[float], window: int = 10) -> list[float]:
    """Mean over the last `window` steps."""
    return [sum(rewards[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(rewards))]


def first_step_above(rewards: list[float], threshold: float = SOLVED) -> int | None:
    """The first optimizer step, counted from 1, up to which the last ten are that good on average."""
    return next((i + 1 for i, mean in enumerate(smoothed(rewards)) if i >= 9 and mean > threshold), None)


def draw(curves: dict[str, list[float]], path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for name, rewards in curves.items():
        (line,) = axis.plot(range(1, len(rewards) + 1), smoothed(rewards), label=name.upper())
        axis.plot(range(1, len(rewards) + 1), rewards, color=line.get_color(), alpha=0.2)
    axis.axhline(SOLVED, color="gray", linestyle=":")
    axis.set(xlabel="optimizer step", ylabel="mean reward", ylim=(0, 1.02))
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("grpo_output"))
    parser.add_argument("--max_steps", type=int, default=300, help="optimizer steps of a run, at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    curves, summary = {}, []
    for algorithm in TRAINERS:
        started = time.monotonic()
        rewards = train(algorithm, options.output_dir / algorithm, options.max_steps, options.seed)
        curves[algorithm] = rewards
        summary.append(
            f"{algorithm}: mean reward {rewards[0]:.2f} at first, {smoothed(rewards)[-1]:.2f} in the end; "
            f"{len(rewards)} optimizer steps, {format_duration(time.monotonic() - started)}"
        )
    draw(curves, options.output_dir / "curve.png")
    print("\n" + "\n".join(summary))
    print(f"figure  {options.output_dir / 'curve.png'}")


if __name__ == "__main__":
    main()
