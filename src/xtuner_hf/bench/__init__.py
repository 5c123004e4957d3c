"""`xtuner-hf bench`: layer stacks through the trainers' own step, ours next to stock transformers, in one run."""
