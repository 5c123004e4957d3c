"""The benchmark's results as a table and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLUMNS = (
    "| shape | tokens x length | routing | recompute | variant | tokens/s | forward / backward / optimizer ms | "
    "TFLOP/s | % of matrix rate | peak GB |"
)


def table(results: dict[str, Any]) -> str:
    """Markdown: a row a case. TFLOP/s and % are of forward and backward, tokens/s of the whole step."""
    lines = [COLUMNS, "|" + "---|" * (COLUMNS.count("|") - 1)]
    for case in results["cases"]:
        name = (
            f"| {case['shape']} | {case['tokens'] // 1024}k x {case['length'] / 1024:g}k | {case['routing']} | "
            f"{case['recompute']} | {case['variant']} |"
        )
        if "error" in case:
            lines.append(f"{name} {case['error'].splitlines()[0][:80]} | | | | |")
            continue
        parts = " / ".join(f"{1e3 * case['seconds'][part]:.1f}" for part in ("forward", "backward", "optimizer"))
        peak = "" if case["peak_gigabytes"] is None else f"{case['peak_gigabytes']:.1f}"
        share = 1e12 * case["model_tflops_of_passes"] / results["matrix_flops_per_second"]
        lines.append(
            f"{name} {case['tokens_per_second']:,.0f} | {parts} | {case['model_tflops_of_passes']:.3g} | "
            f"{100 * share:.0f} | {peak} |"
        )
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars: tokens/s of each variant, a group for each other choice."""
    from matplotlib.figure import Figure

    groups: dict[str, dict[str, float]] = {}
    for case in results["cases"]:
        if "error" not in case:
            name = f"{case['shape']}\n{case['length'] / 1024:g}k, {case['routing']}\nrecompute {case['recompute']}"
            groups.setdefault(name, {})[case["variant"]] = case["tokens_per_second"]
    variants = list(dict.fromkeys(variant for group in groups.values() for variant in group))
    figure = Figure(figsize=(max(5.0, 1.6 * len(groups)), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(len(variants), 1)
    for place, variant in enumerate(variants):
        heights = [group.get(variant, 0.0) for group in groups.values()]
        axes.bar([index + place * width for index in range(len(groups))], heights, width, label=variant)
    middle = 0.4 - width / 2
    axes.set_xticks([index + middle for index in range(len(groups))], list(groups), fontsize=7)
    axes.set_ylabel("tokens/s")
    axes.set_title(results["device"])
    if variants:
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
