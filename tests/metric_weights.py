"""Numbers that look random and are the same everywhere, to fill networks with in tests: a recorded
answer must not hang on one version's random generator.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Uniform in [0, 1), float64, by an integer hash of every element's place."""
    count = 1
    for size in shape:
        count *= size
    mixed = torch.arange(count, dtype=torch.int64) + seed * 1_000_003
    for _ in range(2):
        mixed = ((mixed ^ (mixed >> 16)) * 73_244_475) & 0xFFFF_FFFF
    return ((mixed ^ (mixed >> 16)).double() / 2**32).reshape(shape)


def filled(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights that keep the size of what flows through, whatever the network: by name and shape."""
    state = {}
    for seed, name in enumerate(sorted(shapes)):
        uniform = noise(shapes[name], seed)
        if name.endswith(("running_var", "bn.weight", "LayerNorm.weight", "norm.weight")):
            value = uniform + 0.5
        elif len(shapes[name]) > 1:
            value = (uniform - 0.5) * (24 / uniform[0].numel()) ** 0.5
        else:
            value = 0.2 * (uniform - 0.5)
        state[name] = value.float()
    return state


def images(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth in places and noisy in others, uint8 ``[count, 3, height, width]``."""
    waves = torch.linspace(0, 9, height)[:, None].sin() * torch.linspace(1, 7, width).cos()
    mix = noise((count, 3, 1, 1), seed + 1)
    value = 128 + 90 * waves * mix + 60 * (noise((count, 3, height, width), seed) - 0.5)
    return value.round().clamp(0, 255).to(torch.uint8)
