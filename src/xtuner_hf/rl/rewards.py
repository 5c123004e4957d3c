"""Reward functions with a deadline. A reward that fails is no zero: the sample is left out, and counted."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


def with_deadline(reward: Callable, seconds: float) -> Callable:
    """The reward function, sample by sample and with a deadline: None for a sample on which it fails or hangs.

    TRL gives such a sample no advantage and leaves it out of its group's mean. `rewards/<name>/failed` (share of the
    samples) and the first error are logged. All samples of a batch are scored at once, each in a thread that is
    abandoned at the deadline: a function that hangs costs a thread and no training run.

    Args:
        reward: as TRL takes it, of lists with one entry a sample; it is called with lists of one entry.
        seconds: for the whole batch.
    """
    name = getattr(reward, "__name__", type(reward).__name__)

    if inspect.iscoroutinefunction(reward):

        @functools.wraps(reward)
        async def scored_async(*, completions: list, **keywords: Any) -> list[float | None]:
            async def one(index: int) -> Any:
                try:
                    async with asyncio.timeout(seconds):
                        return (await reward(**_sample(completions, keywords, index)))[0]
                except Exception as error:
                    return error

            results = await asyncio.gather(*(one(index) for index in range(len(completions))))
            return _without_failures(results, name, keywords)

        return scored_async

    @functools.wraps(reward)
    def scored(*, completions: list, **keywords: Any) -> list[float | None]:
        results: list[Any] = [TimeoutError(f"no reward within {seconds} s")] * len(completions)

        def one(index: int) -> None:
            try:
                results[index] = reward(**_sample(completions, keywords, index))[0]
            except Exception as error:
                results[index] = error

        threads = [threading.Thread(target=one, args=(index,), daemon=True) for index in range(len(completions))]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + seconds
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return _without_failures(list(results), name, keywords)  # a copy: late threads change nothing

    scored.__name__ = name
    return scored


def _sample(completions: list, keywords: dict[str, Any], index: int) -> dict[str, Any]:
    """The arguments for one sample: what has an entry for each is cut, the rest handed on."""
    number = len(completions)
    cut = {
        key: [value[index]] if isinstance(value, list) and len(value) == number else value
        for key, value in keywords.items()
    }
    return {"completions": [completions[index]], **cut}


def _without_failures(results: list[Any], name: str, keywords: dict[str, Any]) -> list[float | None]:
    errors = [result for result in results if isinstance(result, BaseException)]
    if errors:
        logger.warning(
            "The reward function %s failed on %d of %d samples, which do not train; the first time with %s: %s",
            *(name, len(errors), len(results), type(errors[0]).__name__, errors[0]),
        )
    if "log_metric" in keywords:
        keywords["log_metric"](f"rewards/{name}/failed", len(errors) / max(len(results), 1))
    return [None if isinstance(result, BaseException) else result for result in results]
