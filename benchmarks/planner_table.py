"""The table of docs/planner.md: plans of published models on clusters, each by dry runs on this machine.

    python benchmarks/planner_table.py [NAME ...]

Runs the rows that benchmarks/results/planner_table.json lacks (all of it anew with --again), ten to forty seconds of
one core each, and prints the table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from xtuner_hf.plan import make_job, plan_job
from xtuner_hf.plan.planning import quieten

RESULTS = Path(__file__).parent / "results" / "planner_table.json"
QWEN, DEEPSEEK, KIMI = "qwen3-235b-a22b", "deepseek-v3", "kimi-k2"
DOCUMENT = 4096


def row(model: str, gpus: int, seq_len: int, *, device: str = "h800", **changes: Any) -> tuple[str, dict[str, Any]]:
    document_len = DOCUMENT if seq_len > DOCUMENT else None
    return model, {"gpus": gpus, "seq_len": seq_len, "document_len": document_len, "device": device, **changes}


OFFLOAD = {"activation_offload": True}
EP = {"ep_size": 8}
ROWS = {
    "Q128-4K": row(QWEN, 128, 4096),
    "Q256-4K": row(QWEN, 256, 4096),
    "Q128-64K": row(QWEN, 128, 65536),
    "Q256-64K": row(QWEN, 256, 65536),
    "Q128-64K, offload": row(QWEN, 128, 65536, **OFFLOAD),
    "Q256-64K, offload": row(QWEN, 256, 65536, **OFFLOAD),
    "Q256-32K, offload": row(QWEN, 256, 32768, **OFFLOAD),
    "D256-4K": row(DEEPSEEK, 256, 4096, **EP),
    "D512-4K": row(DEEPSEEK, 512, 4096, **EP),
    "D256-16K": row(DEEPSEEK, 256, 16384, **EP),
    "D512-16K": row(DEEPSEEK, 512, 16384, **EP),
    "D512-32K, offload": row(DEEPSEEK, 512, 32768, **EP, **OFFLOAD),
    "K512-4K": row(KIMI, 512, 4096, **EP),
    "K1024-4K": row(KIMI, 1024, 4096, **EP),
    "K512-16K": row(KIMI, 512, 16384, **EP),
    "K1024-16K": row(KIMI, 1024, 16384, **EP),
    "K512-32K, offload": row(KIMI, 512, 32768, **EP, **OFFLOAD),
    "K1024-32K, offload": row(KIMI, 1024, 32768, **EP, **OFFLOAD),
    "Q30-4K": row("qwen3-30b-a3b", 8, 4096, device="h100", micro_batch=4, **EP),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="rows to run; all by default")
    parser.add_argument("--again", action="store_true", help="run those that are there already, too")
    options = parser.parse_args()
    quieten()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in options.names or ROWS:
        if name not in results or options.again:
            model, arguments = ROWS[name]
            plan = plan_job(make_job(model, **arguments))
            results[name] = {"model": model, **plan.as_dict()}
            RESULTS.write_text(json.dumps({name: results[name] for name in ROWS if name in results}, indent=1) + "\n")
    print(table(results))


def table(results: dict[str, Any]) -> str:
    lines = ["| row | fits | GiB needed (of 79.6), 2x | step, s | tokens/s a device | MFU | computing |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name in ROWS:
        if name not in results:
            lines.append(f"| {name} | not run yet | | | | | |")
            continue
        plan = results[name]
        even, busier = plan["balanced"], plan["unbalanced"]
        outside = plan["needed_gib"] - max(part["reserved_gib"] for part in (even, busier) if part)
        needed = f"{even['reserved_gib'] + outside:.1f}" + (
            f", {busier['reserved_gib'] + outside:.1f}" if busier else ""
        )
        low, high = plan["mfu_range"]
        lines.append(
            f"| {name} | {'yes' if plan['fits'] else '**no**'} | {needed} | {even['seconds']:.1f} | "
            f"{plan['tokens_per_second_per_device']:,.0f} | {plan['mfu']:.3f} ({low:.2f} to {high:.2f}) | "
            f"{even['compute_seconds'] / even['seconds']:.0%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
