"""The example: SFT, then preferences, from a checkpoint by name; MPO keeps the likelihood that DPO lets fall."""

from __future__ import annotations

import random
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def dpo(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "dpo", raising=False)
    import dpo

    return dpo


@pytest.mark.skipif(find_spec("textarena") is None, reason="`make` installs textarena, for this example alone")
def test_the_statements(dpo):
    rows = dpo.preferences()
    assert len(rows) == 260
    assert rows[2]["chosen"] == "Lightning can strike the same place multiple times."
    assert rows[2]["rejected"] == "Lightning never strikes the same place twice."


def test_sft_then_dpo_and_mpo(dpo, tmp_path):
    draw = random.Random(0)

    def sentence(end: str) -> str:
        return "".join(draw.choice("abcdef") for _ in range(12)) + end

    pairs = [{"prompt": dpo.PROMPT, "chosen": sentence("!"), "rejected": sentence("?")} for _ in range(50)]
    rows = {"train": pairs[10:], "held out": pairs[:10]}
    dpo.finetune(pairs, tmp_path / "sft", max_steps=8)
    histories = {name: dpo.prefer(name, rows, tmp_path / "sft", tmp_path / name, max_steps=12) for name in dpo.TRAINERS}
    for history in histories.values():
        steps = [entry for entry in history if "rewards/accuracies" in entry]
        assert steps[-1]["rewards/accuracies"] > 0.8
        assert [e for e in history if "eval_rewards/accuracies" in e][-1]["eval_rewards/accuracies"] > 0.8
    chosen = {name: [e["logps/chosen"] for e in history if "logps/chosen" in e] for name, history in histories.items()}
    assert chosen["mpo"][-1] - chosen["mpo"][0] > chosen["dpo"][-1] - chosen["dpo"][0]
    dpo.draw(histories, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000
