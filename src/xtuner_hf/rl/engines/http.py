"""What the clients of inference servers share: deadlines, retries with back-off, errors that say what happened.

Each rank talks to the server itself. A request is tried again where another try may help (no connection, a hang, 5xx,
429, an answer that is cut off or not whole), and not where it cannot (any other 4xx).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import httpx2 as httpx  # huggingface_hub's own client

from .contract import Completion, EngineError, Sampling, check_completion

_LONGEST_PAUSE = 30.0


class HttpEngine:
    """A server. Its dialects say how a request and an answer look.

    Args:
        url: of a server (not of a router, which may strip token ids).
        deadline: seconds for a whole call, all of its requests and tries.
        try_timeout: seconds for one try of one request; longer than the longest completion takes.
        retries: further tries of a request.
        concurrency: requests in flight.
        backoff: seconds before the first further try; twice as many before each next one, 30 at most.
    """

    name: ClassVar[str]
    scores_given_tokens: ClassVar[bool] = True
    shared: ClassVar[bool] = True
    reads_whole_folder: ClassVar[bool] = False

    def __init__(
        self,
        url: str,
        *,
        deadline: float = 1800.0,
        try_timeout: float = 600.0,
        retries: int = 4,
        concurrency: int = 256,
        backoff: float = 0.5,
        api_key: str | None = None,
    ):
        self.url = url.rstrip("/")
        self.deadline, self.try_timeout, self.retries = deadline, try_timeout, retries
        self.concurrency, self.backoff = concurrency, backoff
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._sent_version: str | None = None
        self.retried = 0
        """Further tries so far, of all calls."""

    # ---- a dialect ----

    def _generate_request(self, prompt: list[int], sampling: Sampling, want_routes: bool) -> tuple[str, dict]:
        """Path and body."""
        raise NotImplementedError

    def _completion(self, answer: Any, prompt: list[int]) -> Completion:
        """Raises KeyError, TypeError, ValueError or IndexError for an answer that is not whole."""
        raise NotImplementedError

    def _score_request(self, token_ids: list[int]) -> tuple[str, dict]:
        raise NotImplementedError

    def _scores(self, answer: Any, token_ids: list[int]) -> list[float]:
        raise NotImplementedError

    # ---- the contract ----

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, *, want_routes: bool = False
    ) -> list[Completion]:
        requests = []
        for index, prompt in enumerate(prompts):
            path, body = self._generate_request(prompt, _with_seed(sampling, index), want_routes)

            def read(answer: Any, prompt: list[int] = prompt) -> Completion:
                completion = self._completion(answer, prompt)
                check_completion(completion, prompt, want_routes=want_routes, version=self._sent_version)
                return completion

            requests.append((path, body, read))
        return self._call(requests)

    def score(self, token_ids: list[int]) -> list[float]:
        def read(answer: Any) -> list[float]:
            scores = self._scores(answer, token_ids)
            if len(scores) != len(token_ids) - 1:
                raise ValueError(f"{len(scores)} log-probabilities for {len(token_ids)} tokens")
            return scores

        return self._call([(*self._score_request(token_ids), read)])[0]

    def version(self) -> str | None:
        return self._sent_version

    # ---- requests ----

    def _post(self, path: str, body: dict | None = None) -> Any:
        """One request; the answer's JSON, None if it has no body."""
        return self._call([(path, body or {}, lambda answer: answer)])[0]

    def _call(self, requests: Sequence[tuple[str, dict, Callable[[Any], Any]]]) -> list[Any]:
        """Send (path, body, reader of the answer) together; the readers' results in order.

        Raises:
            EngineError: one of them failed for good, or the deadline passed.
        """

        async def send_all() -> list[Any]:
            limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
            async with httpx.AsyncClient(
                base_url=self.url, headers=self._headers, limits=limits, timeout=None, trust_env=False
            ) as client:
                slots = asyncio.Semaphore(self.concurrency)
                async with asyncio.timeout(self.deadline):
                    return await asyncio.gather(*(self._send(client, slots, *request) for request in requests))

        try:
            # What is still in flight when one fails is cancelled with the loop.
            return asyncio.run(send_all())
        except TimeoutError as error:
            raise EngineError(
                f"{self.name} at {self.url} did not answer {len(requests)} request(s) to {requests[0][0]} within the "
                f"deadline of {self.deadline} s. Raise `deadline` if they take that long, or look at the server's log."
            ) from error

    async def _send(self, client, slots: asyncio.Semaphore, path: str, body: dict, read: Callable[[Any], Any]) -> Any:
        problem = ""
        async with slots:
            for attempt in range(self.retries + 1):
                if attempt:
                    self.retried += 1
                    pause = min(self.backoff * 2 ** (attempt - 1), _LONGEST_PAUSE)
                    await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                try:
                    async with asyncio.timeout(self.try_timeout):
                        response = await client.post(path, json=body)
                except TimeoutError:
                    problem = f"no answer within {self.try_timeout} s"
                    continue
                except httpx.TransportError as error:
                    problem = f"{type(error).__name__}: {error}"
                    continue
                if response.status_code == 429 or response.status_code >= 500:
                    problem = f"status {response.status_code}: {response.text[:500]}"
                    continue
                if response.status_code >= 400:
                    raise EngineError(
                        f"{self.name} at {self.url} refused {path}: status {response.status_code}: "
                        f"{response.text[:500]}{self._advice(path, response.status_code)}"
                    )
                try:
                    return read(response.json() if response.content else None)
                except (ValueError, KeyError, TypeError, IndexError) as error:
                    problem = f"{error if isinstance(error, ValueError) else repr(error)} in the answer"
        raise EngineError(
            f"{self.name} at {self.url} failed {path} {self.retries + 1} times, the last time with: {problem}."
        )

    def _advice(self, path: str, status: int) -> str:
        """What to change for a request that this server refuses, with a leading space."""
        return ""


def _with_seed(sampling: Sampling, index: int) -> Sampling:
    if sampling.seed is None:
        return sampling
    return Sampling(**{**vars(sampling), "seed": sampling.seed + index})


def common_fields(sampling: Sampling) -> dict[str, Any]:
    """What all servers call by the same names."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "stop_token_ids": list(sampling.stop_token_ids),
    }


def check_scored(scored_ids: list[int], token_ids: list[int]) -> None:
    """Raise a ValueError if log-probabilities are not of these tokens."""
    if scored_ids != token_ids:
        raise ValueError("log-probabilities are of other tokens than were sampled")
