"""Bits and levels by a budget: what fits, what is worth most, against brute force."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from tiny import tiny_config
from var_compressor.layers.kv_cache import num_cache_bytes
from var_compressor.layers.kv_params import CacheFormat, CacheParams, KVParams, LayerParams
from var_compressor.models.schedule import Schedule
from var_compressor.quant.kv_budget import CacheShape, LayerNeeds, choose_bits, evict, fit

CONFIG = tiny_config().transformer
SCHEDULE = Schedule.of(1.0, "0.06M")
CACHED = SCHEDULE.levels[:-1]
H = CONFIG.num_heads
PLAIN = CacheFormat("int8", False, 0)
FORMATS = [PLAIN, CacheFormat("int8", True, 0), CacheFormat("int8", False, 3)]


def some_needs(seed=0):
    rng = torch.Generator().manual_seed(seed)
    needs = []
    for _ in range(CONFIG.depth):
        noise_H = torch.rand(H, generator=rng)
        mass_HS = torch.rand(H, len(SCHEDULE.levels), generator=rng)
        needs.append(LayerNeeds({8: noise_H / 100, 4: noise_H}, mass_HS))
    return needs


def cache_bytes(choices, format):
    """What the cache itself allocates for these choices."""
    ones = torch.ones(H, CONFIG.head_dim)
    ranges = None if format.dynamic else KVParams(ones, ones.int(), ones, ones.int())
    layers = tuple(LayerParams(one.nbits, one.dropped, ranges) for one in choices)
    return num_cache_bytes(CacheParams(format, layers), CONFIG, SCHEDULE, rows=2)


@pytest.mark.parametrize("format", FORMATS)
def test_every_budget_is_met_and_nearly_used_up(format):
    shape = CacheShape(SCHEDULE, CONFIG.head_dim, 2, format)
    whole = CONFIG.depth * H * shape.head_bytes(8)
    for share in (1.2, 1.0, 0.99, 0.8, 0.6, 0.45, 0.3, 0.1, 0.04):
        max_bytes = int(share * whole)
        choices = fit(some_needs(), shape, max_bytes=max_bytes)
        found = cache_bytes(choices, format)
        all_bits = {nbits for one in choices for nbits in one.nbits}
        drops = any(levels for one in choices for levels in one.dropped)
        assert found <= max_bytes
        if share >= 1:
            assert found == whole and all_bits == {8} and not drops
        else:
            # what is left is less than a head's other half, or than a level
            assert found >= max_bytes - max(shape.head_bytes(8) - shape.head_bytes(4), 1)
        assert not drops or all_bits == {4}
        assert choices == fit(some_needs(), shape, max_bytes=max_bytes)


def test_bits_are_those_of_least_noise():
    """Against all 2^6 choices of as many heads."""
    shape = CacheShape(SCHEDULE, CONFIG.head_dim, 2, PLAIN)
    needs = some_needs(3)
    for num_small in range(CONFIG.depth * H + 1):
        sizes = [shape.head_bytes(4)] * num_small
        sizes += [shape.head_bytes(8)] * (CONFIG.depth * H - num_small)

        def noise(flat):
            places = enumerate(flat)
            return sum(float(needs[i // H].noise_H[nbits][i % H]) for i, nbits in places)

        bits = choose_bits(needs, shape, max_bytes=sum(sizes))
        flat = [nbits for layer in bits for nbits in layer]
        assert flat.count(4) == num_small
        all_choices = [c for c in product((4, 8), repeat=len(flat)) if c.count(4) == num_small]
        assert noise(flat) == pytest.approx(min(map(noise, all_choices)))


def test_kept_levels_are_worth_more_per_byte_than_dropped_ones():
    shape = CacheShape(SCHEDULE, CONFIG.head_dim, 2, PLAIN)
    needs, bits = some_needs(5), [(4, 8)] * CONFIG.depth
    max_bytes = CONFIG.depth * shape.head_bytes(4)
    choices = evict(needs, bits, shape, max_bytes=max_bytes)
    worth, sizes = {True: [], False: []}, {True: [], False: []}
    for need, choice in zip(needs, choices, strict=True):
        for head, nbits in enumerate(choice.nbits):
            for level in CACHED:
                kept = level.index not in choice.dropped[head]
                size = shape.level_bytes(level, nbits)
                sizes[kept].append(size)
                worth[kept].append((float(need.mass_HS[head, level.index]) / size, size))
    left = max_bytes - sum(sizes[True])
    assert sizes[False] and 0 <= left < min(sizes[False])
    # a dropped level is worth less than any kept one, or did not fit any more
    for value, size in worth[False]:
        better = sum(s for v, s in worth[True] if v >= value)
        assert better + size > max_bytes


def test_equal_worth_is_settled_by_order_and_impossible_budgets_are_named():
    shape = CacheShape(SCHEDULE, CONFIG.head_dim, 2, PLAIN)
    noise_H = torch.ones(H)
    needs = [LayerNeeds({4: noise_H, 8: noise_H}, torch.zeros(H, 7))] * CONFIG.depth
    saved = shape.head_bytes(8) - shape.head_bytes(4)
    whole = CONFIG.depth * H * shape.head_bytes(8)
    assert choose_bits(needs, shape, max_bytes=whole - saved)[0] == (4, 8)
    with pytest.raises(ValueError, match=r"^quant\.kv: 1000 bytes are less than 1 % of the 101760"):
        fit(needs, shape, max_bytes=1000)
