"""Aspect ratio and pixel budget to levels: the token grids that generation walks, coarse to fine.

Legend: L tokens of a level or of all levels, D half of a head's channels.
Source: the published Infinity tables of dynamic resolutions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

PIXEL_BUDGETS = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}

# height / width -> (height, width) in tokens of each level of the 1M budget
_GRIDS = {
    1.0: "1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64",
    1.25: "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    1.333: "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    1.5: "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    1.75: "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    2.0: "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    2.5: "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    3.0: "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
}
_RATIO_ORDER = (1, 1.25, 0.8, 1.333, 0.75, 1.5, 0.666, 1.75, 0.571, 2, 0.5, 2.5, 0.4, 3, 0.333)
PIXELS_PER_TOKEN = 16


def _grids(ratio: float) -> list[tuple[int, int]]:
    if ratio in _GRIDS:
        return [tuple(map(int, grid.split("x"))) for grid in _GRIDS[ratio].split()]  # type: ignore[misc]
    tall = next(r for r in _GRIDS if int(1000 / r) / 1000 == ratio)
    return [(w, h) for h, w in _grids(tall)]


ASPECT_RATIOS: tuple[float, ...] = tuple(sorted(float(r) for r in _RATIO_ORDER))


@dataclass(frozen=True)
class Level:
    """One step of generation: an ``height x width`` grid of tokens that starts at ``offset``."""

    index: int
    height: int
    width: int
    offset: int
    is_last: bool

    @property
    def num_tokens(self) -> int:
        return self.height * self.width

    @property
    def end(self) -> int:
        return self.offset + self.num_tokens


@dataclass(frozen=True)
class Schedule:
    """All levels of one image, and the grid that positions are measured in."""

    levels: tuple[Level, ...]
    aspect_ratio: float
    pixel_budget: str
    finest_grid: tuple[int, int]  # last grid of the 1M budget: the unit of rotary positions

    @staticmethod
    @lru_cache
    def of(aspect_ratio: float, pixel_budget: str) -> Schedule:
        """The schedule whose ratio height / width is nearest to ``aspect_ratio``.

        Raises: ValueError for a ratio that is not positive and finite, or an unknown budget.
        """
        if not 0 < aspect_ratio < math.inf:
            raise ValueError(f"aspect_ratio is {aspect_ratio}; give height / width, e.g. 1 or 0.75")
        if pixel_budget not in PIXEL_BUDGETS:
            raise ValueError(
                f"pixel_budget is {pixel_budget!r}; use one of {', '.join(PIXEL_BUDGETS)}"
            )
        ratio = float(min(_RATIO_ORDER, key=lambda template: abs(template - aspect_ratio)))
        grids = _grids(ratio)
        levels, offset = [], 0
        kept = grids[: PIXEL_BUDGETS[pixel_budget]]
        for index, (height, width) in enumerate(kept):
            levels.append(Level(index, height, width, offset, is_last=index == len(kept) - 1))
            offset += height * width
        return Schedule(tuple(levels), ratio, pixel_budget, grids[-1])

    @property
    def num_tokens(self) -> int:
        return self.levels[-1].end

    @property
    def num_cached_tokens(self) -> int:
        """Tokens that a later level reads: all but those of the last level."""
        return self.levels[-1].offset

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the image in pixels."""
        last = self.levels[-1]
        return last.height * PIXELS_PER_TOKEN, last.width * PIXELS_PER_TOKEN

    def after(self, level: Level) -> Level:
        """The level that follows ``level``."""
        return self.levels[level.index + 1]

    def token_positions(self) -> Tensor:
        """Rotary position (y, x) of every token, int64 ``[L, 2]``, in units of the finest grid.

        A level's row ``i`` of ``h`` lies at ``i * H / h`` rounded half to even, in exact integer
        arithmetic.
        """
        positions = []
        for level in self.levels:
            y = _rescaled_positions(level.height, self.finest_grid[0])
            x = _rescaled_positions(level.width, self.finest_grid[1])
            grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
            positions.append(torch.stack([grid_y.flatten(), grid_x.flatten()], dim=1))
        return torch.cat(positions)


def _rescaled_positions(count: int, finest: int) -> Tensor:
    """``round_half_even(i * finest / count)`` for ``i < count``."""
    numerator = torch.arange(count) * finest
    floor, rest = numerator // count, numerator % count
    round_up = (2 * rest > count) | ((2 * rest == count) & (floor % 2 == 1))
    return floor + round_up


def rotary_table(schedule: Schedule, head_dim: int, device: torch.device | str) -> Tensor:
    """Cosines and sines of the 2-D rotary embedding, float32 ``[2, L, D]`` with D = head_dim / 2.

    The first half of the D angles turns with y, the second with x.
    """
    num_angles = head_dim // 2
    exponents = torch.arange(0, num_angles, 2, dtype=torch.float32) / num_angles
    inverse_frequency = 1.0 / (10000**exponents)
    angles_L2D = schedule.token_positions().float()[:, :, None] * inverse_frequency
    angles_LD = angles_L2D.flatten(1)
    return torch.stack([angles_LD.cos(), angles_LD.sin()]).to(device)
