"""From a qkv projection's output to what attention reads and a cache keeps, in one Triton pass.

Shapes: R rows, L tokens, H heads, D channels of a head.

Two neighbouring channels are a *pair*: they turn together, and their codes lie side by side in
memory, whatever the coding. Codes equal `primitives.quantize_affine` of the values as they are
stored, the even channel in the lower bits (`packing.join_nibbles`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# what holds two channels side by side
INT4 = tl.constexpr(4)
INT8 = tl.constexpr(8)
E4M3 = tl.constexpr(9)
BF16 = tl.constexpr(16)
NO_CODES = tl.constexpr(0)

_CODINGS = {
    torch.uint8: (INT4, torch.uint8),
    torch.int8: (INT8, torch.int16),
    torch.float8_e4m3fn: (E4M3, torch.int16),
    torch.bfloat16: (BF16, torch.int32),
}
_TOKENS_PER_PROGRAM = 16


@dataclass(frozen=True)
class CodesOut:
    """Where the codes of keys and values go, and by which calibrated ranges.

    Codes: int8 or e4m3 ``[R, H, L, D]``, or uint8 ``[R, H, L, D/2]``, two int4 codes a byte; views
    of a cache. Scales float32 and zero points int32, ``[H, D]``; e4m3 codes ignore zero points.
    """

    k_codes: Tensor
    v_codes: Tensor
    k_scale_HD: Tensor
    k_zero_point_HD: Tensor
    v_scale_HD: Tensor
    v_zero_point_HD: Tensor


def pairs(x: Tensor) -> tuple[Tensor, int]:
    """Codes or bf16 values with two channels an element, and what coding they are."""
    coding, dtype = _CODINGS[x.dtype]
    return x.view(dtype), coding.value


def normalize_rotate(
    qkv_RL3HD: Tensor,
    q_scale_H: Tensor,
    rope_2LD: Tensor,
    *,
    k_out_RHLD: Tensor,
    v_out_RHLD: Tensor | None,
    codes: CodesOut | None,
) -> Tensor:
    """q and k as unit vectors, q times its scale, both rotated; k, v and their codes in place.

    qkv_RL3HD: bf16, fp16 or float32, a view of the projection's output with any heads. q_scale_H:
    float32. rope_2LD: float32 ``[2, L, D/2]`` of these tokens. k_out, v_out: views in qkv's dtype
    that take the keys, and the values unless None. Returns q ``[R, H, L, D]`` in qkv's dtype, laid
    out as ``[R, L, H, D]``. Arithmetic in float32, as in `SelfAttention.heads`.
    """
    R, L, _, H, D = qkv_RL3HD.shape
    q_RLHD = torch.empty(R, L, H, D, dtype=qkv_RL3HD.dtype, device=qkv_RL3HD.device)
    q_RHLD = q_RLHD.transpose(1, 2)
    v_view = k_out_RHLD if v_out_RHLD is None else v_out_RHLD
    floats = (qkv_RL3HD, q_RHLD, k_out_RHLD, v_view)
    assert all(x.stride(-1) == 1 and x.dtype == qkv_RL3HD.dtype for x in floats)
    assert rope_2LD.stride()[1:] == (D // 2, 1)
    coding, arguments = _codes_arguments(codes, unused=q_RHLD)
    block = min(_TOKENS_PER_PROGRAM, triton.next_power_of_2(L))
    _normalize_rotate[(triton.cdiv(L, block), H, R)](
        qkv_RL3HD, *qkv_RL3HD.stride()[:4],
        q_scale_H, rope_2LD, rope_2LD.stride(0),
        q_RHLD, *q_RHLD.stride()[:3],
        k_out_RHLD, *k_out_RHLD.stride()[:3],
        v_view, *v_view.stride()[:3],
        *arguments,
        L,
        D=D,
        HALF=triton.next_power_of_2(D // 2),
        KEEPS_V=v_out_RHLD is not None,
        CODING=coding,
        BLOCK_L=block,
        num_warps=4,
    )  # fmt: skip
    return q_RHLD


def _codes_arguments(codes: CodesOut | None, unused: Tensor) -> tuple[int, tuple[object, ...]]:
    """The coding, then pointers and strides of both codes and pointers of their ranges."""
    if codes is None:
        return NO_CODES.value, (unused, 0, 0, 0, unused, unused) * 2
    found: list[object] = []
    for stored, scale_HD, zero_point_HD in (
        (codes.k_codes, codes.k_scale_HD, codes.k_zero_point_HD),
        (codes.v_codes, codes.v_scale_HD, codes.v_zero_point_HD),
    ):
        assert scale_HD.is_contiguous() and zero_point_HD.is_contiguous()
        in_pairs, coding = pairs(stored)
        found += [in_pairs, *in_pairs.stride()[:3], scale_HD, zero_point_HD]
    return coding, tuple(found)


@triton.jit
def _load_halves(ptr, token, stride, L, D: tl.constexpr, HALF: tl.constexpr):
    """Even and odd channels of a block of tokens, float32, from one coalesced load."""
    d = tl.arange(0, 2 * HALF)
    inside = (token < L)[:, None] & (d < D)[None, :]
    x = tl.load(ptr + token[:, None] * stride + d[None, :], mask=inside, other=0.0)
    x = tl.reshape(x.to(tl.float32), (token.shape[0], HALF, 2))
    return tl.split(x)


@triton.jit
def _store_halves(even, odd, ptr, token, stride, L, D: tl.constexpr, HALF: tl.constexpr):
    d = tl.arange(0, 2 * HALF)
    inside = (token < L)[:, None] & (d < D)[None, :]
    values = tl.interleave(even, odd)
    tl.store(ptr + token[:, None] * stride + d[None, :], values, mask=inside)


@triton.jit
def _unit_rotated(even, odd, factor, cos, sin):
    """Pairs of a vector divided by its length, times a factor, turned by their angles."""
    norm = tl.sqrt_rn(tl.sum(even * even + odd * odd, axis=1))
    # the smallest length that F.normalize divides by
    norm = tl.broadcast_to(tl.maximum(norm, 1e-12)[:, None], even.shape)
    even, odd = tl.div_rn(even, norm) * factor, tl.div_rn(odd, norm) * factor
    return cos * even - sin * odd, sin * even + cos * odd


@triton.jit
def _e4m3_bits(x):
    """Nearest e4m3 value, ties to even, of |x| <= 448; by hand, because sm80 has no such type."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    rounded = magnitude + 0x7FFFF + ((magnitude >> 20) & 1)
    normal = (rounded >> 20) - (120 << 3)
    # below 2^-6 steps are 2^-9: the sum's last place
    small = tl.abs(x) + 24576.0 - 24576.0
    subnormal = (small * 512.0).to(tl.uint32)
    code = tl.where(tl.abs(x) < 0.015625, subnormal, normal)
    return (code | ((bits >> 24) & 0x80)) & 0xFF


@triton.jit
def _encode(x, scale, zero_point, CODING: tl.constexpr):
    """The codes of a tile in the lowest bits of uint32."""
    y = tl.div_rn(x, tl.broadcast_to(scale[None, :], x.shape))
    if CODING == E4M3:
        return _e4m3_bits(tl.minimum(tl.maximum(y, -448.0), 448.0))
    y += zero_point.to(tl.float32)[None, :]
    limit: tl.constexpr = 2 ** (CODING - 1)
    y = tl.minimum(tl.maximum(y, -limit), limit - 1)
    # the sum rounds to an integer as the hardware rounds, half to even
    codes = ((y + 12582912.0) - 12582912.0).to(tl.int32)
    return codes.to(tl.uint32, bitcast=True) & (2**CODING - 1)


@triton.jit
def _append(
    even, odd, codes_ptr, codes_stride, scale_ptr, zero_point_ptr, token, L,
    D: tl.constexpr, HALF: tl.constexpr, CODING: tl.constexpr,
):  # fmt: skip
    pair = tl.arange(0, HALF)
    is_pair = pair < D // 2
    scales, zero_points = scale_ptr + 2 * pair, zero_point_ptr + 2 * pair
    even = _encode(
        even, tl.load(scales, mask=is_pair, other=1.0),
        tl.load(zero_points, mask=is_pair, other=0), CODING,
    )  # fmt: skip
    odd = _encode(
        odd, tl.load(scales + 1, mask=is_pair, other=1.0),
        tl.load(zero_points + 1, mask=is_pair, other=0), CODING,
    )  # fmt: skip
    nbits: tl.constexpr = 4 if CODING == INT4 else 8
    both = (even | (odd << nbits)).to(codes_ptr.dtype.element_ty)
    inside = (token < L)[:, None] & is_pair[None, :]
    tl.store(codes_ptr + token[:, None] * codes_stride + pair[None, :], both, mask=inside)


@triton.jit
def _normalize_rotate(
    qkv_ptr, qkv_row, qkv_token, qkv_part, qkv_head,
    q_scale_ptr, rope_ptr, rope_part,
    q_ptr, q_row, q_head, q_token,
    k_ptr, k_row, k_head, k_token,
    v_ptr, v_row, v_head, v_token,
    k_codes_ptr, k_codes_row, k_codes_head, k_codes_token, k_scale_ptr, k_zero_point_ptr,
    v_codes_ptr, v_codes_row, v_codes_head, v_codes_token, v_scale_ptr, v_zero_point_ptr,
    L,
    D: tl.constexpr, HALF: tl.constexpr, KEEPS_V: tl.constexpr, CODING: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    pair = tl.arange(0, HALF)
    inside = (token < L)[:, None] & (pair < D // 2)[None, :]
    angle = rope_ptr + token[:, None] * (D // 2) + pair[None, :]
    cos = tl.load(angle, mask=inside, other=0.0)
    sin = tl.load(angle + rope_part, mask=inside, other=0.0)
    own = qkv_ptr + row * qkv_row + head * qkv_head

    even, odd = _load_halves(own, token, qkv_token, L, D, HALF)
    even, odd = _unit_rotated(even, odd, tl.load(q_scale_ptr + head), cos, sin)
    q_own = q_ptr + row * q_row + head * q_head
    _store_halves(even.to(dtype), odd.to(dtype), q_own, token, q_token, L, D, HALF)

    even, odd = _load_halves(own + qkv_part, token, qkv_token, L, D, HALF)
    even, odd = _unit_rotated(even, odd, 1.0, cos, sin)
    even, odd = even.to(dtype), odd.to(dtype)
    k_own = k_ptr + row * k_row + head * k_head
    _store_halves(even, odd, k_own, token, k_token, L, D, HALF)
    if CODING != NO_CODES:
        _append(
            even.to(tl.float32), odd.to(tl.float32),
            k_codes_ptr + row * k_codes_row + head * k_codes_head, k_codes_token,
            k_scale_ptr + head * D, k_zero_point_ptr + head * D, token, L, D, HALF, CODING,
        )  # fmt: skip

    if KEEPS_V or CODING != NO_CODES:
        even, odd = _load_halves(own + 2 * qkv_part, token, qkv_token, L, D, HALF)
        if KEEPS_V:
            v_own = v_ptr + row * v_row + head * v_head
            _store_halves(even.to(dtype), odd.to(dtype), v_own, token, v_token, L, D, HALF)
        if CODING != NO_CODES:
            _append(
                even, odd,
                v_codes_ptr + row * v_codes_row + head * v_codes_head, v_codes_token,
                v_scale_ptr + head * D, v_zero_point_ptr + head * D, token, L, D, HALF, CODING,
            )  # fmt: skip
