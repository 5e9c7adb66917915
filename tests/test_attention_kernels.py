"""Attention over codes against float64, and the caches' kernels against what they do without.

Shapes: R rows, H heads, Q queries, L cached and N current positions, D head channels.
"""

import subprocess
import sys

import pytest
import torch

from kernels import DEVICE

pytest.importorskip("triton")

from interpreter import true_bf16  # noqa: F401
from var_compressor.layers import kv_cache
from var_compressor.layers.kv_cache import CodedCache, PlainCache
from var_compressor.layers.kv_params import CacheFormat, CacheParams, KVParams, whole_layer
from var_compressor.models.config import InfinityConfig
from var_compressor.models.schedule import Level, Schedule, rotary_table
from var_compressor.models.transformer import SelfAttention, split_heads
from var_compressor.ops import reference
from var_compressor.ops.attention import Tiles, attend_codes, expand_codes
from var_compressor.ops.packing import unpack_int4

CODINGS = ["int8", "int4", "e4m3"]
# rows, heads, queries (which are the current positions), cached positions
SHAPES = [(1, 2, 1, 0), (4, 1, 7, 70), (1, 2, 33, 128), (2, 2, 64, 265)]
TILES = Tiles(m=16, n=64, num_warps=4, num_stages=2)


@pytest.fixture
def rng():
    return torch.Generator(DEVICE).manual_seed(11)


def some_codes(rng, shape, coding):
    bits = torch.randint(0, 256, shape, generator=rng, device=DEVICE).to(torch.uint8)
    if coding == "e4m3":
        return torch.where(bits & 0x7F == 0x7F, 0, bits).view(torch.float8_e4m3fn)
    return bits[..., : shape[-1] // 2].contiguous() if coding == "int4" else bits.view(torch.int8)


def cached_tokens(rng, R, H, L, D, coding):
    """Keys of about length one, values of about 1; every other channel is far from 0."""
    largest = {"int8": 128, "int4": 8, "e4m3": 448}[coding]
    room = [some_codes(rng, (R, H, L + 3, D), coding)[:, :, :L] for _ in range(2)]
    uneven_D = torch.rand(D, generator=rng, device=DEVICE) + 0.5
    scale = (uneven_D / largest).expand(1, H, 1, D).contiguous()
    offset = torch.zeros(1, H, 1, D, device=DEVICE)
    if coding != "e4m3":
        offset[..., ::2] = 3
    return reference.CodedTokens(
        *room, scale * D**-0.5, offset * D**-0.5, scale, offset.flip(-1).contiguous()
    )


def now(rng, R, H, L, D):
    """Queries, keys and values of a level, strided as the projection leaves them; bf16."""
    qkv = torch.randn(R, L, 3, H, D, generator=rng, device=DEVICE)
    qkv[:, :, :2] *= D**-0.5
    qkv[:, :, 0] *= 4
    return qkv.bfloat16().permute(2, 0, 3, 1, 4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("D", [64, 96, 128])
def test_attention_on_codes_equals_float64(rng, shape, coding, D):
    R, H, num_now, num_cached = shape
    cached = cached_tokens(rng, R, H, num_cached, D, coding)
    q, k, v = now(rng, R, H, num_now, D)
    wanted = reference.attend_codes(q.double(), [cached], k, v)
    found = attend_codes(q, cached, k, v, tiles=TILES)
    assert found.dtype == torch.bfloat16 and found.transpose(1, 2).is_contiguous()
    # bf16 has 8 bits: of the result, of each probability, and of q * scale
    error = (found.double() - wanted).abs()
    assert error.max() <= 2**-6 * wanted.abs().max()
    assert error.square().mean().sqrt() <= 2**-7 * wanted.square().mean().sqrt()


@pytest.mark.parametrize("tiles", [Tiles(32, 32, 4, 2), Tiles(64, 128, 4, 2)])
def test_tiles_do_not_matter(rng, tiles):
    cached = cached_tokens(rng, 1, 1, 150, 64, "int8")
    q, k, v = now(rng, 1, 1, 70, 64)
    wanted = attend_codes(q, cached, k, v, tiles=TILES).float()
    found = attend_codes(q, cached, k, v, tiles=tiles).float()
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=2**-8)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 64), (3, 2, 37, 96), (2, 1, 64, 128)])
def test_expanded_codes_are_what_they_stand_for(rng, coding, shape):
    R, H, L, D = shape
    cached = cached_tokens(rng, R, H, L, D, coding)
    room = torch.zeros(R, H, L + 2, D, dtype=torch.bfloat16, device=DEVICE)
    scale_HD, offset_HD = cached.v_scale[0, :, 0], cached.v_offset[0, :, 0]
    expand_codes(cached.v_codes, scale_HD, offset_HD, out_BHLD=room[:, :, 1 : L + 1])
    codes = unpack_int4(cached.v_codes) if coding == "int4" else cached.v_codes
    wanted = (codes.float() * cached.v_scale + cached.v_offset).bfloat16()
    # a fused multiply-add may end on the other side of a border
    torch.testing.assert_close(room[:, :, 1 : L + 1], wanted, rtol=2**-7, atol=0)
    assert not room[:, :, 0].any() and not room[:, :, L + 1].any()


# --- the caches -----------------------------------------------------------------------------------

CONFIG = InfinityConfig(depth=2, embed_dim=192, num_heads=3, num_chunks=1, bits_per_token=8)
_GRIDS = [(1, 1), (2, 2), (9, 9), (6, 7)]
_OFFSETS = [0, 1, 5, 86]
SCHEDULE = Schedule(
    tuple(
        Level(index, *grid, offset, is_last=index == 3)
        for index, (grid, offset) in enumerate(zip(_GRIDS, _OFFSETS, strict=True))
    ),
    1.0,
    "0.06M",
    (64, 64),
)
H, D, ROWS = CONFIG.num_heads, CONFIG.head_dim, 2


def random_levels(rng, dtype=torch.bfloat16):
    """Per level: the projection's output, with values far from 0, and its rotary table."""
    rope = rotary_table(SCHEDULE, D, DEVICE)
    for level in SCHEDULE.levels:
        qkv = torch.randn(ROWS, level.num_tokens, 3, H, D, generator=rng, device=DEVICE)
        qkv[:, :, 2] += torch.linspace(-9, 9, D, device=DEVICE)
        yield level, qkv.flatten(2).to(dtype), rope[:, level.offset : level.end]


def coded_params(name, *, plain_levels=0):
    """Static ranges that hold unit keys, and these values."""
    nbits = 4 if name == "int4" else 8
    largest = 448 if name == "fp8" else 2 ** (nbits - 1)
    k_scale = torch.full((H, D), 0.6 / largest)
    v_scale = torch.full((H, D), 14 / largest if name == "fp8" else 5 / largest)
    v_zero = torch.zeros(H, D)
    if name != "fp8":
        v_zero = (-torch.linspace(-9, 9, D) / v_scale).round()
    ranges = KVParams(k_scale, torch.zeros(H, D).int(), v_scale, v_zero.int())
    layer = whole_layer(ranges, nbits=nbits, num_heads=H)
    params = CacheParams(CacheFormat(name, False, plain_levels), (layer,) * CONFIG.depth)
    return params.to(DEVICE)


def new_cache(kind, **options):
    if kind == "plain":
        return PlainCache(CONFIG, SCHEDULE, rows=ROWS, dtype=torch.bfloat16, device=DEVICE)
    return CodedCache(CONFIG, SCHEDULE, coded_params(kind, **options), rows=ROWS, device=DEVICE)


def state_of(cache):
    """As bytes, which can be compared where floats were never set."""
    tensors = cache.kv if isinstance(cache, PlainCache) else cache.tensors()
    return [tensor.view(torch.uint8) for tensor in tensors if tensor.numel()]


@pytest.fixture
def with_kernels(monkeypatch):
    """Room for one head at the last level, and for all at the first ones."""
    monkeypatch.setattr(kv_cache, "uses_kernels", lambda device, dtype: True)
    bytes_of_a_head = 2 * 2 * ROWS * SCHEDULE.num_tokens * D
    monkeypatch.setattr(kv_cache, "SCRATCH_BYTES", 2 * bytes_of_a_head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "int8"])
def test_without_kernels_attend_qkv_is_the_networks_attention(rng, monkeypatch, kind, dtype):
    monkeypatch.setattr(kv_cache, "uses_kernels", lambda device, dtype: False)
    if kind == "plain":
        caches = [
            PlainCache(CONFIG, SCHEDULE, rows=ROWS, dtype=dtype, device=DEVICE) for _ in range(2)
        ]
    else:
        caches = [new_cache(kind) for _ in range(2)]
    attention = SelfAttention(CONFIG).to(DEVICE)
    torch.nn.init.normal_(attention.q_log_scale, mean=2, std=2)
    q_scale_H = attention.q_log_scale.detach().clamp(max=4.6051702).exp().flatten()
    for level, qkv, rope in random_levels(rng, dtype):
        with torch.no_grad():
            wanted = caches[0].attend(1, (level,), *attention.heads(qkv, rope))
        found = caches[1].attend_qkv(1, level, qkv, q_scale_H, rope)
        assert torch.equal(found, wanted.transpose(1, 2).flatten(2))
        assert found.is_contiguous()
    assert caches[1].scratch_bytes == 0


@pytest.mark.parametrize(
    ("kind", "route"),
    [
        ("plain", None),
        *((kind, r) for kind in ("int8", "int4", "fp8") for r in ("codes", "expand")),
    ],
)
def test_kernels_of_a_cache_do_what_it_does_without(rng, with_kernels, kind, route):
    fast, slow = new_cache(kind), new_cache(kind)
    slow.scratch = None
    if route:
        fast.route = route
    q_scale_H = torch.tensor([1.0, 4.0, 30.0], device=DEVICE)
    for level, qkv, rope in random_levels(rng):
        wanted, found = (
            cache.attend_qkv(1, level, qkv, q_scale_H, rope).float() for cache in (slow, fast)
        )
        assert found.shape == wanted.shape == (ROWS, level.num_tokens, CONFIG.embed_dim)
        error = (found - wanted).abs()
        # logits up to 30, whose keys or queries are rounded to 8 bits
        assert error.max() <= 0.3 and error.square().mean().sqrt() <= 0.02
    assert fast.num_bytes == slow.num_bytes
    assert fast.scratch_bytes == 2 * 2 * 2 * ROWS * SCHEDULE.num_tokens * D


@pytest.mark.parametrize("kind", ["plain", "int8", "int4", "fp8"])
def test_kernels_store_what_is_stored_without(rng, with_kernels, kind):
    caches = [new_cache(kind) for _ in range(3)]
    caches[2].scratch = None
    if kind != "plain":
        caches[0].route, caches[1].route = "codes", "expand"
    for cache in caches:
        for bytes in state_of(cache):
            bytes.zero_()
    q_scale_H = torch.ones(H, device=DEVICE)
    for level, qkv, rope in random_levels(rng):
        before = [bytes.clone() for bytes in state_of(caches[0])]
        for cache in caches:
            cache.attend_qkv(0, level, qkv, q_scale_H, rope)
    for a, b, c in zip(*map(state_of, caches), strict=True):
        assert (a == b).all()
        # a key on the border of two bf16 values may fall to either side
        assert (a != c).float().mean() <= 1e-3
    # the last level is never stored
    for a, b in zip(state_of(caches[0]), before, strict=True):
        assert (a == b).all()


def test_other_formats_go_without_kernels(rng, with_kernels):
    fast, slow = new_cache("int8", plain_levels=2), new_cache("int8", plain_levels=2)
    q_scale_H = torch.ones(H, device=DEVICE)
    for level, qkv, rope in random_levels(rng):
        found = fast.attend_qkv(0, level, qkv, q_scale_H, rope)
        heads = split_heads(qkv, q_scale_H, rope)
        assert torch.equal(found, slow.attend(0, (level,), *heads).transpose(1, 2).flatten(2))
    assert fast.scratch_bytes == 0


# --- for GPUs that are not here -------------------------------------------------------------------

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from var_compressor.ops import attention, qkv

FLOATS = {f"{x}_{y}_ptr": "*fp32" for x in ("k", "v") for y in ("scale", "offset")}
FLOATS |= dict.fromkeys(("q_scale_ptr", "rope_ptr", "scale_ptr", "offset_ptr"), "*fp32")
INTS = {"k_zero_point_ptr": "*i32", "v_zero_point_ptr": "*i32"}
CODES = ("codes_ptr", "k_codes_ptr", "v_codes_ptr")

def check(kernel, values, codes, constants, capability, warps, stages):
    names = kernel.arg_names
    known = FLOATS | INTS | dict.fromkeys(CODES, codes) | dict.fromkeys(constants, "constexpr")
    kinds = {n: known.get(n, values if n.endswith("_ptr") else "i32") for n in names}
    aligned = [n for n in names if n.endswith(("_ptr", "_row", "_head", "_token", "_part"))]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    constants = {(names.index(n),): value for n, value in constants.items()}
    triton.compile(
        ASTSource(kernel, kinds, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )

for capability in (80, 90):
    for coding, codes in ((4, "*u8"), (8, "*i16"), (9, "*i16")):
        sizes = {"D": 128, "HALF": 64, "CODING": coding}
        check(qkv._normalize_rotate, "*bf16", codes,
              sizes | {"KEEPS_V": True, "BLOCK_L": 16}, capability, 4, 3)
        check(attention._expand_codes, "*i32", codes, sizes | {"BLOCK_L": 32}, capability, 4, 3)
    t = attention.tiles_for(4096, 64, divmod(capability, 10))
    # one query and one key: triton takes an argument of 1 as a constant
    for one in ({}, {"num_queries": 1, "num_now": 1}):
        check(attention._attend_codes, "*i32", "*i16",
              {"D": 64, "HALF": 32, "CODING": 8, "BLOCK_M": t.m, "BLOCK_N": t.n} | one,
              capability, t.num_warps, t.num_stages)
    check(qkv._normalize_rotate, "*bf16", "*i16", {"D": 64, "HALF": 32, "CODING": 8,
          "KEEPS_V": False, "BLOCK_L": 1, "L": 1}, capability, 4, 3)
"""


def test_kernels_compile_for_ampere_and_hopper():
    # another process, because this one may have made them to be interpreted
    command = f"import os; os.environ.pop('TRITON_INTERPRET', None)\n{COMPILE}"
    run = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
