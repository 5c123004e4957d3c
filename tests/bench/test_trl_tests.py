"""The plugin that runs TRL's tests with our classes, on a stand-in of TRL's tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
GRPO = """
import os
import pytest
from trl import GRPOConfig, GRPOTrainer


class TestGRPOTrainer:
    def test_classes(self):
        assert (GRPOTrainer.__name__, GRPOConfig.__name__) == ("MoEGRPOTrainer", "MoEGRPOConfig")
        assert os.path.basename(os.getcwd()) == "bytes"

    def test_ids(self):
        eos_token_id = 151645
        assert os.path.basename(os.getcwd()) == "words"

    @pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
    def test_training_loss_types(self, loss_type):
        assert loss_type == "dapo"

    @pytest.mark.parametrize("model_id", ["org/tiny-Ours", "org/tiny-Other"])
    def test_families(self, model_id):
        assert os.path.isdir(model_id)

    @pytest.mark.skip(reason="needs a server")
    def test_server(self):
        pass

    def test_fails(self):
        raise ValueError("so it does")
"""


def test_outcomes_and_what_is_left_out(tmp_path):
    checkout, stand_ins, outcomes = tmp_path / "trl", tmp_path / "stand_ins", tmp_path / "outcomes.json"
    (checkout / "tests").mkdir(parents=True)
    (checkout / "tests" / "__init__.py").touch()
    test = checkout / "tests" / "test_grpo_trainer.py"
    test.write_text(GRPO)
    for name in ("bytes", "words"):
        (stand_ins / name / "org" / "tiny-Ours").mkdir(parents=True)
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.trl_tests.plugin", "-p", "no:cacheprovider", str(test)]
    command += ["--rootdir", str(checkout), "--stand-ins", str(stand_ins), "--outcomes", str(outcomes)]
    paths = os.pathsep.join([str(REPO), str(REPO / "src")])
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    ended = {name.rpartition("::")[2]: outcome for name, outcome in json.loads(outcomes.read_text()).items()}
    reason = ended["test_training_loss_types[cispo]"].pop()
    assert reason.startswith("refused with an error: TRL's default epsilon_high of 0.2")
    assert ended == {
        "test_classes": ["passed", ""],
        "test_ids": ["passed", ""],
        "test_training_loss_types[dapo]": ["passed", ""],
        "test_training_loss_types[cispo]": ["left out"],
        "test_families[org/tiny-Ours]": ["passed", ""],
        "test_families[org/tiny-Other]": ["left out", "of a family that is not of this package"],
        "test_server": ["skipped by TRL", "needs a server"],
        "test_fails": ["failed", "ValueError: so it does"],
    }
