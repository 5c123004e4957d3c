"""A pytest plugin that runs TRL's tests with our classes, leaves some out, and notes how each ended."""

from __future__ import annotations

import inspect
import json
import os
import re
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from unittest import mock

import datasets
import pytest
import torch

import xtuner_hf

# What a script changes to train with this package: the imports of these names.
OURS = {
    "GRPOTrainer": xtuner_hf.MoEGRPOTrainer,
    "GRPOConfig": xtuner_hf.MoEGRPOConfig,
    "DPOTrainer": xtuner_hf.MoEDPOTrainer,
    "DPOConfig": xtuner_hf.MoEDPOConfig,
    "AutoModelForCausalLM": xtuner_hf.AutoModelForCausalLM,
    "AutoModelForImageTextToText": xtuner_hf.AutoModelForImageTextToText,
}
# What a test says that needs Qwen's real tokenizer: its ids, a text's number of tokens, how rare the end is.
NEEDS_WORDS = re.compile(r"\b1516\d\d\b|max_length|EOS")
LEFT_OUT = Path(__file__).with_name("left_out.toml")
MARK = "left out: "


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--classes", choices=["ours", "trl"], default="ours", help="whose trainers the tests use")
    parser.addoption("--outcomes", type=Path, help="where to write how each test ended, as JSON")
    parser.addoption("--stand-ins", type=Path, help="the folder that stand_ins.build made")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Outcomes(config.getoption("--outcomes")))
    if not torch.accelerator.is_available():
        # TRL's defaults ask for bf16, which transformers allows on a CPU with use_cpu alone, and the tests have none.
        mock.patch("transformers.training_args.is_torch_bf16_gpu_available", return_value=True).start()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    stand_ins = config.getoption("--stand-ins")
    ours = config.getoption("--classes") == "ours"
    if ours:
        for module in {item.module for item in items}:
            for name, replacement in OURS.items():
                if hasattr(module, name):
                    setattr(module, name, replacement)
    for item in items:
        reason = _unknown_family(item, stand_ins) or (ours and _listed_reason(item.nodeid))
        if reason:
            item.add_marker(pytest.mark.skip(reason=MARK + reason), append=False)


def pytest_runtest_setup(item: pytest.Item) -> None:
    needs_words = NEEDS_WORDS.search(inspect.getsource(item.function))
    folder = item.config.getoption("--stand-ins") / ("words" if needs_words else "bytes")
    os.chdir(folder)
    # The cache goes by relative paths, which are the same in both folders and in the next run.
    datasets.config.HF_DATASETS_CACHE = folder / "cache"


def _unknown_family(item: pytest.Item, stand_ins: Path) -> str:
    """A reason to leave out a test that is parametrized by a model of which there is no stand-in."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    names = [value for value in values if isinstance(value, str) and "/tiny-" in value]
    is_known = all((stand_ins / "bytes" / name).is_dir() for name in names)
    return "" if is_known else "of a family that is not of this package"


def _listed_reason(nodeid: str) -> str:
    """The reason that left_out.toml has for a test, "" if it has none."""
    name = _short(nodeid)
    for group in tomllib.loads(LEFT_OUT.read_text(encoding="utf-8"))["left_out"]:
        if any(_fits(name, pattern) for pattern in group["tests"]):
            return group["reason"]
    return ""


def _fits(name: str, pattern: str) -> bool:
    """Whether a test is meant: `*` stands for anything before the [parameters], and none for all of those."""
    (test, _, parameters), (tests, _, wanted) = name.partition("["), pattern.partition("[")
    return fnmatchcase(test, tests) and wanted in ("", parameters)


def _short(nodeid: str) -> str:
    path, _, rest = nodeid.partition("::")
    return f"{Path(path).name}::{rest}"


class Outcomes:
    """How each test ended: {name: [outcome, reason]}."""

    def __init__(self, path: Path | None):
        self.path = path
        self.ended: dict[str, tuple[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = _short(report.nodeid)
        if report.skipped:
            reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""
            left_out = reason.startswith(MARK)
            self.ended[name] = ("left out" if left_out else "skipped by TRL", reason.removeprefix(MARK))
        elif report.failed:
            self.ended[name] = ("failed", str(report.longrepr.reprcrash.message).splitlines()[0])
        elif report.when == "call":
            self.ended[name] = ("passed", "")

    def pytest_sessionfinish(self) -> None:
        if self.path is not None:
            self.path.write_text(json.dumps(self.ended, indent=1) + "\n")
