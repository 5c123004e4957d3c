"""HF `Trainer` and TRL trainers for Mixture-of-Experts models."""
