"""Many turns with tools: token ids in and out, tool tokens masked, routes of every turn, ranks with unequal turns."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.rl.multi_turn import ANSWER, PlayingEngine, agent_trainer, build_model, call
from tests.trainers.preference_scenario import run_quickly
from xtuner_hf.moe.replay import RouteRecorder, RouterMap

# Amounts that the samples add, one a turn; the first four are to reach 3, the others 5.
PLAYS = [[1, 2], [3], [], [1, 1, 2], [5], [2, 3], [4], []]
REWARDS = [1, 1, 0, 0, 1, 1, 0, 0]


def sample(trainer) -> dict:
    trainer.model.train()
    rows = [dict(row) for row in trainer.train_dataset for _ in range(4)]
    return trainer._generate_and_score_completions(rows)


@pytest.mark.parametrize("caches", [False, True], ids=["routes whole", "prefix cache"])
def test_turns_of_an_engine(caches, tmp_path):
    engine = PlayingEngine(build_model(1), PLAYS, caches=caches)  # other weights, until they are synced
    trainer, _, _ = agent_trainer(str(tmp_path), engine, batch=8, router_replay="R3")
    batch = sample(trainer)
    assert engine.turn == 4
    tokenizer, own = trainer.processing_class, batch["completion_mask"].bool() & batch["tool_mask"].bool()
    for row, amounts in enumerate(PLAYS):
        # What trains is what the engine said, token by token; what lies between is the environment's.
        assert batch["completion_ids"][row][own[row]].tolist() == engine.said[row]
        assert tokenizer.decode(engine.said[row]) == "".join(map(call, amounts)) + ANSWER
        between = tokenizer.decode(batch["completion_ids"][row][batch["completion_mask"][row].bool() & ~own[row]])
        totals = torch.tensor(amounts).cumsum(0).tolist()
        assert between == "".join(f"<tool>{total}<assistant>" for total in totals)
    rewards = torch.tensor(REWARDS, dtype=torch.float32).view(2, 4)
    centred = rewards - rewards.mean(1, keepdim=True)
    expected = centred / (rewards.std(1, keepdim=True) + 1e-4)
    # The engine and the trainer agree on every token of every turn.
    metrics = trainer._metrics["train"]
    assert metrics["mismatch/logp_difference_max"][0] < 1e-4
    torch.testing.assert_close(batch["advantages"].view(2, 4), expected)

    # Routes of all turns are those of one forward over the whole conversation.
    routers, ids = RouterMap(trainer.model), torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1).bool()
    for row in range(len(PLAYS)):
        recorder = RouteRecorder(routers)
        with torch.no_grad():
            trainer.model(input_ids=ids[row][mask[row]][None], routes=recorder, use_cache=False)
        assert torch.equal(batch["routed_experts"][row][mask[row]][:-1], recorder.ids_BSLK(1)[0, :-1])


def test_a_run_learns_from_tokens_of_the_model_alone(tmp_path):
    trainer, recorder, _ = agent_trainer(
        str(tmp_path), PlayingEngine(build_model(1), PLAYS), batch=8, router_replay="R3", steps=1
    )
    run_quickly(trainer)
    for log in recorder.logs:
        assert log["tools/call_frequency"] == sum(map(len, PLAYS)) / 8
        assert log["tools/failure_frequency"] == 0
        assert log["completions/mean_length"] == sum(len("".join(map(call, p))) - 4 * len(p) + 5 for p in PLAYS) / 8
        assert log["rewards/Counter/mean"] == sum(REWARDS) / 8
        assert log["mismatch/logp_difference_max"] < 1e-4
        assert log["weight_sync/probe_difference"] < 1e-4
    assert recorder.logs[0]["grad_norm"] > 0


def test_ranks_take_different_numbers_of_turns(tmp_path):
    """None waits for another; what fails on one in its third turn is raised on both."""
    first, second = run_on_ranks("tests.rl.multi_turn:turns_on_ranks", 2, folder=str(tmp_path))
    for result in (first, second):
        assert result["logs"][0]["mismatch/logp_difference_max"] < 1e-4
        assert "the server is gone" in result["failure"]
        assert result["seconds"] < 20
        assert result["itself"][0]["tools/call_frequency"] > 0
    assert (first["parsed"], second["parsed"]) == (12, 4)
    assert first["itself"][0]["loss"] == second["itself"][0]["loss"]
