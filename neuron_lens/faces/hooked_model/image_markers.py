"""Where images stand in a row of tokens, by the markers a tokenizer defines. Knows ids only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["image_positions"]

# Start marker, the token repeated for an image's patches, end marker; None where a model family has none.
MARKERS: tuple[tuple[str | None, str, str | None], ...] = (
    ("<racm3:break>", "<image>", "<eoss>"),
    (None, "[IMG]", "[IMG_END]"),
    ("<start_of_image>", "<image_soft_token>", "<end_of_image>"),
    ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
    (None, "<image>", None),
)
# Tokens that stand inside an image without being a patch.
INSIDE = ("[IMG_BREAK]",)


def image_positions(name: str, ids: Sequence[int], tokenizer: Any) -> list[int] | None:
    """Positions of `all-image`, `start-image`, `end-image` or `last-image` in a row; empty when it has no image.

    `last-image` is the last patch of each image, `start-image` and `end-image` its markers (its first and last patch where
    the tokenizer has none). None when the tokenizer defines no image token.
    """
    special: dict[str, int] = tokenizer.special_tokens
    known = [
        row for row in MARKERS if row[1] in special and all(text is None or text in special for text in row)
    ]
    if not known:
        return None
    start, patch, end = (None if text is None else special[text] for text in known[0])
    inside = {special[text] for text in INSIDE if text in special} | {patch, start, end} - {None}
    images: list[list[int]] = []
    for position, token in enumerate(ids):
        if token not in inside:
            continue
        begins = not images or images[-1][-1] != position - 1 or ids[position - 1] == end or token == start
        if begins:
            images.append([position])
        else:
            images[-1].append(position)
    patches = [[p for p in image if ids[p] == patch] or image for image in images]
    if name == "all-image":
        return [position for image in images for position in image]
    if name == "start-image":
        return [image[0] for image in images]
    if name == "end-image":
        return [image[-1] for image in images]
    return [image[-1] for image in patches]
