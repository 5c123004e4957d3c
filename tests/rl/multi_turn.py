"""Conversations with a stateful environment, one character a token, and an engine that plays."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from datasets import Dataset

from tests.rl.toy import CHARACTERS, char_tokenizer
from tests.tiny import build, moe_config
from tests.trainers.preference_scenario import run_quickly
from tests.trainers.rl_scenario import make_trainer
from xtuner_hf.moe.replay import NATIVE
from xtuner_hf.rl.engines.contract import EngineError, Sampling
from xtuner_hf.rl.engines.local import LocalEngine
from xtuner_hf.rl.rollouts import EngineRollouts

ANSWER = "done<eos>"
# Short, since a character is a token. Calls are written and read as Qwen3's are.
TEMPLATE = """
{%- for message in messages %}<{{ message.role }}>{{ message.content }}
{%- for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}
{%- endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


class Counter:
    """An environment with a state: amounts are added up to a target."""

    def reset(self, target: int, **_: Any) -> None:
        self._target, self._total = target, 0

    def add(self, amount: int) -> int:
        """Adds to the total.

        Args:
            amount: what to add.

        Returns:
            The total.
        """
        self._total += amount
        return self._total

    def get_reward(self) -> float:
        return float(self._total == self._target)


def call(amount: int) -> str:
    return f'<tool_call>\n{{"name": "add", "arguments": {{"amount": {amount}}}}}\n</tool_call><eos>'


def chat_tokenizer():
    from trl.chat_template_utils import qwen3_template

    tokenizer = char_tokenizer(CHARACTERS + "\n")
    tokenizer.chat_template = TEMPLATE
    tokenizer.response_template = qwen3_template | {"start_anchor": "<assistant>"}
    return tokenizer


class PlayingEngine(LocalEngine):
    """Says what is played; log-probabilities and routes are the model's.

    Args:
        plays: amounts to add, one a turn, for the k-th sample of a batch; then it answers.
        caches: leave out the routes of the prompts of later turns, as an engine with a prefix cache does.
        fails_in_turn: raise an error in that turn.
    """

    def __init__(self, model: Any, plays: Sequence[Sequence[int]], caches: bool = False, fails_in_turn: int = -1):
        super().__init__(model)
        self.plays, self.caches, self.fails_in_turn = plays, caches, fails_in_turn
        self.tokenizer = chat_tokenizer()
        self.turn = 0
        self.said: list[list[int]] = []

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, *, want_routes: bool = False):
        if not any("<tool>" in self.tokenizer.decode(prompt) for prompt in prompts):
            self.turn, self.said = 0, [[] for _ in prompts]
        if self.turn == self.fails_in_turn:
            raise EngineError("the server is gone")
        playing = [index for index, amounts in enumerate(self.plays) if len(amounts) >= self.turn]
        completions = []
        for index, prompt in zip(playing, prompts, strict=True):
            amounts = self.plays[index]
            text = call(amounts[self.turn]) if self.turn < len(amounts) else ANSWER
            completion = self._completion(prompt, self.tokenizer(text)["input_ids"], sampling, want_routes)
            if self.caches and self.turn and completion.routed_experts is not None:
                completion.routed_experts[: len(prompt) - 40] = NATIVE  # what the turn before has fed, and not all
            self.said[index] += completion.token_ids
            completions.append(completion)
        self.turn += 1
        return completions


def agent_trainer(folder: str, engine: LocalEngine | None, batch: int, **settings: Any):
    prompts = [{"prompt": [{"role": "user", "content": f"Add up to {t}."}], "target": t} for t in (3, 5)]
    rollouts = None if engine is None else EngineRollouts(engine, Path(folder) / "weights", probe_tokens=64)
    defaults = {
        "model": build_model(0),
        "train_dataset": Dataset.from_list(prompts),
        "rollout_func": rollouts,
        "processing_class": chat_tokenizer(),
        "environment_factory": Counter,
        "max_completion_length": 512,
        "batch": batch,
        "experts_kernel": "reference",
        "reward": None,
    }
    from xtuner_hf import MoEGRPOConfig, MoEGRPOTrainer

    return make_trainer(MoEGRPOTrainer, MoEGRPOConfig, folder, **(defaults | settings))


def build_model(seed: int):
    from xtuner_hf import Qwen3MoeForCausalLM

    return build(Qwen3MoeForCausalLM, moe_config(max_position_embeddings=1024), seed=seed)


def turns_on_ranks(folder: str) -> dict:
    """Rank 0 takes more turns than rank 1: with an engine each, with one that fails, and with the model itself."""
    import os

    rank = int(os.environ["RANK"])
    plays = [[1, 2], [3], [], [1, 1, 1]] if rank == 0 else [[], [5], [], []]
    result: dict[str, Any] = {}

    def trainer_of(name: str, engine: Any, **settings: Any):
        return agent_trainer(str(Path(folder) / name), engine, batch=4, ep_size=2, steps=1, **settings)

    trainer, recorder, _ = trainer_of("engine", PlayingEngine(build_model(0), plays), router_replay="R3")
    run_quickly(trainer)
    result["logs"] = recorder.logs

    started = time.monotonic()
    broken = PlayingEngine(build_model(0), plays, fails_in_turn=2 if rank == 0 else -1)
    trainer, _, _ = trainer_of("broken", broken)
    try:
        run_quickly(trainer)
    except Exception as error:
        result["failure"] = str(error)
    result["seconds"] = time.monotonic() - started

    # A model that knows no tools: what it writes is read as a call, on rank 0 in its first two turns.
    calls = {"turn": 0}

    def parse(tokenizer: Any, ids: list[int], **_: Any) -> dict:
        calls["turn"] += 1
        message: dict[str, Any] = {"role": "assistant", "content": ""}
        if rank == 0 and calls["turn"] <= 8:
            message["tool_calls"] = [{"type": "function", "function": {"name": "add", "arguments": {"amount": 1}}}]
        return message

    with mock.patch("trl.trainer.grpo_trainer.parse_response", parse):
        trainer, recorder, _ = trainer_of(
            "itself", None, max_completion_length=80, generation_kwargs={"max_new_tokens": 4}
        )
        run_quickly(trainer)
    return result | {"itself": recorder.logs, "parsed": calls["turn"]}
