"""Names of transformers and TRL that this package leans on and that their documentation does not promise.

Checked with transformers 5.23 and TRL 1.16; `tests/test_compat.py` fails when one moves or changes its signature.
"""

from __future__ import annotations

from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.distributed.utils import initialize_distributed_mesh
from transformers.utils.output_capturing import OutputRecorder
from trl.kernels import ChunkedLogProbFunction

__all__ = [
    "ChunkedLogProbFunction",
    "OutputRecorder",
    "get_checkpoint_conversion_mapping",
    "initialize_distributed_mesh",
    "register_checkpoint_conversion_mapping",
]
