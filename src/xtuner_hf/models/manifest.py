"""What a model's checkpoint holds on the Hub: names, shapes and dtypes, without a single value.

A model on the meta device has every shape and no memory, so this works at full size (1T parameters) on a laptop. The
names go through the same reverse conversion that `save_pretrained` uses.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .._compat import revert_weight_conversion
from .auto import model_class


class HubTensor(NamedTuple):
    """One tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_values(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def num_bytes(self) -> int:
        return self.num_values * self.dtype.itemsize


def meta_model(config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16, **kwargs: Any) -> PreTrainedModel:
    """Our model of this configuration on the meta device; further arguments as for `from_config`."""
    with torch.device("meta"):
        return model_class(config)._from_config(config, dtype=dtype, **kwargs)


def hub_manifest(model: PreTrainedModel) -> dict[str, HubTensor]:
    """Hub name -> shape and dtype of every tensor that `model.save_pretrained` writes.

    Args:
        model: on any device; values are neither read nor made on the meta device.
    """
    stored = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    tensors = revert_weight_conversion(model, stored)
    return {name: HubTensor(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
