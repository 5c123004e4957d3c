"""Supervised fine-tuning, then DPO and MPO on real preferences, from random weights; a minute or two on a CPU.

    pip install --no-deps textarena==0.7.4
    python examples/dpo.py --output_dir dpo_output

260 pairs of a true and a false statement about the same thing (package textarena, MIT). First the model learns to
write such statements, from the true ones; then to prefer the true one of a pair, once by DPO and once by MPO.
`curve.png` holds what to look at: the share of pairs that are in the right order, and the log-probability of the true
statements, which DPO alone lets fall. A model as small as this one knows nothing of the world: it learns the pairs that
it is shown, and on the held-out ones it stays near chance.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from matplotlib.figure import Figure
from small import character_tokenizer, small_moe
from transformers import set_seed

from xtuner_hf import (
    MoEDPOConfig,
    MoEDPOTrainer,
    MoEMPOConfig,
    MoEMPOTrainer,
    MoESFTConfig,
    MoESFTTrainer,
)
from xtuner_hf.trainers.history import HISTORY_FILE, read_history
from xtuner_hf.trainers.progress import format_duration

PROMPT = "Fact: "
TRAINERS = {"dpo": (MoEDPOTrainer, MoEDPOConfig), "mpo": (MoEMPOTrainer, MoEMPOConfig)}


def preferences() -> list[dict[str, str]]:
    """Rows of `prompt`, `chosen` (true) and `rejected` (false)."""
    package = importlib.util.find_spec("textarena")  # not imported: its games need much that this does not
    if package is None:
        raise SystemExit("The statements come with a package: pip install --no-deps textarena==0.7.4")
    (folder,) = package.submodule_search_locations or ()
    rows = json.loads((Path(folder) / "envs" / "TruthAndDeception" / "facts.json").read_text(encoding="utf-8"))
    other = {"fact1": "fact2", "fact2": "fact1"}
    return [
        {
            "prompt": PROMPT,
            "chosen": row["facts"][row["correct_fact"]],
            "rejected": row["facts"][other[row["correct_fact"]]],
        }
        for row in rows
    ]


def settings(output_dir: Path, max_steps: int, **changes: Any) -> dict[str, Any]:
    defaults = {
        "output_dir": str(output_dir),
        "max_steps": max_steps,
        "per_device_train_batch_size": 20,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
    }
    return defaults | changes


def finetune(rows: list[dict[str, str]], folder: Path, max_steps: int) -> None:
    """Train on the true statements and save in `folder`."""
    tokenizer = character_tokenizer("".join(sorted({c for row in rows for text in row.values() for c in text})))
    trainer = MoESFTTrainer(
        model=small_moe(len(tokenizer), hidden_size=128, max_length=256),
        args=MoESFTConfig(**settings(folder, max_steps, learning_rate=3e-3, max_length=256)),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()


def prefer(algorithm: str, rows: dict[str, list], start: Path, folder: Path, max_steps: int) -> list[dict[str, Any]]:
    """Train on the pairs from the checkpoint `start`; the run's history."""
    trainer_class, config_class = TRAINERS[algorithm]
    changes = {"learning_rate": 5e-4, "beta": 0.1, "eval_strategy": "steps", "eval_steps": max(max_steps // 6, 1)}
    trainer = trainer_class(
        model=str(start),
        args=config_class(**settings(folder, max_steps, **changes)),
        train_dataset=Dataset.from_list(rows["train"]),
        eval_dataset=Dataset.from_list(rows["held out"]),
    )
    trainer.train()
    return read_history(folder / HISTORY_FILE)


def draw(histories: dict[str, list[dict]], path: Path) -> None:
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    order, likelihood = figure.subplots(1, 2)
    for name, history in histories.items():
        steps = [entry for entry in history if "rewards/accuracies" in entry]
        evaluations = [entry for entry in history if "eval_rewards/accuracies" in entry]
        x = [entry["step"] for entry in steps]
        (line,) = order.plot(x, [entry["rewards/accuracies"] for entry in steps], label=name.upper())
        order.plot(
            [entry["step"] for entry in evaluations],
            [entry["eval_rewards/accuracies"] for entry in evaluations],
            *("o:",),
            color=line.get_color(),
            label=f"{name.upper()}, held out",
        )
        likelihood.plot(x, [entry["logps/chosen"] for entry in steps], label=name.upper())
    order.set(xlabel="optimizer step", ylabel="pairs in the right order", ylim=(0, 1.02))
    likelihood.set(xlabel="optimizer step", ylabel="log-probability of the true statement (nats)")
    order.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("dpo_output"))
    parser.add_argument("--sft_steps", type=int, default=150)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of DPO and of MPO")
    options = parser.parse_args()
    folder = options.output_dir
    set_seed(0)
    pairs = preferences()
    rows = {"train": pairs[40:], "held out": pairs[:40]}
    started = time.monotonic()
    finetune(pairs[40:], folder / "sft", options.sft_steps)
    losses = [entry["loss"] for entry in read_history(folder / "sft" / HISTORY_FILE) if "loss" in entry]
    summary = [
        f"sft: loss {losses[0]:.2f} at first, {losses[-1]:.2f} in the end (nats a character); "
        f"{len(losses)} optimizer steps, {format_duration(time.monotonic() - started)}"
    ]
    histories = {}
    for algorithm in TRAINERS:
        started = time.monotonic()
        history = prefer(algorithm, rows, folder / "sft", folder / algorithm, options.steps)
        steps = [entry for entry in history if "rewards/accuracies" in entry]
        evaluations = [entry for entry in history if "eval_rewards/accuracies" in entry]
        histories[algorithm] = history
        right, held_out = steps[-1]["rewards/accuracies"], evaluations[-1]["eval_rewards/accuracies"]
        summary.append(
            f"{algorithm}: {right:.2f} of the pairs in the right order in the end ({held_out:.2f} held out); "
            f"log-probability of the true statements {steps[0]['logps/chosen']:.0f} -> "
            f"{steps[-1]['logps/chosen']:.0f} nats; {format_duration(time.monotonic() - started)}"
        )
    draw(histories, folder / "curve.png")
    print("\n" + "\n".join(summary))
    print(f"figure  {folder / 'curve.png'}")


if __name__ == "__main__":
    main()
