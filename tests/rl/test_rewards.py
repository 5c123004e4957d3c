"""A reward that fails or hangs is no zero and stops no run."""

from __future__ import annotations

import asyncio
import time

import pytest
import torch

from tests.trainers.preference_scenario import run_quickly
from tests.trainers.rl_scenario import make_trainer, rollouts
from xtuner_hf import MoEGRPOConfig, MoEGRPOTrainer
from xtuner_hf.rl.rewards import with_deadline

COMPLETIONS = ["good", "raises", "hangs", "none"]


def fragile(completions: list[str], answer: list[int], scale: float, **_) -> list[float | None]:
    (text,), (right,) = completions, answer
    if text == "raises":
        raise KeyError("no box")
    if text == "hangs":
        time.sleep(3)
    return [None if text == "none" else scale * right]


async def fragile_async(completions: list[str], answer: list[int], scale: float, **_) -> list[float | None]:
    if completions == ["hangs"]:
        await asyncio.sleep(3)
    return fragile([text for text in completions if text != "hangs"] or ["good"], answer, scale)


def call(function, logged: dict) -> list[float | None]:
    arguments = {"completions": COMPLETIONS, "answer": [1, 2, 3, 4], "scale": 0.5, "log_metric": logged.__setitem__}
    result = function(**arguments)
    return asyncio.run(result) if asyncio.iscoroutine(result) else result


@pytest.mark.parametrize("reward", [fragile, fragile_async])
def test_failures_are_none_and_counted(reward, caplog):
    started, logged = time.monotonic(), {}
    guarded = with_deadline(reward, 0.3)
    assert call(guarded, logged) == [0.5, None, None, None]
    assert time.monotonic() - started < 2
    assert logged == {f"rewards/{reward.__name__}/failed": 0.5}  # an answer of None is no failure
    assert (
        f"{reward.__name__} failed on 2 of 4 samples, which do not train; the first time with KeyError" in caplog.text
    )
    assert guarded.__name__ == reward.__name__


def test_in_training_a_sample_without_reward_has_no_advantage_and_does_not_shift_its_group(tmp_path):
    def length(completions, **_):
        if len(completions[0]) % 3 == 0:
            raise ValueError("cannot be parsed")
        return [float(len(completions[0]))]

    settings = {"engine": {}, "reward_timeout": 5.0, "experts_kernel": "reference"}
    trainer, recorder, _ = make_trainer(MoEGRPOTrainer, MoEGRPOConfig, str(tmp_path), reward=length, **settings)
    batch = rollouts(trainer)
    texts = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    lengths = torch.tensor([float(len(text)) if len(text) % 3 else torch.nan for text in texts]).view(2, 4)
    assert lengths.isnan().any()
    assert (~lengths.isnan()).sum(1).min() > 1
    centred = lengths - lengths.nanmean(1, keepdim=True)
    expected = centred / ((centred**2).nansum(1, keepdim=True) / ((~lengths.isnan()).sum(1, keepdim=True) - 1)).sqrt()
    assert torch.allclose(batch["advantages"].view(2, 4).float(), expected.nan_to_num(0.0), atol=1e-3)
    run_quickly(trainer)
    assert recorder.logs[0]["rewards/length/failed"] > 0


def test_settings(tmp_path):
    with pytest.raises(ValueError, match="reward_timeout is 0; it is a number of seconds above 0, or None"):
        MoEGRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, reward_timeout=0)
