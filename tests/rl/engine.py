"""An engine that runs in the test's own process: fixed answers, log-probabilities and routes of a model of its own."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from tests.rl.toy import CHARACTERS, char_tokenizer


class StubEngine:
    """A `rollout_func` that answers each prompt's k-th sample with the same random characters every time.

    Args:
        model: unsharded; computes log-probabilities and routes. None returns neither.
        noise: spread of what is added to its routers' weights, as if it ran on other kernels.
        with_routes: whether it returns them.
        tool_tokens: whether the middle of each answer comes from a tool.
    """

    def __init__(self, model: Any = None, *, noise: float = 0.0, with_routes: bool = False, tool_tokens: bool = False):
        self.model, self.with_routes, self.tool_tokens = model, with_routes, tool_tokens
        self.tokenizer = char_tokenizer()
        self.calls: list[list[str]] = []
        if noise:
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for name, tensor in model.named_parameters():
                    if "mlp.gate" in name:
                        tensor += noise * torch.randn(tensor.shape, generator=generator).to(tensor)

    def __call__(self, prompts: list[str], trainer: Any) -> dict:
        self.calls.append(prompts)
        seen: Counter[str] = Counter()
        output: dict[str, list] = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
        for prompt in prompts:
            ids = self.tokenizer(prompt)["input_ids"]
            answer = self.answer(prompt, seen[prompt])
            seen[prompt] += 1
            logps, routes = self.score(ids, answer)
            output["prompt_ids"].append(ids)
            output["completion_ids"].append(answer)
            output["logprobs"].append(logps)
            if self.with_routes:
                output.setdefault("routed_experts", []).append(routes)
            if self.tool_tokens:
                middle = len(answer) // 3
                mask = [1] * middle + [0] * middle + [1] * (len(answer) - 2 * middle)
                output.setdefault("env_mask", []).append(mask)
        if self.model is None:
            output["logprobs"] = None
        return output

    def answer(self, prompt: str, sample: int) -> list[int]:
        """1 to 12 characters; three of four end."""
        seed = sum(31**index * ord(character) for index, character in enumerate(prompt)) * 1009 + sample
        generator = torch.Generator().manual_seed(seed % 2**31)
        length = int(torch.randint(1, 13, (), generator=generator))
        ids = (2 + torch.randint(len(CHARACTERS), (length,), generator=generator)).tolist()
        return ids if sample % 4 == 3 else [*ids[:11], 1]

    @torch.no_grad()
    def score(self, prompt: list[int], answer: list[int]) -> tuple[list[float], Any]:
        if self.model is None:
            return [0.0] * len(answer), None
        from xtuner_hf.moe.replay import RouteRecorder, RouterMap

        recorder = RouteRecorder(RouterMap(self.model))
        ids = torch.tensor([prompt + answer])
        logits = self.model(input_ids=ids, use_cache=False, routes=recorder).logits[0, :-1]
        logps = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        return logps[-len(answer) :].tolist(), recorder.ids_BSLK(1)[0, :-1]


def share_of_digits(completions: list[str], **_) -> list[float]:
    """A reward that differs between nearly all answers."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) + 0.01 * len(text) for text in completions]
