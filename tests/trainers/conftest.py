"""Fixtures of the trainers' tests."""

from tests.trainers.exact_head import tolerance

__all__ = ["tolerance"]
