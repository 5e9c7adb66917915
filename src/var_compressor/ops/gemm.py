"""Products with 4-bit weights as Triton kernels, the low-rank branch and the bias in the epilogue.

Shapes: M tokens, K input and N output channels, G groups of E = K/G channels, R rank, J = K/2.

Weights lie in *tile order* (`packing.to_tile_order`): byte j of a group holds channels j and
j + E/2, so that a tile of bytes unpacks into two tiles of neighbouring channels without shuffling.

The integers are exact: a group's dot is summed in int32, or of e4m3 codes, whose sum over 64
channels (at most 15 * 7 * 64 < 2^13) the tensor cores hold without rounding. Sums over groups are
float32 in ascending order, starting from low up^T + bias, as in `reference.gemm_w4a4`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """How a kernel cuts its work, how deep it loads ahead, and whether by Hopper's copy engine.

    ``splits`` of the input channels are summed by programs of their own, and then added in
    ascending order by a second kernel: for so few tokens that there are too few programs.
    """

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int
    tma: bool = False
    splits: int = 1


def gemm_groups(
    codes_MK: Tensor,
    xscales_GM: Tensor,
    weight: Tensor,
    wscales_GN: Tensor,
    low_MR: Tensor | None,
    up_NR: Tensor | None,
    bias_N: Tensor | None,
    *,
    tiles: Tiles,
    dtype: torch.dtype,
) -> Tensor:
    """Exact W4A4 (a scale per group) or W4A8 (a scale per token, xscales ``[1, M]``): ``[M, N]``.

    codes_MK: int8 with weight uint8 ``[N, J]`` in tile order, or codes and weight as e4m3
    ``[M, K]`` and ``[N, K]``. wscales_GN: bf16 or float32.
    """
    M, K = codes_MK.shape
    N, G = len(weight), len(wscales_GN)
    packed = weight.dtype == torch.uint8
    y_MN = torch.empty(M, N, dtype=dtype, device=codes_MK.device)
    x, w = (codes_MK, weight) if packed else _operands(codes_MK, weight, tiles, K // G)
    _gemm_groups[(triton.cdiv(M, tiles.m) * triton.cdiv(N, tiles.n),)](
        x, xscales_GM, w, wscales_GN, *_epilogue(y_MN, low_MR, up_NR, bias_N), y_MN,
        M, N, K, 0 if len(xscales_GM) == 1 else M,
        GROUP=K // G,
        PACKED=packed,
        TMA=tiles.tma and not packed,
        RANK=0 if low_MR is None else low_MR.shape[1],
        HAS_BIAS=bias_N is not None,
        BLOCK_M=tiles.m,
        BLOCK_N=tiles.n,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )  # fmt: skip
    return y_MN


def gemm_rows(
    codes_MK: Tensor,
    xscales_M: Tensor,
    weight_NK: Tensor,
    wscales_N: Tensor,
    bias_N: Tensor | None,
    *,
    tiles: Tiles,
    dtype: torch.dtype,
) -> Tensor:
    """e4m3 times e4m3 with a scale per token and per output channel: ``[M, N]``."""
    M, K = codes_MK.shape
    N = len(weight_NK)
    y_MN = torch.empty(M, N, dtype=dtype, device=codes_MK.device)
    x, w = _operands(codes_MK, weight_NK, tiles, tiles.k)
    depth, splits = _depth(K, tiles)
    parts = y_MN if splits == 1 else torch.empty(splits, M, N, device=y_MN.device)
    bias = y_MN if bias_N is None else bias_N
    _gemm_rows[(triton.cdiv(M, tiles.m) * triton.cdiv(N, tiles.n), splits)](
        x, xscales_M, w, wscales_N, bias, parts,
        M, N, K, depth,
        TMA=tiles.tma,
        EVEN_K=K % tiles.k == 0,
        HAS_BIAS=bias_N is not None and splits == 1,
        BLOCK_M=tiles.m,
        BLOCK_N=tiles.n,
        BLOCK_K=tiles.k,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )  # fmt: skip
    if splits > 1:
        _add_splits(parts, y_MN, None, None, bias_N)
    return y_MN


def gemm_w4a16(
    x_MK: Tensor,
    qweight_NJ: Tensor,
    wscales_GN: Tensor,
    low_MR: Tensor | None,
    up_NR: Tensor | None,
    bias_N: Tensor | None,
    *,
    tiles: Tiles,
    dtype: torch.dtype,
) -> Tensor:
    """16-bit inputs times 4-bit weights, unpacked in registers, a group's scale on its dot.

    ``tiles.k`` is not used: a group at a time.
    """
    M, K = x_MK.shape
    N, G = len(qweight_NJ), len(wscales_GN)
    group = K // G
    y_MN = torch.empty(M, N, dtype=dtype, device=x_MK.device)
    depth, splits = _depth(K, replace(tiles, k=group))
    parts = y_MN if splits == 1 else torch.empty(splits, M, N, device=x_MK.device)
    _gemm_w4a16[(triton.cdiv(M, tiles.m) * triton.cdiv(N, tiles.n), splits)](
        x_MK, qweight_NJ, wscales_GN, *_epilogue(y_MN, low_MR, up_NR, bias_N), parts,
        M, N, K, depth // group,
        GROUP=group,
        RANK=0 if low_MR is None else low_MR.shape[1],
        HAS_BIAS=bias_N is not None,
        IS_SPLIT=splits > 1,
        BLOCK_M=tiles.m,
        BLOCK_N=tiles.n,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )  # fmt: skip
    if splits > 1:
        _add_splits(parts, y_MN, low_MR, up_NR, bias_N)
    return y_MN


def _depth(K: int, tiles: Tiles) -> tuple[int, int]:
    """Channels per program, whole tiles of them, and into how many parts that splits K."""
    depth = triton.cdiv(triton.cdiv(K, tiles.splits), tiles.k) * tiles.k
    return depth, triton.cdiv(K, depth)


def _add_splits(
    parts_SMN: Tensor,
    y_MN: Tensor,
    low_MR: Tensor | None,
    up_NR: Tensor | None,
    bias_N: Tensor | None,
) -> None:
    """y = low up^T + bias + the parts, in ascending order."""
    splits, M, N = parts_SMN.shape
    _sum_splits[(triton.cdiv(M, 16), triton.cdiv(N, 64))](
        parts_SMN, *_epilogue(y_MN, low_MR, up_NR, bias_N), y_MN,
        M, N,
        SPLITS=splits,
        RANK=0 if low_MR is None else low_MR.shape[1],
        HAS_BIAS=bias_N is not None,
        BLOCK_M=16,
        BLOCK_N=64,
        num_warps=2,
    )  # fmt: skip


def expand_codes(qweight_NJ: Tensor, *, group_size: int, out_NK: Tensor) -> Tensor:
    """4-bit codes as e4m3, which holds them exactly; natural channel order."""
    return _launch_expand(qweight_NJ, group_size, out_NK)


def merge_weight(
    qweight_NJ: Tensor,
    wscales_GN: Tensor,
    down_RK: Tensor | None,
    up_NR: Tensor | None,
    row_scales_N: Tensor | None,
    *,
    out_NK: Tensor,
) -> Tensor:
    """The whole weight as it acts on smoothed inputs, branch and all; natural channel order.

    out_NK = (code * wscale + up down) / row scale. With row scales, which bring it into the range
    of e4m3, code * wscale is rounded to float16 and up / row scale to bf16, far below the rounding
    of e4m3; without, everything is float32 until it is rounded to out_NK's 16 bits.
    """
    group_size = 2 * qweight_NJ.shape[1] // len(wscales_GN)
    return _launch_expand(qweight_NJ, group_size, out_NK, wscales_GN, down_RK, up_NR, row_scales_N)


def _launch_expand(
    qweight_NJ: Tensor,
    group_size: int,
    out_NK: Tensor,
    wscales_GN: Tensor | None = None,
    down_RK: Tensor | None = None,
    up_NR: Tensor | None = None,
    row_scales_N: Tensor | None = None,
) -> Tensor:
    N, K = out_NK.shape
    rows, groups = 64, 14
    optional = (wscales_GN, down_RK, up_NR, row_scales_N)
    rank = 0 if down_RK is None else len(down_RK)
    _expand_weight[(triton.cdiv(N, rows), triton.cdiv(K // group_size, groups))](
        qweight_NJ, *(out_NK if one is None else one for one in optional), out_NK,
        N, K,
        HALF=group_size // 2,
        IS_MERGED=wscales_GN is not None,
        HAS_ROW_SCALES=row_scales_N is not None,
        RANK=rank,
        PADDED_RANK=max(16, triton.next_power_of_2(rank)),
        BLOCK_N=rows,
        GROUPS=groups,
        num_warps=4,
        num_stages=3,
    )  # fmt: skip
    return out_NK


def _operands(x_MK: Tensor, w_NK: Tensor, tiles: Tiles, depth: int) -> tuple[Any, Any]:
    """Both sides as the kernels read them: pointers, or descriptors of tiles ``depth`` deep."""
    if not tiles.tma:
        return x_MK, w_NK
    from triton.tools.tensor_descriptor import TensorDescriptor

    return (
        TensorDescriptor.from_tensor(x_MK, [tiles.m, depth]),
        TensorDescriptor.from_tensor(w_NK, [tiles.n, depth]),
    )


def _epilogue(
    y_MN: Tensor, low_MR: Tensor | None, up_NR: Tensor | None, bias_N: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        y_MN if low_MR is None else low_MR,
        y_MN if up_NR is None else up_NR,
        y_MN if bias_N is None else bias_N,
    )


@triton.jit
def _tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where this program's tile starts: bands of 8 tiles of tokens, so that weights stay in L2."""
    BAND: tl.constexpr = 8
    pid = tl.program_id(0)
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = (pid // (BAND * num_n)) * BAND
    height = tl.minimum(num_m - first, BAND)
    inner = pid % (BAND * num_n)
    return (first + inner % height) * BLOCK_M, (inner // height) * BLOCK_N


@triton.jit
def _add_branch(
    acc, low_ptr, up_ptr, bias_ptr, m, n, M, N, RANK: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """acc + low up^T + bias of a tile, in the same registers."""
    if RANK > 0:
        for start in tl.static_range(0, RANK, 16):
            r = start + tl.arange(0, 16)
            low = tl.load(
                low_ptr + m[:, None] * RANK + r[None, :],
                mask=(m < M)[:, None] & (r < RANK)[None, :],
                other=0.0,
            )
            up = tl.load(
                up_ptr + n[None, :] * RANK + r[:, None],
                mask=(n < N)[None, :] & (r < RANK)[:, None],
                other=0.0,
            )
            # tf32 holds every bf16 exactly
            acc = tl.dot(low.to(tl.float32), up.to(tl.float32), acc, input_precision="tf32")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _gemm_groups(
    x_ptr, xscales_ptr, w_ptr, wscales_ptr, low_ptr, up_ptr, bias_ptr, y_ptr,
    M, N, K, xscales_stride,
    GROUP: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr,
    RANK: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first_m, first_n = _tile(M, N, BLOCK_M, BLOCK_N)
    m = first_m.to(tl.int64) + tl.arange(0, BLOCK_M)
    n = first_n.to(tl.int64) + tl.arange(0, BLOCK_N)
    is_m, is_n = m < M, n < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = _add_branch(acc, low_ptr, up_ptr, bias_ptr, m, n, M, N, RANK, HAS_BIAS)
    # wrapped instead of masked: tiles past the edge compute what nobody stores
    m_in, n_in = m % M, n % N
    for g in range(0, K // GROUP):
        if PACKED:
            HALF: tl.constexpr = GROUP // 2
            j = tl.arange(0, HALF)
            packed = tl.load(w_ptr + n_in[None, :] * (K // 2) + (g * HALF + j)[:, None])
            first = tl.load(x_ptr + m_in[:, None] * K + (g * GROUP + j)[None, :])
            second = tl.load(x_ptr + m_in[:, None] * K + (g * GROUP + HALF + j)[None, :])
            signed = packed.to(tl.int8, bitcast=True)
            dots = tl.dot(first, (signed << 4) >> 4, out_dtype=tl.int32)
            dots = tl.dot(second, signed >> 4, dots, out_dtype=tl.int32).to(tl.float32)
        elif TMA:
            x = x_ptr.load([first_m, g * GROUP])
            w = w_ptr.load([first_n, g * GROUP])
            dots = tl.dot(x, tl.trans(w))
        else:
            k = g * GROUP + tl.arange(0, GROUP)
            x = tl.load(x_ptr + m_in[:, None] * K + k[None, :])
            w = tl.load(w_ptr + n_in[None, :] * K + k[:, None])
            dots = tl.dot(x, w)
        # loaded here and not before: earlier, their registers cost a third of the speed on Hopper
        xscale = tl.load(xscales_ptr + g * xscales_stride + m_in)
        wscale = tl.load(wscales_ptr + g * N + n_in).to(tl.float32)
        acc += (dots * xscale[:, None]) * wscale[None, :]
    y = y_ptr + m[:, None] * N + n[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=is_m[:, None] & is_n[None, :])


@triton.jit
def _gemm_rows(
    x_ptr, xscales_ptr, w_ptr, wscales_ptr, bias_ptr, y_ptr,
    M, N, K, channels_per_split,
    TMA: tl.constexpr, EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first_m, first_n = _tile(M, N, BLOCK_M, BLOCK_N)
    m = first_m.to(tl.int64) + tl.arange(0, BLOCK_M)
    n = first_n.to(tl.int64) + tl.arange(0, BLOCK_N)
    is_m, is_n = m < M, n < N
    m_in, n_in = m % M, n % N
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    split = tl.program_id(1)
    first_k = split * channels_per_split
    for start in range(first_k, tl.minimum(first_k + channels_per_split, K), BLOCK_K):
        if TMA:
            x = x_ptr.load([first_m, start])
            w = tl.trans(w_ptr.load([first_n, start]))
        elif EVEN_K:
            x = tl.load(x_ptr + m_in[:, None] * K + (start + k)[None, :])
            w = tl.load(w_ptr + n_in[None, :] * K + (start + k)[:, None])
        else:
            inside = start + k < K
            x = tl.load(
                x_ptr + m_in[:, None] * K + (start + k)[None, :], mask=inside[None, :], other=0.0
            )
            w = tl.load(
                w_ptr + n_in[None, :] * K + (start + k)[:, None], mask=inside[:, None], other=0.0
            )
        total = tl.dot(x, w, total)
    xscale = tl.load(xscales_ptr + m_in)
    wscale = tl.load(wscales_ptr + n_in).to(tl.float32)
    acc = total * xscale[:, None] * wscale[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=is_n, other=0.0).to(tl.float32)[None, :]
    y = y_ptr + split.to(tl.int64) * M * N + m[:, None] * N + n[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=is_m[:, None] & is_n[None, :])


@triton.jit
def _nibbles(packed, DTYPE: tl.constexpr):
    """Signed codes of the low and high nibbles, exact in 16-bit floats, by bits alone.

    A nibble with its sign bit flipped is the code + 8; as the last bits of 128 (bf16) or 1024
    (fp16) it adds to that number.
    """
    flipped = packed.to(tl.int16) ^ 0x88
    if tl.bfloat16 == DTYPE:
        first = ((flipped & 0xF) | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0
        second = (((flipped >> 4) & 0xF) | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0
    else:
        first = ((flipped & 0xF) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
        second = (((flipped >> 4) & 0xF) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
    return first.to(DTYPE), second.to(DTYPE)


@triton.jit
def _gemm_w4a16(
    x_ptr, w_ptr, wscales_ptr, low_ptr, up_ptr, bias_ptr, y_ptr,
    M, N, K, groups_per_split,
    GROUP: tl.constexpr, RANK: tl.constexpr, HAS_BIAS: tl.constexpr, IS_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first_m, first_n = _tile(M, N, BLOCK_M, BLOCK_N)
    m = first_m.to(tl.int64) + tl.arange(0, BLOCK_M)
    n = first_n.to(tl.int64) + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    is_m, is_n = m < M, n < N
    m_in, n_in = m % M, n % N
    HALF: tl.constexpr = GROUP // 2
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    j = tl.arange(0, HALF)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first_group = split * groups_per_split
    for g in range(first_group, tl.minimum(first_group + groups_per_split, K // GROUP)):
        packed = tl.load(w_ptr + n_in[None, :] * (K // 2) + (g * HALF + j)[:, None])
        x_ptrs = x_ptr + m_in[:, None] * K + (g * GROUP + j)[None, :]
        first, second = _nibbles(packed, DTYPE)
        dots = tl.dot(tl.load(x_ptrs), first)
        dots = tl.dot(tl.load(x_ptrs + HALF), second, dots)
        wscale = tl.load(wscales_ptr + g * N + n_in).to(tl.float32)
        acc += dots * wscale[None, :]
    y = y_ptr + m[:, None] * N + n[None, :]
    if IS_SPLIT:
        y += split.to(tl.int64) * M * N
    else:
        acc = _add_branch(acc, low_ptr, up_ptr, bias_ptr, m, n, M, N, RANK, HAS_BIAS)
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=is_m[:, None] & is_n[None, :])


@triton.jit
def _sum_splits(
    parts_ptr, low_ptr, up_ptr, bias_ptr, y_ptr,
    M, N,
    SPLITS: tl.constexpr, RANK: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (m < M)[:, None] & (n < N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = _add_branch(acc, low_ptr, up_ptr, bias_ptr, m, n, M, N, RANK, HAS_BIAS)
    for split in tl.static_range(SPLITS):
        part = parts_ptr + split * M * N + m[:, None] * N + n[None, :]
        acc += tl.load(part, mask=inside, other=0.0)
    y = y_ptr + m[:, None] * N + n[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _expand_weight(
    w_ptr, wscales_ptr, down_ptr, up_ptr, row_scales_ptr, out_ptr,
    N, K,
    HALF: tl.constexpr, IS_MERGED: tl.constexpr, HAS_ROW_SCALES: tl.constexpr,
    RANK: tl.constexpr, PADDED_RANK: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_n = (n < N)[:, None]
    n_in = n % N
    h = tl.arange(0, HALF)[None, :]
    r = tl.arange(0, PADDED_RANK)
    is_rank = (r < RANK)[:, None]
    w_rows = w_ptr + n_in[:, None] * (K // 2) + h
    out_rows = out_ptr + n[:, None] * K + h
    down_rows = down_ptr + r[:, None] * K + h
    if HAS_ROW_SCALES:
        per_row = 1.0 / tl.load(row_scales_ptr + n_in)
    if RANK > 0:
        up = tl.load(
            up_ptr + n_in[:, None] * RANK + r[None, :], mask=(r < RANK)[None, :], other=0.0
        )
        if HAS_ROW_SCALES:
            up = (up.to(tl.float32) * per_row[:, None]).to(up_ptr.dtype.element_ty)
    first = tl.program_id(1) * GROUPS
    for g in range(first, tl.minimum(first + GROUPS, K // (2 * HALF))):
        lower, upper = _nibbles(tl.load(w_rows + g * HALF), tl.float16)
        if IS_MERGED:
            wscale = tl.load(wscales_ptr + g * N + n_in).to(tl.float32)
            if HAS_ROW_SCALES:
                # two products in every instruction, where the range is known
                wscale = (wscale * per_row).to(tl.float16)
            lower = (lower * wscale[:, None]).to(tl.float32)
            upper = (upper * wscale[:, None]).to(tl.float32)
            if RANK > 0:
                down = down_rows + 2 * HALF * g
                lower = tl.dot(up, tl.load(down, mask=is_rank, other=0.0), lower)
                upper = tl.dot(up, tl.load(down + HALF, mask=is_rank, other=0.0), upper)
        out = out_rows + 2 * HALF * g
        tl.store(out, lower.to(out_ptr.dtype.element_ty), mask=is_n)
        tl.store(out + HALF, upper.to(out_ptr.dtype.element_ty), mask=is_n)


# --- settings -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GPU:
    """What tiles depend on."""

    capability: tuple[int, int]
    num_processors: int


def tiles_for(
    op: Literal["rows", "groups", "w4a16"], x_MK: Tensor, weight: Tensor, gpu: GPU
) -> Tiles:
    """A kernel's tiles by GPU and shape: the fastest of benchmarks/ops.py --sweep on an H100, and
    for older GPUs some that fit their shared memory."""
    M, K = x_MK.shape
    N = len(weight)
    is_hopper = gpu.capability[0] == 9
    if op == "w4a16":
        m = 16 if M <= 16 else 32 if M <= 32 else 64
        n = 128 if N * K >= 2**25 and m < 64 else 64
        return Tiles(m, n, 0, 4, 5, splits=triton.cdiv(K, 1024 if N * K >= 2**24 else 512))
    if op == "groups":
        if weight.dtype == torch.uint8:
            return Tiles(128, 64, 64, 4, 4) if M > 64 else Tiles(64, 64, 64, 4, 4)
        return Tiles(64, 128, 64, 4, 5, tma=is_hopper)
    if not is_hopper:
        return Tiles(128, 128, 64, 4, 3)
    if triton.cdiv(M, 128) * triton.cdiv(N, 256) >= gpu.num_processors:
        return Tiles(128, 256, 128, 8, 4, tma=True)
    small = Tiles(64 if M <= 64 else 128, 128, 128, 4, 4, tma=True)
    num_programs = triton.cdiv(M, small.m) * triton.cdiv(N, small.n)
    return replace(small, splits=max(1, min(8, gpu.num_processors // num_programs, K // 512)))
