"""Log lines of a job, not of each of its processes."""

from __future__ import annotations

import logging

import torch.distributed as dist


def warn(logger: logging.Logger, message: str) -> None:
    """A warning by the first process alone; by all of them before they are joined."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0:
        logger.warning(message)
