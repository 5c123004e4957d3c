"""Train Mixture-of-Experts models with the HuggingFace tools you already use."""
