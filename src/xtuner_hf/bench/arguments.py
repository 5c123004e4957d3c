"""The arguments of `xtuner-hf bench`; imports nothing that takes time."""

from __future__ import annotations

import argparse
from pathlib import Path

SHAPES = ("qwen3-30b-a3b", "qwen3-235b-a22b", "gpt-oss-20b", "deepseek-v3")
VARIANTS = ("ours", "ours compiled", "ours fp8", "ours step by step", "stock grouped_mm", "stock sonicmoe")
ROUTINGS = ("real", "balanced")
RECOMPUTES = ("none", "full")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES, help="default: all")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="default: all")
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 16384, 65536], help="of a document")
    parser.add_argument("--tokens", type=int, default=32768, help="of a micro-batch, at least one document")
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=ROUTINGS)
    parser.add_argument("--recomputes", nargs="+", choices=RECOMPUTES, default=RECOMPUTES)
    parser.add_argument("--steps", type=int, default=3, help="that are timed; their median counts")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--tiny", action="store_true", help="tiny stacks, to try the benchmark itself on any machine")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds after which no case is begun")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder to write")
