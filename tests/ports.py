"""A port to listen on that another worker of the same test run is unlikely to take first."""

from __future__ import annotations

import random
import socket

# Below the range that systems deal out themselves: a port from there is gone before slow imports are over.
_RANGE = range(12_000, 32_000)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    chooser = random.SystemRandom()  # tests seed the other one, and both workers would choose alike
    while True:
        port = chooser.choice(_RANGE)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
