"""Checkpoints in the Hub's own format."""
