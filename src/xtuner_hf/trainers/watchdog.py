"""Says on every rank what it waits for when training stands still.

A rank that is missing hangs all others in a collective, and a time-out minutes later names neither. Each rank watches
itself: after `timeout` seconds without progress its log has one line with the rank and the collective that it waits in,
or the place outside of collectives where it is: the rank whose line names no collective is the one to look at.

On a CPU, and in collectives on the host, the line names the call. On an accelerator collectives are queued and the host
waits at the next point that needs a result; the line names that point, and NCCL's own watchdog the collective.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback

logger = logging.getLogger(__name__)

# Directories of which the innermost frame, coming from outside, names a collective.
_COLLECTIVES = (os.path.join("torch", "distributed", ""), os.path.join("torch", "_ops.py"))
_LIBRARIES = ("site-packages", os.path.join("lib", "python"))


class Watchdog:
    """A thread that looks whether somebody called `beat` lately.

    Args:
        timeout: seconds; 0 switches it off.
        rank: of this process.
    """

    def __init__(self, timeout: float, rank: int):
        self._timeout, self._rank = timeout, rank
        self._main = threading.get_ident()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.beat("starting")

    @classmethod
    def start(cls, timeout: float, rank: int) -> Watchdog:
        """One that watches the calling thread."""
        watchdog = cls(timeout, rank)
        if timeout > 0:
            watchdog._thread.start()
        return watchdog

    def stop(self) -> None:
        """Ends the thread, so that none is left when the interpreter goes down."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def beat(self, doing: str) -> None:
        """There is progress; what comes now is `doing`."""
        self._doing, self._last, self._reported = doing, time.monotonic(), 0.0

    def _watch(self) -> None:
        while not self._stopped.wait(min(self._timeout / 4, 5.0)):
            still = time.monotonic() - self._last
            if still > max(self._timeout, 2 * self._reported):  # once, then after twice the time
                self._reported = still
                logger.error(self.report(still))

    def report(self, still: float) -> str:
        """One line: this rank, and where the watched thread is."""
        frames = traceback.extract_stack(sys._current_frames()[self._main])
        place = next((f for f in reversed(frames) if not _is_library(f)), frames[-1])
        where = f"{place.filename}:{place.lineno} in {place.name}"
        collective = _collective(frames)
        waits = f"waits in {collective}, called from {where}" if collective else f"is in no collective but at {where}"
        return f"Rank {self._rank} ({self._doing}) has not moved for {still:.0f} s: it {waits}."


def _is_library(frame: traceback.FrameSummary) -> bool:
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return not frame.filename.startswith(ours) and any(part in frame.filename for part in _LIBRARIES)


def _collective(frames: traceback.StackSummary) -> str | None:
    """The torch.distributed function in which a stack ends; decorators around it do not count."""
    for frame in reversed(frames):
        if not any(part in frame.filename for part in _COLLECTIVES):
            return None
        if frame.name not in ("wrapper", "inner", "__call__"):
            return frame.name
    return None
