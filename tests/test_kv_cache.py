"""KV caches: all levels at once equals one by one, bytes are true, parameters are checked.

Shapes: R rows, H heads, L tokens, D head_dim.
"""

from __future__ import annotations

import math

import pytest
import torch

from tiny import random_text, tiny_config, tiny_pipeline
from var_compressor.layers.kv_cache import (
    Int8Cache,
    KVParams,
    PlainCache,
    params_from_tensors,
    params_to_tensors,
)
from var_compressor.models.sampling import Sampling
from var_compressor.models.schedule import Schedule
from var_compressor.quant.kv import calibrate_channels

CONFIG = tiny_config().transformer
ROWS = 3
RATIOS = pytest.mark.parametrize("aspect_ratio", [1.0, 0.5])


def random_qkv(schedule, *, seed=0, dtype=torch.float32):
    """Keys of length one and values with channels of very different ranges, as the network has."""
    rng = torch.Generator().manual_seed(seed)
    shape = (ROWS, CONFIG.num_heads, schedule.num_tokens, CONFIG.head_dim)
    q, k, v = (torch.randn(shape, generator=rng) for _ in range(3))
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    v = v * torch.logspace(-1, 1, CONFIG.head_dim) + torch.linspace(-5, 5, CONFIG.head_dim)
    return (4 * q).to(dtype), k.to(dtype), v.to(dtype)


def found_params(k, v):
    """Parameters calibrated on these very keys and values, for every layer."""
    ranges = [calibrate_channels(x.float().transpose(0, 1).flatten(1, 2), nbits=8) for x in (k, v)]
    one = KVParams(*(t for r in ranges for t in (r.scale_HD, r.zero_point_HD)))
    return (one,) * CONFIG.depth


def new_cache(kind, schedule, params, *, rows=ROWS, dtype=torch.float32):
    if kind == "int8":
        return Int8Cache(CONFIG, schedule, params, rows=rows, device="cpu")
    return PlainCache(CONFIG, schedule, rows=rows, dtype=dtype, device="cpu")


def level_by_level(cache, schedule, q, k, v, layer=0):
    parts = []
    for level in schedule.levels:
        now = slice(level.offset, level.end)
        # a copy each, because generation never has the other levels in memory
        parts.append(cache.attend(layer, (level,), *(x[:, :, now].clone() for x in (q, k, v))))
    return torch.cat(parts, dim=2)


@RATIOS
@pytest.mark.parametrize("kind", ["plain", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_levels_at_once_equal_one_by_one_bit_for_bit(kind, aspect_ratio, dtype):
    schedule = Schedule.of(aspect_ratio, "0.06M")
    q, k, v = random_qkv(schedule, dtype=dtype)
    params = found_params(k, v)
    caches = [new_cache(kind, schedule, params, dtype=dtype) for _ in range(2)]
    one_by_one = level_by_level(caches[0], schedule, q, k, v, layer=1)
    at_once = caches[1].attend(1, schedule.levels, q, k, v)
    assert at_once.dtype == dtype
    assert torch.equal(one_by_one, at_once)


@RATIOS
def test_int8_attention_equals_float64_on_what_the_codes_stand_for(aspect_ratio):
    schedule = Schedule.of(aspect_ratio, "0.06M")
    q, k, v = random_qkv(schedule)
    params = found_params(k, v)
    got = new_cache("int8", schedule, params).attend(0, schedule.levels, q, k, v)

    def stored(x, scale_HD, zero_point_HD):
        scale, zero = scale_HD[:, None], zero_point_HD[:, None]
        codes = (x / scale + zero).round().clamp(-128, 127)
        return (codes.double() - zero) * scale.double()

    one = params[0]
    past_k = stored(k, one.k_scale_HD, one.k_zero_point_HD)
    past_v = stored(v, one.v_scale_HD, one.v_zero_point_HD)
    for level in schedule.levels:
        now = slice(level.offset, level.end)
        keys, values = (
            torch.cat([past[:, :, : level.offset], x[:, :, now].double()], dim=2)
            for past, x in ((past_k, k), (past_v, v))
        )
        wanted = (q[:, :, now].double() @ keys.mT).softmax(-1) @ values
        assert (got[:, :, now] - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@RATIOS
def test_int8_is_close_to_the_plain_cache(aspect_ratio):
    schedule = Schedule.of(aspect_ratio, "0.06M")
    q, k, v = random_qkv(schedule)
    params = found_params(k, v)
    wanted, got = (
        new_cache(kind, schedule, params).attend(0, schedule.levels, q, k, v).double()
        for kind in ("plain", "int8")
    )
    noise = (wanted - got)[:, :, 1:].square().mean(dim=(0, 2))
    signal = wanted[:, :, 1:].square().mean(dim=(0, 2))
    # of every channel, whatever its range; averaging over keys adds to the 40 dB of the codes
    assert (10 * torch.log10(signal / noise)).min() >= 42
    # the first level has nothing cached to read
    first = schedule.levels[0].end
    assert torch.allclose(wanted[:, :, :first], got[:, :, :first], atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "int8"])
def test_rows_are_independent(kind):
    schedule = Schedule.of(1.0, "0.06M")
    q, k, v = random_qkv(schedule)
    params = found_params(k, v)
    together = new_cache(kind, schedule, params).attend(0, schedule.levels, q, k, v)
    for row in range(ROWS):
        own = (x[row : row + 1] for x in (q, k, v))
        alone = new_cache(kind, schedule, params, rows=1).attend(0, schedule.levels, *own)
        assert (together[row : row + 1] - alone).abs().max() <= 1e-5 * alone.abs().max()


def allocated_bytes(cache):
    tensors = cache.kv if isinstance(cache, PlainCache) else cache.codes
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


@RATIOS
def test_the_last_level_is_never_stored_and_bytes_are_those_allocated(aspect_ratio):
    schedule = Schedule.of(aspect_ratio, "0.06M")
    q, k, v = random_qkv(schedule)
    params = found_params(k, v)
    last = schedule.levels[-1]
    num_values = (
        2 * CONFIG.depth * ROWS * CONFIG.embed_dim * (schedule.num_tokens - last.num_tokens)
    )
    for kind, dtype, item_bytes in (
        ("plain", torch.float32, 4),
        ("plain", torch.bfloat16, 2),
        ("int8", torch.float32, 1),
    ):
        cache = new_cache(kind, schedule, params, dtype=dtype)
        assert cache.num_bytes == allocated_bytes(cache) == num_values * item_bytes
        parts = [x.to(dtype) for x in (q, k, v)]
        cache.attend(0, schedule.levels, *parts)
        state = (cache.kv if kind == "plain" else cache.codes)[0]
        before = state.clone()
        now = slice(last.offset, last.end)
        cache.attend(0, (last,), *(9 * x[:, :, now] for x in parts))
        assert torch.equal(before, state)
        assert cache.num_bytes == allocated_bytes(cache)


@pytest.mark.parametrize("kind", ["plain", "int8"])
def test_a_layer_reads_only_its_own_state(kind):
    schedule = Schedule.of(1.0, "0.06M")
    q, k, v = random_qkv(schedule)
    params = found_params(k, v)
    cache = new_cache(kind, schedule, params)
    wanted = level_by_level(cache, schedule, q, k, v, layer=0)
    mixed = new_cache(kind, schedule, params)
    for level in schedule.levels:
        now = slice(level.offset, level.end)
        own = [x[:, :, now] for x in (q, k, v)]
        got = mixed.attend(0, (level,), *own)
        mixed.attend(2, (level,), *(5 * x for x in own))
        assert torch.allclose(got, wanted[:, :, now], atol=1e-5)


@pytest.mark.parametrize("patchify", [False, True])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_teacher_forcing_with_codes_equals_cached_generation(patchify, cfg):
    pipeline = tiny_pipeline(patchify=patchify)
    heads, dim = CONFIG.num_heads, CONFIG.head_dim
    # coarse enough to matter, and shifted, so that a forgotten zero point would show
    one = KVParams(
        torch.full((heads, dim), 0.02),
        torch.full((heads, dim), 7, dtype=torch.int32),
        torch.full((heads, dim), 0.05),
        torch.full((heads, dim), -11, dtype=torch.int32),
    )
    text = random_text((4, 7))
    plain = pipeline.generate(text, seed=0, sampling=Sampling(cfg=cfg, tau=1.0), with_trace=True)
    pipeline.kv_params = (one,) * CONFIG.depth
    run = pipeline.generate(
        text,
        seed=0,
        sampling=Sampling(cfg=cfg, tau=1.0),
        forced_bits=plain.trace.bits,
        with_trace=True,
    )
    assert plain.kv_bytes == 4 * run.kv_bytes
    at_once = pipeline.teacher_logits(text, run.trace.bits, cfg=cfg)
    for ours, cached in zip(at_once, run.trace.logits, strict=True):
        # products of other shapes round otherwise, which may move a value across a code's border
        error = (ours - cached).abs() / cached.abs().max()
        assert (error <= 1e-5).double().mean() >= 0.98 and error.max() <= 1e-3
    changes = [
        float((ours - theirs).abs().max() / theirs.abs().max())
        for ours, theirs in zip(run.trace.logits, plain.trace.logits, strict=True)
    ]
    # nothing is cached at the first level
    assert changes[0] <= 1e-5 and max(changes[1:]) > 1e-3


# --- parameters ----------------------------------------------------------------------------------


def good_tensors():
    return params_to_tensors(found_params(*random_qkv(Schedule.of(1.0, "0.06M"))[1:]))


def test_parameters_come_back_as_they_were():
    params = found_params(*random_qkv(Schedule.of(1.0, "0.06M"))[1:])
    back = params_from_tensors(params_to_tensors(params), CONFIG, "x")
    assert len(back) == CONFIG.depth
    for ours, theirs in zip(params, back, strict=True):
        assert all(torch.equal(value, vars(theirs)[name]) for name, value in vars(ours).items())


def broken(name, change):
    tensors = good_tensors()
    tensors[name] = change(tensors[name].clone())
    return tensors


def put(value):
    def change(tensor):
        tensor[1, 3] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("002.v_scale_HD", put(math.nan), "layer 2 v_scale_HD holds values that are not finite"),
        ("000.k_scale_HD", put(0.0), "layer 0 k_scale_HD holds values that are not finite and pos"),
        ("001.k_scale_HD", put(-1.0), "layer 1 k_scale_HD holds values"),
        ("001.k_scale_HD", put(math.inf), "layer 1 k_scale_HD holds values"),
        (
            "001.v_scale_HD",
            lambda t: t[:, :-1],
            r"layer 1 v_scale_HD is \[2, 31\], expected \[2, 32",
        ),
        ("001.v_scale_HD", lambda t: t[0, 0], r"layer 1 v_scale_HD is \[\]"),
        (
            "001.k_scale_HD",
            lambda t: torch.zeros_like(t).int(),
            "layer 1 k_scale_HD is torch.int32",
        ),
        ("001.k_scale_HD", lambda t: t.double(), "layer 1 k_scale_HD is torch.float64"),
        ("002.k_zero_point_HD", lambda t: t.float(), "layer 2 k_zero_point_HD is torch.float32"),
    ],
)
def test_parameters_that_cannot_be_are_refused_by_layer(name, change, message):
    with pytest.raises(ValueError, match=f"^here: {message}"):
        params_from_tensors(broken(name, change), CONFIG, "here")


def test_missing_and_foreign_parameters_are_named():
    tensors = good_tensors()
    del tensors["001.v_zero_point_HD"]
    with pytest.raises(ValueError, match="layer 1 v_zero_point_HD is nothing"):
        params_from_tensors(tensors, CONFIG, "here")
    # as many tensors as there should be, but not those
    with pytest.raises(ValueError, match=r"holds 003\.k_scale_HD, which a model of 3 layers"):
        params_from_tensors(tensors | {"003.k_scale_HD": torch.ones(2, 32)}, CONFIG, "here")
