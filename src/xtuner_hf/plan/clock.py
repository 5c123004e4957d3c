"""Simulated streams and events: what would run when, on a device that is not there.

FSDP2 and our copies (device.py) ask the module of their device for streams and events. On a CPU these are stubs; a dry
run puts the classes here in their place (torch_internals.py), so the streams, events and prefetches of the real code
decide what overlaps. Nothing is assumed about overlap.

    host       queues one operation after the other, and waits where the real host would
    streams    each runs what is queued on it in order, not before the host queued it
    links      one transfer at a time (links.py)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Span(NamedTuple):
    """Something that took time, in seconds since the step began."""

    name: str
    track: str
    start: float
    end: float


class Stream:
    """A queue of work, with torch's interface of a stream."""

    def __init__(self, clock: Clock, name: str):
        self.clock, self.name = clock, name
        self.title = name  # what it turns out to be for
        self.free_at = 0.0
        self.busy = 0.0

    def wait_event(self, event: Event | None) -> None:
        if event is not None:
            self.free_at = max(self.free_at, event.time)

    def wait_stream(self, other: Stream) -> None:
        self.free_at = max(self.free_at, other.free_at)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self.clock)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.clock.host_waits_until(self.free_at)


class Event:
    """A moment of a stream, with torch's interface of an event."""

    def __init__(self, clock: Clock, *_: Any, **__: Any):
        self.clock = clock
        self.time = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.time = (stream or self.clock.current).free_at

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.clock.current).wait_event(self)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.clock.host_waits_until(self.time)


@dataclass
class Clock:
    """All streams of a device and its host.

    Args:
        launch_seconds: the host needs to queue an operation.
    """

    launch_seconds: float = 6e-6
    spans: list[Span] = field(default_factory=list)
    host_time: float = 0.0
    host_waits: int = 0

    def __post_init__(self):
        self.compute = self.current = Stream(self, "compute")
        self._links: dict[str, Stream] = {}
        self._streams = [self.compute]
        self.begin = 0.0

    # ---- torch's interface of a device module ----

    def new_stream(self, *_: Any, **__: Any) -> Stream:
        stream = Stream(self, f"stream {len(self._streams)}")
        self._streams.append(stream)
        return stream

    def new_event(self, *_: Any, **__: Any) -> Event:
        return Event(self)

    def current_stream(self, *_: Any) -> Stream:
        return self.current

    @contextlib.contextmanager
    def on_stream(self, stream: Stream | None) -> Iterator[None]:
        before, self.current = self.current, stream or self.current
        try:
            yield
        finally:
            self.current = before

    # ---- work ----

    def link(self, name: str) -> Stream:
        """The stream of a link's transfers."""
        if name not in self._links:
            self._links[name] = Stream(self, name)
        return self._links[name]

    def run(self, seconds: float, name: str, stream: Stream | None = None) -> float:
        """Queue work; returns when it ends."""
        stream = stream or self.current
        start = max(stream.free_at, self.host_time)
        stream.free_at = start + seconds
        stream.busy += seconds
        self.host_time += self.launch_seconds
        self.spans.append(Span(name, stream.name, start - self.begin, start + seconds - self.begin))
        return stream.free_at

    def transfer(self, seconds: float, name: str, link: str) -> float:
        """Queue a transfer: after what stands on the current stream, which then waits for it, and after the link's
        other transfers."""
        stream = self.link(link)
        stream.free_at = max(stream.free_at, self.current.free_at)
        self.current.free_at = self.run(seconds, name, stream)
        return stream.free_at

    def host_waits_until(self, time: float) -> None:
        self.host_waits += 1
        self.host_time = max(self.host_time, time)

    # ---- a step ----

    @property
    def now(self) -> float:
        """When all that is queued for computing is done, in seconds since the step began."""
        return max(self.compute.free_at, self.host_time) - self.begin

    def begin_step(self) -> None:
        """Wait for everything, and count from here."""
        everything = [self.compute, *self._links.values()]
        self.begin = max(self.host_time, *(stream.free_at for stream in everything))
        for stream in everything:
            stream.free_at, stream.busy = self.begin, 0.0
        self.host_time, self.host_waits = self.begin, 0
        self.spans.clear()

    def titles(self) -> dict[str, str]:
        """Of each stream, by its name."""
        return {stream.name: stream.title for stream in self._streams}

    def busy_links(self) -> dict[str, float]:
        """Seconds that each link was busy."""
        return {name: stream.busy for name, stream in self._links.items()}
