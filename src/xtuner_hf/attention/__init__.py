"""Attention that transformers lacks or computes in too low a precision."""
