"""Tiles to features, and features to where their tokens stand; also where ranks share the rows, or have no image.

    every rank of the group      pixel_values: all tiles of the rows, in the order of their tokens
      -> its part of the tiles -> vision tower, projector -> all features, gathered
      -> those of this rank's positions

A rank that has no tile computes one of zeros, of which nobody takes a feature: it joins the collectives of the sharded
tower, its gradients are there, and they are exactly zero.

Legend: N tiles, Q image tokens of a tile, I image tokens, H hidden size of the language model, B rows, S
positions of a rank, L of whole rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...attention.ulysses import SequenceShard, gather_parts
from ...host_reads import host_reads


def compute_features(
    pixel_values: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor], sequence: SequenceShard | None
) -> torch.Tensor:
    """Features of all tiles, [N, Q, H], or of one more for each rank that would have none.

    Args:
        pixel_values: [N, 3, height, width], the same on all ranks that share the rows; N may be 0.
        encode: vision tower and projector.
    """
    num_ranks = 1 if sequence is None else sequence.ranks.size
    each = max(1, -(-len(pixel_values) // num_ranks))
    num_idle = each * num_ranks - len(pixel_values)
    if num_idle:
        pixel_values = torch.cat([pixel_values, pixel_values.new_zeros(num_idle, *pixel_values.shape[1:])])
    if sequence is None:
        return encode(pixel_values)
    return gather_parts(encode(pixel_values.chunk(num_ranks)[sequence.ranks.rank]), sequence.ranks)


def place_features(
    embeds_BSH: torch.Tensor,
    is_image_BL: torch.Tensor,
    row_I: torch.Tensor,
    features_NQH: torch.Tensor,
    sequence: SequenceShard | None,
) -> torch.Tensor:
    """The embeddings with image features in the place of image tokens, in order.

    Args:
        is_image_BL: [B, L] bool, True on the image tokens of whole rows.
        row_I: [I] int64, where that is in the flattened rows.
    """
    features_TH = features_NQH.flatten(0, 1).to(embeds_BSH.dtype)
    if sequence is None:
        features_TH = features_TH[: len(row_I)]  # a rank without images has computed a tile of zeros
    else:
        order_BL = is_image_BL.flatten().cumsum(0).view_as(is_image_BL) - 1
        row_I = host_reads().image_tokens(sequence.take(is_image_BL).flatten())
        features_TH = features_TH[sequence.take(order_BL).flatten()[row_I]]
    return embeds_BSH.flatten(0, 1).index_copy(0, row_I, features_TH).view_as(embeds_BSH)


def check_counts(num_tokens: int, num_tiles: int, tokens_per_tile: int, image_token_id: int) -> None:
    """Raises a ValueError if there are not exactly as many image tokens as the tiles fill."""
    if num_tokens == num_tiles * tokens_per_tile:
        return
    if not num_tiles:
        raise ValueError(
            f"The rows hold {num_tokens} image tokens (id {image_token_id}), and there are no pixel_values: an image "
            "was lost on the way, or the id stands in a text. Give the images with the rows that show them."
        )
    raise ValueError(
        f"The rows hold {num_tokens} image tokens (id {image_token_id}), and pixel_values are {num_tiles} tiles of "
        f"{tokens_per_tile} tokens each: {num_tiles * tokens_per_tile}. Make both with one call of the processor, and "
        "do not cut rows within an image."
    )
