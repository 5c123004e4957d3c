"""InternVL's processor without torchvision."""

from __future__ import annotations

from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer
from transformers import InternVLProcessor as HubInternVLProcessor

# What the tokens of images are called in the files of a tokenizer.
_IMAGE_TOKENS = ("start_image_token", "end_image_token", "context_image_token", "video_token")


class InternVLProcessor(HubInternVLProcessor):
    """transformers' `InternVLProcessor` for text and images.

    transformers' own cannot be built where torchvision is missing, because of its video processor. Videos are trained
    on as their frames, which are images. Tiles are cut by the image processor that computes with Pillow, as InternVL's
    own code does. It reads and writes transformers' files, those of the video processor included, so that transformers
    with torchvision loads what it saves.

    Args:
        image_processor: of the tiles' side (`size`), their mean, deviation and number.
        tokenizer: with InternVL's tokens of images.
        image_seq_length: tokens of a tile.
        chat_template: the tokenizer's by default.

    Raises:
        ValueError: for a tokenizer without tokens of images.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = 256,
        chat_template: str | None = None,
        **keywords: Any,
    ):
        lacking = [name for name in _IMAGE_TOKENS if getattr(tokenizer, name, None) is None]
        if lacking:
            raise ValueError(
                f"The tokenizer has no {', '.join(lacking)}: load that of an InternVL checkpoint, or name its tokens "
                "in extra_special_tokens."
            )
        super().__init__(
            image_processor,
            tokenizer,
            None,
            image_seq_length=image_seq_length,
            chat_template=chat_template or tokenizer.chat_template,
            **keywords,
        )

    @classmethod
    def from_pretrained(cls, name: str, **keywords: Any) -> InternVLProcessor:  # type: ignore[override]
        """The processor of a checkpoint in transformers' layout (`...-HF`), whether torchvision is there or not."""
        settings, _ = cls.get_processor_dict(name, **keywords)
        return cls(
            AutoImageProcessor.from_pretrained(name, backend="pil", **keywords),
            AutoTokenizer.from_pretrained(name, **keywords),
            image_seq_length=settings.get("image_seq_length", 256),
            chat_template=settings.get("chat_template"),
        )

    def to_dict(self) -> dict[str, Any]:
        """As the parent's, with the video processor that transformers asks for when it loads a processor."""
        settings = super().to_dict()
        shared = ("do_convert_rgb", "do_normalize", "do_rescale", "do_resize", "image_mean", "image_std")
        images = settings["image_processor"]
        frames = {key: images[key] for key in (*shared, "resample", "rescale_factor", "size")}
        return settings | {"video_processor": frames | {"video_processor_type": "InternVLVideoProcessor"}}
