"""TRL's own tests of its GRPO and DPO trainers, with our subclasses in their place.

    git clone --branch v1.16.0 --depth 1 https://github.com/huggingface/trl
    python -m benchmarks.trl_tests --trl trl                             # data sets from the Hub
    python -m benchmarks.trl_tests --trl trl --stand-in-data             # without network
    python -m benchmarks.trl_tests --trl trl --classes ours trl          # and TRL's own classes, to compare with

The checkout must be of the version that is installed, and its code is run: take it from TRL itself. Needs the extra
`demo` (Qwen's tokenizer). Ends with 1 if a test fails with our classes and, as far as they were run, not with TRL's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch
import transformers
import trl

from .stand_ins import build

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("tests/test_dpo_trainer.py", "tests/test_grpo_trainer.py")
RESULTS = ROOT / "benchmarks" / "results" / "trl_tests.json"


def check_version(checkout: Path) -> None:
    for test in TESTS:
        if not (checkout / test).is_file():
            raise SystemExit(f"{checkout} has no {test}: clone TRL v{trl.__version__} and pass its folder.")
    version = checkout / "VERSION"
    if version.is_file() and version.read_text().strip() != trl.__version__:
        raise SystemExit(
            f"{checkout} is TRL {version.read_text().strip()} and {trl.__version__} is installed: check out "
            f"v{trl.__version__}."
        )


def run(checkout: Path, folder: Path, classes: str, options: list[str]) -> tuple[dict[str, tuple[str, str]], float]:
    """How each test ended, and the seconds that all took."""
    outcomes = folder / f"{classes}.json"
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.trl_tests.plugin", "-p", "no:cacheprovider"]
    named = {
        "--rootdir": checkout,
        "--stand-ins": folder,
        "--classes": classes,
        "--outcomes": outcomes,
        "--tb": "short",
    }
    command += [str(part) for item in named.items() for part in item]
    command += [*options, *(str(checkout / test) for test in TESTS)]
    paths = [str(ROOT), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    started = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    if subprocess.run(command, cwd=folder, env=environment, check=False).returncode not in (0, 1):
        raise SystemExit(f"pytest ended before the tests did; its command was {' '.join(command)}")
    return json.loads(outcomes.read_text()), time.perf_counter() - started


def summary(ended: dict[str, tuple[str, str]]) -> dict:
    """Counts of the outcomes, and but for passed tests their names by reason."""
    by_reason: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, (outcome, reason) in ended.items():
        if outcome != "passed":
            by_reason[outcome][reason].append(name)
    return dict(Counter(outcome for outcome, _ in ended.values())) | {"not passed": by_reason}


def only_ours_fails(ended: dict[str, dict]) -> list[str]:
    """Tests that fail with our classes and do not with TRL's, as far as those were run."""
    reference = ended.get("trl", {})
    failed = [name for name, (outcome, _) in ended.get("ours", {}).items() if outcome == "failed"]
    return [name for name in failed if reference.get(name, ("",))[0] != "failed"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl", type=Path, required=True, help="a checkout of TRL, of the installed version")
    parser.add_argument("--classes", nargs="+", choices=["ours", "trl"], default=["ours"])
    parser.add_argument("--stand-in-data", action="store_true", help="make data sets here instead of loading TRL's")
    parser.add_argument("--tests-from", help="which version the tests are of, where the checkout is not whole")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options, for_pytest = parser.parse_known_args()
    checkout = options.trl.resolve()
    check_version(checkout)
    figures: dict = {
        "tests of": options.tests_from or f"TRL {trl.__version__}",
        "data sets": "stand-ins" if options.stand_in_data else "of the Hub",
        "ran on": f"{platform.machine()} CPU" if not torch.cuda.is_available() else torch.cuda.get_device_name(),
        "versions": {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__},
    }
    ended = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder, with_datasets=options.stand_in_data)
        for classes in options.classes:
            ended[classes], seconds = run(checkout, folder, classes, for_pytest)
            figures[classes] = summary(ended[classes]) | {"seconds": round(seconds)}
    for classes in options.classes:
        counts = {key: value for key, value in figures[classes].items() if key != "not passed"}
        print(f"{classes}: {json.dumps(counts)}")
        for outcome, reasons in figures[classes]["not passed"].items():
            for reason, names in reasons.items():
                print(f"  {outcome} ({reason}):", *names, sep="\n    ")
    options.output.write_text(json.dumps(figures, indent=1) + "\n")
    if failed := only_ours_fails(ended):
        known = "alone" if "trl" in ended else "(with TRL's as well? --classes ours trl)"
        raise SystemExit(f"{len(failed)} tests fail with our classes {known}.")


if __name__ == "__main__":
    main()
