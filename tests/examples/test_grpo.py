"""The example learns its task from reward alone, and DAPO does so in fewer optimizer steps."""

from __future__ import annotations

import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_grpo_and_dapo_learn_a_verifiable_task(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "grpo", raising=False)
    import grpo

    curves = {name: grpo.train(name, tmp_path / name, max_steps=300) for name in grpo.TRAINERS}
    for rewards in curves.values():
        assert rewards[0] < 0.2
        assert grpo.first_step_above(rewards) == len(rewards) < 300  # where training stopped
    assert len(curves["dapo"]) < len(curves["grpo"])
    grpo.draw(curves, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000
