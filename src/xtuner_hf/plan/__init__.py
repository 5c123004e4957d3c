"""The planner: one rank's training step on fake tensors, with the code that will really run (docs/planner.md)."""
