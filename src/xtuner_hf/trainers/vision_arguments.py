"""The arguments of training models that read images, part of the arguments of all our trainers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..memory.recompute import RECOMPUTE_POLICIES

PARTS = ("vision", "projector", "language")


@dataclass
class VisionArguments:
    """Which parts of a model that reads images train, how fast, and what its vision tower keeps."""

    freeze_vision: bool = field(
        default=False,
        metadata={"help": "Do not train the vision tower; its stochastic depth is then off."},
    )
    freeze_projector: bool = field(
        default=False, metadata={"help": "Do not train the projector between vision tower and language model."}
    )
    freeze_language: bool = field(
        default=False,
        metadata={
            "help": "Do not train the language model, its embeddings and head: the warm-up of projector or vision "
            "tower. No coefficient of a balance loss has a default then."
        },
    )
    vision_lr: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the vision tower; None takes learning_rate. All follow one schedule."},
    )
    projector_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the projector; None takes learning_rate."}
    )
    drop_path_rate: float | None = field(
        default=None,
        metadata={
            "help": "Stochastic depth of the vision tower's last layer, rising linearly from 0 at the first: the "
            "probability to leave a residual branch out, tile by tile. InternVL trains with 0.1, its largest models "
            "with 0.4. None takes vision_config.drop_path_rate of the checkpoint."
        },
    )
    vision_recompute: str | None = field(
        default=None,
        metadata={
            "help": "What the vision tower's layers recompute in backward: 'none', 'selective', 'full' (as "
            "recompute). None does what the language model does."
        },
    )
    vision_activation_offload: bool | None = field(
        default=None,
        metadata={
            "help": "Keep the inputs of the vision tower's recomputed layers in pinned host memory. None does what "
            "activation_offload says, where the tower recomputes."
        },
    )

    def __post_init__(self):
        for name in ("vision_lr", "projector_lr"):
            rate = getattr(self, name)
            if rate is not None and rate < 0:
                raise ValueError(f"{name} is {rate}; it must be positive, or None to take learning_rate.")
            part = name.removesuffix("_lr")
            if rate is not None and getattr(self, f"freeze_{part}"):
                raise ValueError(f"{name} is {rate} and freeze_{part} True: a part that does not train has no rate.")
        if self.drop_path_rate is not None and not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate is {self.drop_path_rate}; it is a probability below 1.")
        if self.vision_recompute is not None and self.vision_recompute not in RECOMPUTE_POLICIES:
            raise ValueError(
                f"vision_recompute is {self.vision_recompute!r}; choose one of {', '.join(RECOMPUTE_POLICIES)}."
            )
        if self.frozen == list(PARTS):
            raise ValueError("freeze_vision, freeze_projector and freeze_language together leave nothing to train.")
        parent: Any = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()

    @property
    def frozen(self) -> list[str]:
        """The parts that do not train."""
        return [part for part in PARTS if getattr(self, f"freeze_{part}")]

    @property
    def asked_of_vision(self) -> list[str]:
        """The arguments of this class that were given."""
        return [name for name, f in VisionArguments.__dataclass_fields__.items() if getattr(self, name) != f.default]
