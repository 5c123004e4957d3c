"""What reinforcement learning of MoE models needs besides TRL's GRPO."""
