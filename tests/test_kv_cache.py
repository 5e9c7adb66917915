"""KV caches: all levels at once equals one by one, codes equal float64, bytes are true.

Shapes: R rows, H heads, L tokens, D head_dim.
"""

from __future__ import annotations

import pytest
import torch

from tiny import random_text, tiny_config, tiny_pipeline
from var_compressor.layers.kv_cache import CodedCache, PlainCache, num_cache_bytes
from var_compressor.layers.kv_params import (
    CacheFormat,
    CacheParams,
    KVParams,
    LayerParams,
    whole_layer,
)
from var_compressor.models.config import MODELS
from var_compressor.models.sampling import Sampling
from var_compressor.models.schedule import Schedule
from var_compressor.quant.kv import calibrate_channels, largest_magnitudes

CONFIG = tiny_config().transformer
ROWS = 3
H = CONFIG.num_heads
RATIOS = pytest.mark.parametrize("aspect_ratio", [1.0, 0.5])
# kind -> (format, bits of both heads, levels that each drops)
KINDS = {
    "int8": (CacheFormat("int8", False, 0), (8, 8), ((), ())),
    "int4": (CacheFormat("int4", False, 0), (4, 4), ((), ())),
    "fp8": (CacheFormat("fp8", False, 0), (8, 8), ((), ())),
    "int8-dynamic": (CacheFormat("int8", True, 0), (8, 8), ((), ())),
    "int4-dynamic": (CacheFormat("int4", True, 0), (4, 4), ((), ())),
    "fp8-dynamic": (CacheFormat("fp8", True, 0), (8, 8), ((), ())),
    "int4-plain": (CacheFormat("int4", False, 3), (4, 4), ((), ())),
    "mixed": (CacheFormat("mixed", False, 0), (4, 8), ((), ())),
    "mixed-evicted": (CacheFormat("mixed", False, 2), (4, 8), ((1, 5), (2, 3, 4))),
    "int4-dynamic-evicted": (CacheFormat("int4", True, 0), (4, 4), ((0, 1, 2, 3, 4, 5), (3,))),
}
CODED = pytest.mark.parametrize("kind", list(KINDS))
ALL = pytest.mark.parametrize("kind", ["plain", *KINDS])


def random_qkv(schedule, *, seed=0, dtype=torch.float32):
    """Keys of length one and values with channels of very different ranges, as the network has.

    Many channels of the values exclude 0.
    """
    rng = torch.Generator().manual_seed(seed)
    shape = (ROWS, H, schedule.num_tokens, CONFIG.head_dim)
    q, k, v = (torch.randn(shape, generator=rng) for _ in range(3))
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    v = v * torch.logspace(-1, 1, CONFIG.head_dim) + torch.linspace(-50, 50, CONFIG.head_dim)
    return (4 * q).to(dtype), k.to(dtype), v.to(dtype)


def found_params(kind, k, v):
    """Parameters calibrated on these very keys and values, the same for every layer."""
    format, nbits, dropped = KINDS[kind]
    ranges = None
    if not format.dynamic:
        found = []
        for x in (k, v):
            x_HTD = x.float().transpose(0, 1).flatten(1, 2)
            if format.name == "fp8":
                found.append(largest_magnitudes(x_HTD, highest_code=448))
                continue
            own = [calibrate_channels(x_HTD[h : h + 1], nbits=nbits[h]) for h in range(H)]
            found.append(
                type(own[0])(
                    torch.cat([one.scale_HD for one in own]),
                    torch.cat([one.zero_point_HD for one in own]),
                    torch.cat([one.mse_HD for one in own]),
                    None,
                )
            )
        ranges = KVParams(*(t for r in found for t in (r.scale_HD, r.zero_point_HD)))
    return CacheParams(format, (LayerParams(nbits, dropped, ranges),) * CONFIG.depth)


def new_cache(kind, schedule, k, v, *, rows=ROWS, dtype=torch.float32):
    if kind == "plain":
        return PlainCache(CONFIG, schedule, rows=rows, dtype=dtype, device="cpu")
    return CodedCache(CONFIG, schedule, found_params(kind, k, v), rows=rows, device="cpu")


def level_by_level(cache, schedule, q, k, v, layer=0):
    parts = []
    for level in schedule.levels:
        now = slice(level.offset, level.end)
        # a copy each, because generation never has the other levels in memory
        parts.append(cache.attend(layer, (level,), *(x[:, :, now].clone() for x in (q, k, v))))
    return torch.cat(parts, dim=2)


@RATIOS
@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_levels_at_once_equal_one_by_one_bit_for_bit(kind, aspect_ratio, dtype):
    schedule = Schedule.of(aspect_ratio, "0.06M")
    q, k, v = random_qkv(schedule, dtype=dtype)
    caches = [new_cache(kind, schedule, k, v, dtype=dtype) for _ in range(2)]
    one_by_one = level_by_level(caches[0], schedule, q, k, v, layer=1)
    at_once = caches[1].attend(1, schedule.levels, q, k, v)
    assert at_once.dtype == dtype
    assert torch.equal(one_by_one, at_once)


# --- what is computed: dequantize, then attend, in float64 ----------------------------------------


def affine(x_RLD, scale_D, zero_D, nbits):
    lowest = -(2 ** (nbits - 1))
    # the rounding of the codes is float32's
    codes = (x_RLD / scale_D + zero_D).round().clamp(lowest, -lowest - 1)
    return (codes.double() - zero_D.double()) * scale_D.double()


def own_range(x_RLD, nbits):
    """One level in 16-bit scales of its own, for every row and channel."""
    lowest, highest = x_RLD.amin(1, keepdim=True), x_RLD.amax(1, keepdim=True)
    scale = ((highest - lowest) / (2**nbits - 1)).clamp_min(2**-14).half().float()
    offset = (lowest + 2 ** (nbits - 1) * scale).half().float()
    return affine(x_RLD, scale, -offset / scale, nbits)


def e4m3(x_RLD, scale):
    return (x_RLD / scale).to(torch.float8_e4m3fn).double() * scale.double()


def read_back(kind, x, params, part, schedule):
    """What later levels read of keys or values, by the formats' definitions."""
    format, nbits, _ = KINDS[kind]
    back = x.double().clone()
    for level in schedule.levels[:-1]:
        now = slice(level.offset, level.end)
        for h in range(H):
            own = x[:, h, now]
            if level.index < format.plain_levels:
                back[:, h, now] = own.bfloat16().double()
            elif format.name == "fp8" and format.dynamic:
                scale = (own.abs().amax(1, keepdim=True) / 448).clamp_min(2**-14).half().float()
                back[:, h, now] = e4m3((own / scale).clamp(-448, 448) * scale, scale)
            elif format.dynamic:
                back[:, h, now] = own_range(own, nbits[h])
            else:
                ranges = params.layers[0].ranges
                scale, zero = (
                    getattr(ranges, f"{part}_{name}_HD")[h] for name in ("scale", "zero_point")
                )
                if format.name == "fp8":
                    back[:, h, now] = e4m3(own, scale)
                else:
                    back[:, h, now] = affine(own, scale, zero, nbits[h])
    return back


def attend_float64(q, k, v, k_back, v_back, schedule, dropped):
    outputs = []
    for level in schedule.levels:
        now = slice(level.offset, level.end)
        heads = []
        for h in range(H):
            past = [
                torch.arange(one.offset, one.end)
                for one in schedule.levels[: level.index]
                if one.index not in dropped[h]
            ]
            past = torch.cat([torch.arange(0), *past])
            keys, values = (
                torch.cat([back[:, h, past], x[:, h, now].double()], dim=1)
                for back, x in ((k_back, k), (v_back, v))
            )
            heads.append((q[:, h, now].double() @ keys.mT).softmax(-1) @ values)
        outputs.append(torch.stack(heads, dim=1))
    return torch.cat(outputs, dim=2)


@RATIOS
@CODED
def test_attention_on_codes_equals_float64_on_what_the_codes_stand_for(kind, aspect_ratio):
    schedule = Schedule.of(aspect_ratio, "0.06M")
    q, k, v = random_qkv(schedule)
    params = found_params(kind, k, v)
    k_back, v_back = (read_back(kind, x, params, p, schedule) for x, p in ((k, "k"), (v, "v")))
    wanted = attend_float64(q, k, v, k_back, v_back, schedule, KINDS[kind][2])
    got = new_cache(kind, schedule, k, v).attend(0, schedule.levels, q, k, v)
    # a value on the border of two codes may fall to either side where a scale comes on the fly
    error = (got - wanted).abs() / wanted.abs().amax()
    assert error.max() <= (1e-4 if KINDS[kind][0].dynamic else 1e-5)
    assert error.median() <= 1e-6


@CODED
def test_what_is_read_back_for_measuring_is_what_attention_reads(kind):
    schedule = Schedule.of(1.0, "0.06M")
    q, k, v = random_qkv(schedule)
    cache = new_cache(kind, schedule, k, v)
    k_back, v_back = k.clone(), v.clone()
    for level in schedule.levels[:-1]:
        now = slice(level.offset, level.end)
        k_back[:, :, now], v_back[:, :, now] = cache.stored(0, level, k[:, :, now], v[:, :, now])
    wanted = attend_float64(q, k, v, k_back.double(), v_back.double(), schedule, KINDS[kind][2])
    got = new_cache(kind, schedule, k, v).attend(0, schedule.levels, q, k, v)
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@RATIOS
@pytest.mark.parametrize(
    ("kind", "least_db"),
    [("int8", 38), ("int8-dynamic", 38), ("int4", 16), ("int4-dynamic", 16), ("fp8", 28)],
)
def test_codes_are_close_to_the_plain_cache(kind, aspect_ratio, least_db):
    schedule = Schedule.of(aspect_ratio, "0.06M")
    q, k, v = random_qkv(schedule)
    # apart from the offset, which the probabilities leave as it is
    v = v - v.mean(dim=(0, 2), keepdim=True)
    wanted, got = (
        new_cache(kind, schedule, k, v).attend(0, schedule.levels, q, k, v).double()
        for kind in ("plain", kind)
    )
    noise = (wanted - got)[:, :, 1:].square().mean(dim=(0, 2))
    signal = wanted[:, :, 1:].square().mean(dim=(0, 2))
    # of every channel, whatever its range; averaging over keys adds to what the codes have
    assert (10 * torch.log10(signal / noise)).min() >= least_db
    # the first level has nothing cached to read
    first = schedule.levels[0].end
    assert torch.allclose(wanted[:, :, :first], got[:, :, :first], atol=1e-5)


@ALL
def test_rows_are_independent(kind):
    schedule = Schedule.of(1.0, "0.06M")
    q, k, v = random_qkv(schedule)
    together = new_cache(kind, schedule, k, v).attend(0, schedule.levels, q, k, v)
    for row in range(ROWS):
        own = (x[row : row + 1] for x in (q, k, v))
        alone = new_cache(kind, schedule, k, v, rows=1).attend(0, schedule.levels, *own)
        assert (together[row : row + 1] - alone).abs().max() <= 1e-5 * alone.abs().max()


@ALL
def test_a_layer_reads_only_its_own_state(kind):
    schedule = Schedule.of(1.0, "0.06M")
    q, k, v = random_qkv(schedule)
    wanted = level_by_level(new_cache(kind, schedule, k, v), schedule, q, k, v, layer=0)
    mixed = new_cache(kind, schedule, k, v)
    for level in schedule.levels:
        now = slice(level.offset, level.end)
        own = [x[:, :, now] for x in (q, k, v)]
        got = mixed.attend(0, (level,), *own)
        mixed.attend(2, (level,), *(5 * x for x in own))
        assert torch.allclose(got, wanted[:, :, now], atol=1e-4)


# --- bytes ---------------------------------------------------------------------------------------


def state_of(cache):
    return cache.kv if isinstance(cache, PlainCache) else cache.tensors()


def allocated_bytes(cache):
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in state_of(cache)}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def wanted_bytes(kind, schedule):
    """Counted by hand: codes, 16-bit levels, and 16-bit scales and offsets."""
    if kind == "plain":
        return 2 * CONFIG.depth * ROWS * CONFIG.embed_dim * schedule.num_cached_tokens * 4
    format, nbits, dropped = KINDS[kind]
    bits = 0
    for h in range(H):
        for level in schedule.levels[:-1]:
            if level.index in dropped[h]:
                continue
            plain = level.index < format.plain_levels
            bits += level.num_tokens * (16 if plain else nbits[h])
            bits += 2 * 16 if format.dynamic else 0
    return 2 * CONFIG.depth * ROWS * CONFIG.head_dim * bits // 8


@RATIOS
@ALL
def test_bytes_are_those_allocated_and_the_last_level_is_never_stored(kind, aspect_ratio):
    schedule = Schedule.of(aspect_ratio, "0.06M")
    q, k, v = random_qkv(schedule)
    last = schedule.levels[-1]
    cache = new_cache(kind, schedule, k, v)
    assert cache.num_bytes == allocated_bytes(cache) == wanted_bytes(kind, schedule)
    cache.attend(0, schedule.levels, q, k, v)
    before = [tensor.clone() for tensor in state_of(cache)]
    now = slice(last.offset, last.end)
    cache.attend(0, (last,), *(9 * x[:, :, now] for x in (q, k, v)))
    # bytes, because uninitialised floats may be NaN
    assert all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(before, state_of(cache), strict=True)
        if a.numel()
    )
    assert cache.num_bytes == allocated_bytes(cache)


@pytest.mark.parametrize(
    ("model", "name", "most_gib"),
    [
        ("infinity-8b", "int8", 3.5),
        ("infinity-8b", "int4", 1.8),
        ("infinity-2b", "int8", 1.6),
        ("infinity-2b", "int4", 0.85),
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_real_shapes_stay_within_their_bars(model, name, most_gib, dynamic):
    """1024x1024 with guidance: codes and scales of 6425 positions in two rows."""
    config, nbits = MODELS[model].transformer, int(name[3:])
    ones = torch.ones(config.num_heads, config.head_dim)
    layer = whole_layer(
        None if dynamic else KVParams(ones, ones.int(), ones, ones.int()),
        nbits=nbits,
        num_heads=config.num_heads,
    )
    params = CacheParams(CacheFormat(name, dynamic, 0), (layer,) * config.depth)
    found = num_cache_bytes(params, config, Schedule.of(1.0, "1M"), rows=2)
    codes = 2 * 2 * 6425 * config.embed_dim * config.depth * nbits // 8
    scales = 2 * 2 * 2 * 2 * 12 * config.embed_dim * config.depth if dynamic else 0
    assert found == codes + scales <= most_gib * 2**30


# --- in the network ------------------------------------------------------------------------------


@pytest.mark.parametrize("patchify", [False, True])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["int8", "int4", "mixed-evicted", "int4-dynamic"])
def test_teacher_forcing_with_codes_equals_cached_generation(patchify, cfg, kind):
    pipeline = tiny_pipeline(patchify=patchify)
    format, nbits, dropped = KINDS[kind]
    # coarse enough to matter, and shifted, so that a forgotten zero point would show
    ranges = KVParams(
        torch.full((H, CONFIG.head_dim), 0.02),
        torch.full((H, CONFIG.head_dim), 7, dtype=torch.int32),
        torch.full((H, CONFIG.head_dim), 0.05),
        torch.full((H, CONFIG.head_dim), -11, dtype=torch.int32),
    )
    layer = LayerParams(nbits, dropped, None if format.dynamic else ranges)
    text = random_text((4, 7))
    plain = pipeline.generate(text, seed=0, sampling=Sampling(cfg=cfg, tau=1.0), with_trace=True)
    pipeline.kv_params = CacheParams(format, (layer,) * CONFIG.depth)
    run = pipeline.generate(
        text,
        seed=0,
        sampling=Sampling(cfg=cfg, tau=1.0),
        forced_bits=plain.trace.bits,
        with_trace=True,
    )
    if kind == "int8":
        assert plain.kv_bytes == 4 * run.kv_bytes
    at_once = pipeline.teacher_logits(text, run.trace.bits, cfg=cfg)
    for ours, cached in zip(at_once, run.trace.logits, strict=True):
        # products of other shapes round otherwise, which may move a value across a code's border,
        # and moves every scale that is found on the fly
        error = (ours - cached).abs() / cached.abs().max()
        assert (error <= (1e-4 if format.dynamic else 1e-5)).double().mean() >= 0.98
        assert error.max() <= (1e-3 if min(nbits) == 8 else 2e-2)
    changes = [
        float((ours - theirs).abs().max() / theirs.abs().max())
        for ours, theirs in zip(run.trace.logits, plain.trace.logits, strict=True)
    ]
    # nothing is cached at the first level
    assert changes[0] <= 1e-5 and max(changes[1:]) > 1e-4
