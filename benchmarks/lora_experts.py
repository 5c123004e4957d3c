"""An adapter on the experts of one layer: PEFT's forward, which adds it to the weights, against ours, on the tokens.

    python -m benchmarks.lora_experts

Forward and backward of one experts module with frozen weights and LoRA on both projections, on this machine's CPU, with
the same grouped matrix product. `allocated` is what all operators together allocate.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen3MoeConfig

from xtuner_hf.moe.experts import GroupedExperts
from xtuner_hf.moe.lora import adopt_wrappers

RESULTS = Path(__file__).parent / "results" / "lora_experts.json"


def make(options: dict) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        num_experts=options["num_experts"],
        num_experts_per_tok=options["top_k"],
        hidden_size=options["hidden_size"],
        moe_intermediate_size=options["intermediate_size"],
    )
    config._experts_implementation = "xtuner_grouped_mm"
    experts = GroupedExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    targets = [f"experts.{name}" for name, _ in experts.named_parameters()]
    lora = LoraConfig(r=options["rank"], target_modules=[], target_parameters=targets, init_lora_weights=False)
    theirs = get_peft_model(nn.ModuleDict({"experts": experts}), lora)
    ours = copy.deepcopy(theirs)
    adopt_wrappers(ours)
    return {"peft": theirs.get_base_model()["experts"], "ours": ours.get_base_model()["experts"]}


def measure(experts: nn.Module, options: dict, repeats: int) -> dict:
    hidden_TH = torch.randn(options["tokens"], options["hidden_size"], requires_grad=True)
    ids_TK = torch.rand(options["tokens"], options["num_experts"]).topk(options["top_k"]).indices
    weights_TK = torch.rand(options["tokens"], options["top_k"]).softmax(-1)

    def step() -> None:
        experts(hidden_TH, ids_TK, weights_TK).sum().backward()

    step()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    return {"milliseconds": min(seconds) * 1e3, "allocated_megabytes": allocated / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"num_experts": 64, "top_k": 4, "hidden_size": 512, "intermediate_size": 256, "tokens": 1024, "rank": 16}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    options = {name: getattr(arguments, name) for name in sizes}
    figures: dict = {"options": options}
    for name, experts in make(options).items():
        figures[name] = measure(experts, options, arguments.repeats)
    figures["ours_over_peft"] = {key: figures["ours"][key] / value for key, value in figures["peft"].items()}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
