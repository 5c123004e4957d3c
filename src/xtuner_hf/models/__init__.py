"""Model families, one folder each; `auto.py` picks by `model_type`."""
