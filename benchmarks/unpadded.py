"""A batch of rollouts scored as TRL pads it, against its real tokens packed in a row.

    python -m benchmarks.unpadded

Forward and backward of a small Qwen3-MoE through TRL's head, on this machine's CPU; both ways in turn, in one run.
Prompts and answers have lengths with a long tail, as those of reasoning tasks do: most are short, one fills the width.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig

from xtuner_hf import Qwen3MoeForCausalLM
from xtuner_hf._compat import add_fused_lm_head
from xtuner_hf.memory.unpadded import UnpaddedModel

RESULTS = Path(__file__).parent / "results" / "unpadded.json"


def make_model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
    )
    model = Qwen3MoeForCausalLM(config).train()
    add_fused_lm_head(model)
    return model


def make_batch(num_rows: int, width: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Prompts in the first quarter of the width, padded on the left; answers behind it, padded on the right."""
    generator = torch.Generator().manual_seed(seed)

    def lengths(most: int) -> torch.Tensor:
        drawn = torch.empty(num_rows).log_normal_(0.0, 0.7, generator=generator)
        return (drawn / drawn.max() * most).ceil().long()

    start = width // 4
    column = torch.arange(width)
    first, last = start - lengths(start)[:, None], start + lengths(width - start)[:, None]
    mask = ((column >= first) & (column < last)).long()
    ids = torch.randint(8192, (num_rows, width), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.where((mask == 1) & (column >= start), -100)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"rows": 8, "width": 512, "repeats": 5}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    model, batch = make_model(), make_batch(arguments.rows, arguments.width)
    ways = {"padded": model, "unpadded": UnpaddedModel(model)}
    routed: list[int] = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda _, args, __: routed.append(len(args[0])))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way(**batch, fused_lm_head=True, use_cache=False).loss.backward()
            seconds[name].append(time.perf_counter() - start)
            model.zero_grad()
    tokens = dict(zip(ways, routed, strict=False))
    best = {name: min(values[1:]) for name, values in seconds.items()}  # the first warms up
    figures = {
        "ran_on": f"{torch.get_num_threads()} CPU thread(s), torch {torch.__version__}, fp32",
        "options": {name: getattr(arguments, name) for name in sizes},
        "tokens_computed": tokens,
        "milliseconds": {name: 1e3 * value for name, value in best.items()},
        "unpadded_over_padded": {
            "tokens": tokens["unpadded"] / tokens["padded"],
            "time": best["unpadded"] / best["padded"],
        },
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
