"""Two models at one seed: where their images differ, and how many of their bits are the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from var_compressor.generation import Trace
from var_compressor.models.agreement import compare_logits

# difference, of 255, that the map shows in its brightest colour
FULL_DIFFERENCE = 96
# dark to bright at every step, so that it reads without colours too: none … FULL_DIFFERENCE
_STOPS = ((12, 12, 40), (86, 23, 110), (187, 55, 84), (249, 142, 9), (252, 255, 164))


class HasImage(Protocol):
    @property
    def image(self) -> Image.Image: ...


@dataclass(frozen=True)
class Comparison:
    """``drawn``: per level, the share of bits that both images have in common. ``forced``: the
    share of bits whose likelier value is the same for both models when both are given the first
    one's bits of all levels before. ``difference``: the map of `difference_map`.

    ``mean_difference`` and ``max_difference`` are of 255, over pixels and colours;
    ``changed`` is the share of pixels with any difference.
    """

    drawn: tuple[float, ...]
    forced: tuple[float, ...]
    num_bits: tuple[int, ...]
    difference: Image.Image
    mean_difference: float
    max_difference: int
    changed: float

    def mean(self, shares: tuple[float, ...]) -> float:
        """Over all bits of all levels."""
        return float(np.average(shares, weights=self.num_bits))


def compare(
    pictures: tuple[HasImage, ...], first: Trace, second: Trace, forced: Trace
) -> Comparison:
    """Two pictures of one size with their traces; ``forced`` is the second model's on ``first``."""
    one_YX3, other_YX3 = (np.asarray(picture.image, dtype=np.int16) for picture in pictures)
    difference_YX3 = np.abs(one_YX3 - other_YX3)
    drawn = [_share_equal(a, b) for a, b in zip(first.bits, second.bits, strict=True)]
    agreement = compare_logits(first.logits, forced.logits).pooled()
    return Comparison(
        tuple(drawn),
        agreement.same_bit,
        agreement.num_bits,
        difference_map(difference_YX3),
        float(difference_YX3.mean()),
        int(difference_YX3.max()),
        float((difference_YX3.max(-1) > 0).mean()),
    )


def difference_map(difference_YX3: np.ndarray) -> Image.Image:
    """Of each pixel the largest difference of its colours, 0 … 255, as a colour."""
    share_YX = np.minimum(difference_YX3.max(-1) / FULL_DIFFERENCE, 1.0)
    stops = np.linspace(0, 1, len(_STOPS))
    channels = [np.interp(share_YX, stops, column) for column in np.transpose(_STOPS)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def legend_colors() -> list[str]:
    """The map's colours from no difference to `FULL_DIFFERENCE`, as CSS has them."""
    return ["#{:02x}{:02x}{:02x}".format(*stop) for stop in _STOPS]


def _share_equal(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a == b).double().mean().item()
