"""Calling a pipeline as diffusers' are called: what their words mean here, and the answer.

Source: the argument names of diffusers' text-to-image pipelines.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from var_compressor.models.schedule import PIXEL_BUDGETS, Schedule
from var_compressor.models.transformer import TextFeatures

OutputType = Literal["pil", "np", "pt", "latent"]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
Generators = torch.Generator | Sequence[torch.Generator]
_MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class ImageOutput:
    """``images``: PIL images; float32 in [0, 1], numpy ``[B, Y, X, 3]`` or torch ``[B, 3, Y, X]``;
    or latents, float32 ``[B, D, Y, X]``.
    """

    images: Any


def check_output_type(output_type: str) -> None:
    """Raises: ValueError naming the kinds there are."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type is {output_type!r}; use one of {', '.join(OUTPUT_TYPES)}")


def unit_images(image_B3YX: Tensor, output_type: str) -> Any:
    """Images in [-1, 1] as "pt" or "np" in [0, 1]."""
    unit_B3YX = ((image_B3YX.float() + 1) / 2).clamp(0, 1)
    return unit_B3YX if output_type == "pt" else unit_B3YX.permute(0, 2, 3, 1).cpu().numpy()


def repeated(text: TextFeatures, times: int) -> TextFeatures:
    """Every row so many times, one after the other. Raises: ValueError for less than once."""
    if times < 1:
        raise ValueError(f"num_images_per_prompt is {times}, expected at least 1")
    lens = tuple(length for length in text.lens for _ in range(times))
    return TextFeatures(torch.cat([row for row in text.rows() for _ in range(times)]), lens)


def seeds_of(generator: Generators | None, num_images: int) -> list[int]:
    """One seed per image: image i of one generator gets its initial seed + i.

    A generator's state is neither read nor moved: the same one draws the same images again. None
    takes a seed from torch's global generator. Raises: ValueError for a list of another length.
    """
    if generator is None:
        first = int(torch.randint(_MAX_SEED, ()).item())
    elif isinstance(generator, torch.Generator):
        first = generator.initial_seed()
    else:
        if len(generator) != num_images:
            raise ValueError(
                f"{len(generator)} generators for {num_images} images; give one, or one each"
            )
        return [one.initial_seed() for one in generator]
    return [(first + i) % 2**64 for i in range(num_images)]


def nearest_schedule(height: int | None, width: int | None, own: Schedule) -> Schedule:
    """The schedule nearest in height / width, then in area, at most of the budget of ``own``.

    A side left out is that of ``own``. Warns where the image will have another size.
    Raises: ValueError for a side that is not a positive integer.
    """
    sides = tuple(
        given if given is not None else default
        for given, default in zip((height, width), own.image_size, strict=True)
    )
    for name, side in zip(("height", "width"), sides, strict=True):
        if isinstance(side, bool) or not isinstance(side, int) or side < 1:
            raise ValueError(
                f"{name} is {side!r}; give a number of pixels, e.g. {own.image_size[0]}"
            )
    largest = PIXEL_BUDGETS[own.pixel_budget]
    candidates = [
        Schedule.of(sides[0] / sides[1], budget)
        for budget, num_levels in PIXEL_BUDGETS.items()
        if num_levels <= largest
    ]
    nearest = min(candidates, key=lambda one: abs(math.log(_ratio(one.image_size, sides))))
    if nearest.image_size != sides:
        warnings.warn(
            f"{sides[0]}x{sides[1]} (height x width) is no size of this model; drawing the "
            f"nearest, {nearest.image_size[0]}x{nearest.image_size[1]}",
            # past the decorator of the call
            stacklevel=4,
        )
    return nearest


def _ratio(size: Sequence[int], wanted: Sequence[int]) -> float:
    return math.prod(size) / math.prod(wanted)
