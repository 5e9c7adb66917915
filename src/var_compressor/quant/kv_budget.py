"""Which head gets how many bits, and which levels it keeps, so that a cache fits.

Shapes: H heads, S levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from var_compressor.layers.kv_params import CacheFormat
from var_compressor.models.schedule import Level, Schedule


@dataclass(frozen=True)
class LayerNeeds:
    """What the choice is made by.

    ``noise_H[n]``: share of noise in the layer's attention output with the head in n bits;
    ``mass_HS``: the probability that later levels give to each level.
    """

    noise_H: dict[int, Tensor]
    mass_HS: Tensor


@dataclass(frozen=True)
class LayerChoice:
    """Bits of every head, and the levels that each drops."""

    nbits: tuple[int, ...]
    dropped: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class CacheShape:
    """All that bytes depend on; ``rows`` of one image."""

    schedule: Schedule
    head_dim: int
    rows: int
    format: CacheFormat

    def level_bytes(self, level: Level, nbits: int) -> int:
        """Of one head's keys and values of a level."""
        values = 2 * self.rows * level.num_tokens * self.head_dim
        if level.index < self.format.plain_levels:
            return 2 * values
        # a scale and an offset in 16 bits, for keys and for values
        own_scales = 2 * self.rows * self.head_dim * 4 if self.format.dynamic else 0
        return values * nbits // 8 + own_scales

    def head_bytes(self, nbits: int) -> int:
        return sum(self.level_bytes(level, nbits) for level in self.schedule.levels[:-1])


def fit(needs: Sequence[LayerNeeds], shape: CacheShape, *, max_bytes: int) -> list[LayerChoice]:
    """8 bits if they fit; else 4 bits for the heads that lose least per byte; else, with all heads
    in 4 bits, eviction.

    Raises: ValueError for a budget below a hundredth of the 4-bit cache.
    """
    bits = choose_bits(needs, shape, max_bytes=max_bytes)
    return evict(needs, bits, shape, max_bytes=max_bytes)


def choose_bits(
    needs: Sequence[LayerNeeds], shape: CacheShape, *, max_bytes: int
) -> list[tuple[int, ...]]:
    """Bits per layer and head: 8, but 4 where that adds the least noise, until all fit.

    All heads save the same bytes, so the least noise is the least noise per byte.
    """
    bits = [[8] * len(need.mass_HS) for need in needs]
    added = {
        (layer, head): noise
        for layer, need in enumerate(needs)
        for head, noise in enumerate((need.noise_H[4] - need.noise_H[8]).tolist())
    }
    total = len(added) * shape.head_bytes(8)
    for layer, head in sorted(added, key=lambda place: (added[place], place)):
        if total <= max_bytes:
            break
        bits[layer][head] = 4
        total -= shape.head_bytes(8) - shape.head_bytes(4)
    return [tuple(nbits) for nbits in bits]


def evict(
    needs: Sequence[LayerNeeds],
    bits: Sequence[tuple[int, ...]],
    shape: CacheShape,
    *,
    max_bytes: int,
) -> list[LayerChoice]:
    """Of all layers, heads and levels, those with the most attention per byte that fit.

    Raises: ValueError for a budget below a hundredth of them all.
    """
    masses = [need.mass_HS.tolist() for need in needs]
    places = {
        (layer, head, level.index): shape.level_bytes(level, nbits)
        for layer, layer_bits in enumerate(bits)
        for head, nbits in enumerate(layer_bits)
        for level in shape.schedule.levels[:-1]
    }
    whole = sum(places.values())
    if max_bytes < whole / 100:
        raise ValueError(
            f"quant.kv: {max_bytes} bytes are less than 1 % of the {whole} bytes that the cache "
            "of one image takes; give a larger kv.budget or kv.keep"
        )

    def worth(place: tuple[int, int, int]) -> float:
        layer, head, level = place
        return masses[layer][head][level] / places[place]

    dropped: list[list[list[int]]] = [[[] for _ in nbits] for nbits in bits]
    left = max_bytes
    for place in sorted(places, key=lambda place: (-worth(place), place)):
        if places[place] <= left:
            left -= places[place]
        else:
            layer, head, level = place
            dropped[layer][head].append(level)
    return [
        LayerChoice(nbits, tuple(tuple(sorted(levels)) for levels in layer))
        for nbits, layer in zip(bits, dropped, strict=True)
    ]
