"""Fixtures of the trainers' tests."""

from tests.trainers.exact_head import exact_head, tolerance

__all__ = ["exact_head", "tolerance"]
