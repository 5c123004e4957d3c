"""`training.png`: loss, tokens per second and the load of the experts over a run, from its history."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .history import read_history

FIGURE_FILE = "training.png"


def draw_training(history_file: Path, figure_file: Path) -> None:
    """Draw a run; does nothing if the history holds no training step.

    Args:
        history_file: `history.jsonl` of the run.
        figure_file: written as PNG.
    """
    entries = read_history(history_file)
    steps = [entry for entry in entries if "loss" in entry]
    if not steps:
        return
    # Here, so that importing the package does not load a plotting library. An explicit canvas leaves the backend of
    # a notebook alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    loads = [entry for entry in steps if "load" in entry]
    num_layers = len(loads[0]["load"]) if loads else 0
    figure = Figure(figsize=(9, 5.5 + min(0.5 * num_layers, 6)), layout="constrained")
    FigureCanvasAgg(figure)
    ratios = [3, 2] + ([max(3, min(1.1 * num_layers, 10))] if loads else [])
    axes = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios)
    _draw_loss(axes[0], steps, [entry for entry in entries if "eval_loss" in entry])
    _draw_speed(axes[1], steps)
    if loads:
        _draw_load(figure, axes[2], loads)
    axes[-1].set_xlabel("optimizer step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels()
    figure.savefig(figure_file, dpi=110)


def _draw_loss(axis: Any, steps: list[dict], evaluations: list[dict]) -> None:
    axis.plot([e["step"] for e in steps], [e["loss"] for e in steps], label="training")
    if evaluations:
        axis.plot([e["step"] for e in evaluations], [e["eval_loss"] for e in evaluations], "o-", label="held out")
        axis.legend(frameon=False)
    axis.set_ylabel("loss (nats/token)")
    axis.grid(alpha=0.3)


def _draw_speed(axis: Any, steps: list[dict]) -> None:
    timed = [entry for entry in steps if "tokens_per_second" in entry]
    axis.plot([e["step"] for e in timed], [e["tokens_per_second"] for e in timed], color="tab:green")
    axis.set_ylabel("tokens/s")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)


def _draw_load(figure: Any, axis: Any, loads: list[dict]) -> None:
    """Rows are experts, layer below layer; columns are steps; the colour is load over even load, from 1/4 to 4."""
    load_NLE = np.array([entry["load"] for entry in loads])
    num_layers, num_experts = load_NLE.shape[1:]
    log_XN = np.log2(np.clip(load_NLE, 0.25, 4)).reshape(len(loads), -1).T
    first, last = loads[0]["step"], loads[-1]["step"]
    half = (last - first) / max(len(loads) - 1, 1) / 2 or 0.5
    image = axis.imshow(
        log_XN,
        aspect="auto",
        cmap="RdBu_r",
        vmin=-2,
        vmax=2,
        interpolation="nearest",
        extent=(first - half, last + half, num_layers * num_experts, 0),
    )
    for layer in range(1, num_layers):
        axis.axhline(layer * num_experts, color="black", linewidth=0.8)
    axis.set_yticks([(layer + 0.5) * num_experts for layer in range(num_layers)], [str(i) for i in range(num_layers)])
    axis.set_ylabel(f"MoE layer ({num_experts} experts each)")
    bar = figure.colorbar(image, ax=axis, ticks=[-2, -1, 0, 1, 2], pad=0.01)
    bar.ax.set_yticklabels(["≤ ¼", "½", "even", "2x", "≥ 4x"])
    bar.set_label("load of the expert")
