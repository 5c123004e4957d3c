"""A model by its repository's own code, for a process that knows nothing of this package."""

from __future__ import annotations

import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def logits(folder: str, input_ids: torch.Tensor) -> dict:
    """What somebody gets who has transformers alone; and the error without `trust_remote_code`."""
    try:
        AutoConfig.from_pretrained(folder)
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    return {
        "logits": model.eval()(input_ids).logits.detach(),
        "class": f"{type(model).__module__}.{type(model).__name__}",
        "info": {key: set(info[key]) for key in ("missing_keys", "unexpected_keys")},
        "refusal": refusal,
        "knows us": "xtuner_hf" in sys.modules,
    }
