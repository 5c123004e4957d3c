"""The loss curve of FP8 training next to bf16's, from the same start on the same batches.

    python -m benchmarks.fp8_loss                # this machine; a CPU computes FP8 with dequantised values

A small Qwen3-MoE learns the transitions of a random Markov chain through `MoETrainer`, in bf16 (fp32 parameters,
autocast) with and without `fp8=True`. `worst_difference` is the largest relative distance between the two curves, each
the mean over `--window` steps. A third run, bf16 with another order of the batches, says how far two curves lie apart
that nobody would tell apart.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import Qwen3MoeConfig, TrainerCallback, set_seed

import xtuner_hf
from xtuner_hf.data import PackedCollator
from xtuner_hf.device import device_name

RESULTS = Path(__file__).parent / "results" / "fp8_loss.json"
VOCABULARY, LENGTH = 256, 64


def rows(number: int, seed: int = 0) -> list[dict]:
    """Walks on a Markov chain with four successors of each token, of falling probability."""
    generator = torch.Generator().manual_seed(seed)
    successors = torch.randint(0, VOCABULARY, (VOCABULARY, 4), generator=generator)
    odds = torch.tensor([0.6, 0.2, 0.15, 0.05])
    walk = torch.randint(0, VOCABULARY, (number, 1), generator=generator)
    for _ in range(LENGTH - 1):
        choice = torch.multinomial(odds, number, replacement=True, generator=generator)
        walk = torch.cat([walk, successors[walk[:, -1], choice][:, None]], dim=1)
    return [{"input_ids": row, "labels": row} for row in walk.tolist()]


class Losses(TrainerCallback):
    """The loss of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.values.append(logs["loss"])


def train(steps: int, batch: int, seed: int = 0, **arguments) -> list[float]:
    """Losses of a run; `seed` is that of the batches' order, the start is always the same."""
    set_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    )
    losses = Losses()
    with tempfile.TemporaryDirectory() as folder:
        args = xtuner_hf.MoETrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch,
            max_steps=steps,
            learning_rate=2e-3,
            warmup_steps=20,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False,
            seed=seed,
            **arguments,
        )
        trainer = xtuner_hf.MoETrainer(
            model=xtuner_hf.AutoModelForCausalLM.from_config(config),
            args=args,
            train_dataset=Dataset.from_list(rows(steps * batch)),
            data_collator=PackedCollator(pad_token_id=0),
            callbacks=[losses],
        )
        trainer.train()
    return losses.values


def worst_difference(losses: list[float], reference: list[float], window: int) -> float:
    """Of the means over `window` steps, relative to the reference's."""
    ours, theirs = (torch.tensor(values).unfold(0, window, 1).mean(1) for values in (losses, reference))
    return ((ours - theirs).abs() / theirs).max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--window", type=int, default=10)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    size = {"steps": arguments.steps, "batch": arguments.batch}
    bf16, fp8, other_order = train(**size), train(**size, fp8=True), train(**size, seed=1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures = {
        "device": device_name(device),
        "torch": torch.__version__,
        **size,
        "window": arguments.window,
        "worst_difference": worst_difference(fp8, bf16, arguments.window),
        "worst_difference_of_another_order": worst_difference(other_order, bf16, arguments.window),
        "last": {
            "bf16": sum(bf16[-arguments.window :]) / arguments.window,
            "fp8": sum(fp8[-arguments.window :]) / arguments.window,
        },
        "losses": {"bf16": bf16, "fp8": fp8},
    }
    arguments.output.write_text(json.dumps(figures) + "\n")
    print(json.dumps({name: value for name, value in figures.items() if name != "losses"}, indent=2))


if __name__ == "__main__":
    main()
