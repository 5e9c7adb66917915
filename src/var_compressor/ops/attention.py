"""Attention over a cache of codes as a Triton kernel, and codes expanded into a scratch.

Shapes: B batch rows, H heads, Q queries, L cached positions, N current positions, D head channels.

Channels travel in pairs (`qkv.pairs`): one element of memory holds an even and an odd channel of
any coding. Even and odd channels have their own products and accumulators, so that nothing is ever
shuffled: logits = q_even . k_even + q_odd . k_odd. Codes become bf16 in registers, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .qkv import BF16, INT4, INT8, pairs
from .reference import CodedTokens

_TOKENS_PER_PROGRAM = 32


@dataclass(frozen=True)
class Tiles:
    """Queries and positions of a step, and how many warps and loads ahead work on it."""

    m: int
    n: int
    num_warps: int
    num_stages: int


def tiles_for(num_queries: int, head_dim: int, capability: tuple[int, int]) -> Tiles:
    """Tiles that suit a level: few queries are spread over many programs."""
    if num_queries <= 16:
        return Tiles(16, 64, 4, 2)
    if capability < (9, 0):
        return Tiles(64, 32 if head_dim > 64 else 64, 4, 2)
    return Tiles(64, 64, 4, 3) if num_queries <= 512 else Tiles(128, 64, 8, 3)


def attend_codes(
    q_BHQD: Tensor, cached: CodedTokens, k_now_BHND: Tensor, v_now_BHND: Tensor, *, tiles: Tiles
) -> Tensor:
    """`reference.attend_codes` with one set of static scales; softmax scale 1.

    q, k_now, v_now: bf16, any strides but channels side by side. Scales and offsets float32
    ``[1, H, 1, D]``. Returns o_BHQD in bf16, laid out as ``[B, Q, H, D]``. The key scale is folded
    into q in float32, and rounded with it to bf16 once; the probabilities are rounded to bf16.
    """
    B, H, Q, D = q_BHQD.shape
    o_BQHD = torch.empty(B, Q, H, D, dtype=q_BHQD.dtype, device=q_BHQD.device)
    k_codes, coding = pairs(cached.k_codes)
    strided: list[object] = []
    o_BHQD = o_BQHD.transpose(1, 2)
    in_pairs = (pairs(x)[0] for x in (q_BHQD, cached.v_codes, k_now_BHND, v_now_BHND, o_BHQD))
    for x in (k_codes, *in_pairs):
        strided += [x, *x.stride()[:3]]
    ranges = (cached.k_scale, cached.k_offset, cached.v_scale, cached.v_offset)
    assert all(x.shape == (1, H, 1, D) and x.is_contiguous() for x in ranges)
    _attend_codes[(triton.cdiv(Q, tiles.m), H, B)](
        *strided, *ranges, Q, k_codes.shape[2], k_now_BHND.shape[2],
        D=D,
        HALF=max(16, triton.next_power_of_2(D // 2)),
        CODING=coding,
        BLOCK_M=tiles.m,
        BLOCK_N=tiles.n,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )  # fmt: skip
    return o_BHQD


def expand_codes(
    codes_BHLD: Tensor, scale_HD: Tensor, offset_HD: Tensor, *, out_BHLD: Tensor
) -> None:
    """Write code * scale + offset in bf16; float32 ``[H, D]`` scales and offsets, contiguous.

    codes: as in `reference.CodedTokens`; out: bf16, any strides but channels side by side.
    """
    B, H, L, D = out_BHLD.shape
    if not L:
        return
    codes, coding = pairs(codes_BHLD)
    out, _ = pairs(out_BHLD)
    assert scale_HD.is_contiguous() and offset_HD.is_contiguous()
    _expand_codes[(triton.cdiv(L, _TOKENS_PER_PROGRAM), H, B)](
        codes, *codes.stride()[:3], out, *out.stride()[:3], scale_HD, offset_HD, L,
        D=D,
        HALF=triton.next_power_of_2(D // 2),
        CODING=coding,
        BLOCK_L=_TOKENS_PER_PROGRAM,
        num_warps=4,
    )  # fmt: skip


@triton.jit
def _signed(bits, NBITS: tl.constexpr):
    """The lowest bits in two's complement as float32, without a conversion, which is slow."""
    # floats count in ones from 2^23 on; flipping the sign bit adds half of the range
    half: tl.constexpr = 2 ** (NBITS - 1)
    lifted = (bits & (2 * half - 1)) ^ (0x4B000000 + half)
    return lifted.to(tl.float32, bitcast=True) - (8388608.0 + half)


@triton.jit
def _e4m3(bits):
    # the same fields in other places; the exponents' biases are 120 apart
    moved = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
    return moved.to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def _decoded(both, CODING: tl.constexpr):
    """Even and odd channels of pairs of codes, float32."""
    if CODING == INT4:
        bits = both.to(tl.uint32)
        return _signed(bits, 4), _signed(bits >> 4, 4)
    else:
        bits = both.to(tl.uint16, bitcast=True).to(tl.uint32)
        if CODING == INT8:
            return _signed(bits, 8), _signed(bits >> 8, 8)
        else:
            return _e4m3(bits), _e4m3(bits >> 8)


@triton.jit
def _halves(both, CODING: tl.constexpr):
    """Even and odd channels of pairs, as bf16; exact."""
    if CODING == BF16:
        bits = both.to(tl.uint32, bitcast=True)
        even, odd = (bits & 0xFFFF).to(tl.uint16), (bits >> 16).to(tl.uint16)
        return even.to(tl.bfloat16, bitcast=True), odd.to(tl.bfloat16, bitcast=True)
    else:
        even, odd = _decoded(both, CODING)
        return even.to(tl.bfloat16), odd.to(tl.bfloat16)


@triton.jit
def _joined(even, odd):
    """Pairs of bf16 from float32 halves."""
    even = even.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
    odd = odd.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
    return (even | (odd << 16)).to(tl.int32, bitcast=True)


@triton.jit
def _load_pairs(ptr, position, stride, end, pair, D: tl.constexpr, MASKED: tl.constexpr):
    """A tile [positions, pairs]; 0 beyond the channels, and beyond the positions if masked."""
    ptrs = ptr + position[:, None] * stride + pair[None, :]
    if MASKED:
        inside = (position < end)[:, None] & (pair < D // 2)[None, :]
        return tl.load(ptrs, mask=inside, other=0)
    elif pair.shape[0] * 2 == D:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=(pair < D // 2)[None, :], other=0)


@triton.jit
def _absorb(
    state_even, state_odd, total, top, q_even, q_odd, factor, shift,
    k_ptr, k_stride, v_ptr, v_stride, start, end,
    D: tl.constexpr, HALF: tl.constexpr, CODING: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """One step of online softmax in base 2: logits = (q . k) * factor + shift."""
    position = start + tl.arange(0, BLOCK_N)
    pair = tl.arange(0, HALF)
    k = _load_pairs(k_ptr, position, k_stride, end, pair, D, MASKED)
    k_even, k_odd = _halves(k, CODING)
    logits = tl.dot(q_even, tl.trans(k_even))
    logits = tl.dot(q_odd, tl.trans(k_odd), logits)
    logits = logits * factor + shift[:, None]
    if MASKED:
        logits = tl.where((position < end)[None, :], logits, float("-inf"))
    higher = tl.maximum(top, tl.max(logits, axis=1))
    fade = tl.exp2(top - higher)
    probs = tl.exp2(logits - higher[:, None])
    total = total * fade + tl.sum(probs, axis=1)
    probs = probs.to(tl.bfloat16)
    v = _load_pairs(v_ptr, position, v_stride, end, pair, D, MASKED)
    v_even, v_odd = _halves(v, CODING)
    state_even = tl.dot(probs, v_even, state_even * fade[:, None])
    state_odd = tl.dot(probs, v_odd, state_odd * fade[:, None])
    return state_even, state_odd, total, higher


@triton.jit
def _absorb_all(
    state_even, state_odd, total, top, q_even, q_odd, factor, shift,
    k_ptr, k_stride, v_ptr, v_stride, end,
    D: tl.constexpr, HALF: tl.constexpr, CODING: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    whole = (end // BLOCK_N) * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        state_even, state_odd, total, top = _absorb(
            state_even, state_odd, total, top, q_even, q_odd, factor, shift,
            k_ptr, k_stride, v_ptr, v_stride, start, end, D, HALF, CODING, BLOCK_N, False,
        )  # fmt: skip
    if whole < end:
        state_even, state_odd, total, top = _absorb(
            state_even, state_odd, total, top, q_even, q_odd, factor, shift,
            k_ptr, k_stride, v_ptr, v_stride, whole, end, D, HALF, CODING, BLOCK_N, True,
        )  # fmt: skip
    return state_even, state_odd, total, top


@triton.jit
def _range_halves(ptr, head, pair, D: tl.constexpr):
    """Even and odd channels of a head's scales or offsets, float32."""
    ptrs, inside = ptr + head * D + 2 * pair, pair < D // 2
    return tl.load(ptrs, mask=inside, other=0.0), tl.load(ptrs + 1, mask=inside, other=0.0)


@triton.jit
def _attend_codes(
    k_codes_ptr, k_codes_row, k_codes_head, k_codes_token,
    q_ptr, q_row, q_head, q_token,
    v_codes_ptr, v_codes_row, v_codes_head, v_codes_token,
    k_ptr, k_row, k_head, k_token,
    v_ptr, v_row, v_head, v_token,
    o_ptr, o_row, o_head, o_token,
    k_scale_ptr, k_offset_ptr, v_scale_ptr, v_offset_ptr,
    num_queries, num_cached, num_now,
    D: tl.constexpr, HALF: tl.constexpr, CODING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    LOG2_E: tl.constexpr = 1.4426950408889634
    query = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    pair = tl.arange(0, HALF)
    q = _load_pairs(q_ptr + row * q_row + head * q_head, query, q_token, num_queries, pair, D, True)
    q_even, q_odd = _halves(q, BF16)
    state_even = tl.zeros((BLOCK_M, HALF), tl.float32)
    state_odd = tl.zeros((BLOCK_M, HALF), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)

    scale_even, scale_odd = _range_halves(k_scale_ptr, head, pair, D)
    offset_even, offset_odd = _range_halves(k_offset_ptr, head, pair, D)
    wide_even, wide_odd = q_even.to(tl.float32) * LOG2_E, q_odd.to(tl.float32) * LOG2_E
    shift = tl.sum(wide_even * offset_even[None, :] + wide_odd * offset_odd[None, :], axis=1)
    state_even, state_odd, total, top = _absorb_all(
        state_even, state_odd, total, top,
        (wide_even * scale_even[None, :]).to(tl.bfloat16),
        (wide_odd * scale_odd[None, :]).to(tl.bfloat16), 1.0, shift,
        k_codes_ptr + row * k_codes_row + head * k_codes_head, k_codes_token,
        v_codes_ptr + row * v_codes_row + head * v_codes_head, v_codes_token,
        num_cached, D, HALF, CODING, BLOCK_N,
    )  # fmt: skip
    # what the codes stand for, once; from here on the state is in units of the values
    scale_even, scale_odd = _range_halves(v_scale_ptr, head, pair, D)
    offset_even, offset_odd = _range_halves(v_offset_ptr, head, pair, D)
    state_even = state_even * scale_even[None, :] + total[:, None] * offset_even[None, :]
    state_odd = state_odd * scale_odd[None, :] + total[:, None] * offset_odd[None, :]

    state_even, state_odd, total, top = _absorb_all(
        state_even, state_odd, total, top, q_even, q_odd, LOG2_E, tl.zeros_like(shift),
        k_ptr + row * k_row + head * k_head, k_token,
        v_ptr + row * v_row + head * v_head, v_token,
        num_now, D, HALF, BF16, BLOCK_N,
    )  # fmt: skip
    both = _joined(state_even / total[:, None], state_odd / total[:, None])
    o = o_ptr + row * o_row + head * o_head + query[:, None] * o_token + pair[None, :]
    tl.store(o, both, mask=(query < num_queries)[:, None] & (pair < D // 2)[None, :])


@triton.jit
def _expand_codes(
    codes_ptr, codes_row, codes_head, codes_token,
    out_ptr, out_row, out_head, out_token,
    scale_ptr, offset_ptr, L,
    D: tl.constexpr, HALF: tl.constexpr, CODING: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    pair = tl.arange(0, HALF)
    both = _load_pairs(
        codes_ptr + row * codes_row + head * codes_head, token, codes_token, L, pair, D, True
    )
    even, odd = _decoded(both, CODING)
    scale_even, scale_odd = _range_halves(scale_ptr, head, pair, D)
    offset_even, offset_odd = _range_halves(offset_ptr, head, pair, D)
    even = even * scale_even[None, :] + offset_even[None, :]
    odd = odd * scale_odd[None, :] + offset_odd[None, :]
    out = out_ptr + row * out_row + head * out_head + token[:, None] * out_token + pair[None, :]
    tl.store(out, _joined(even, odd), mask=(token < L)[:, None] & (pair < D // 2)[None, :])
