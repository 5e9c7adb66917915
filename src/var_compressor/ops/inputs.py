"""What a linear reads, made in one pass by Triton: norm, GELU, smoothing, codes, low rank.

An input is taken from where the network left it to where a matrix product wants it:

    source    x as it is; gelu(x); AdaLN of the residual stream, after an update of it is added
    x_hat     (source + shift) / smooth
    codes     x_hat in the format of the product, with a scale per group or per token
    low       x_hat down^T; of the unquantized x_hat where codes have 4 bits, else of the codes

Shapes: M tokens (R rows of L), K channels, G groups, N = rank of the branch.

Codes of 4 bits are those of `reference.quantize_act` where the source has the same value. Those of
8 bits may differ by a unit where a quotient lies on the edge between two: they are made by fast
divisions, on the way of a whole row through registers. Norms and GELU agree to float32 rounding
before their result is rounded to the dtype that the network runs in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PLAIN, GELU, NORM = 0, 1, 2
# what x_hat becomes: 16 bits without and with smoothing, or codes
UNSMOOTHED, SMOOTHED, INT_GROUPS, INT8_TOKEN, FP8_TOKEN = 0, 1, 2, 3, 4


@dataclass(frozen=True)
class Coding:
    """How a product wants its input.

    ``kind`` one of the constants above; ``group_size`` channels per scale of INT_GROUPS, with codes
    ``lowest..highest`` stored as int8, or as e4m3 where ``as_fp8`` (which holds them exactly);
    ``shift`` is added to them before smoothing.
    """

    kind: int
    group_size: int = 0
    lowest: int = -7
    highest: int = 7
    as_fp8: bool = False
    shift: float = 0.0


@dataclass(frozen=True)
class CodedInput:
    """An input ready to be multiplied.

    ``values_MK`` int8 or e4m3 codes, or 16-bit floats; ``xscales_GM`` float32, G = 1 for a scale
    per token, None for floats; ``low_MN`` bf16 or None.
    """

    values_MK: Tensor
    xscales_GM: Tensor | None
    low_MN: Tensor | None


@dataclass(frozen=True)
class Norm:
    """AdaLN of the residual stream: ``layer_norm(x) * gain + bias``, gain and bias ``[R or 1, K]``.

    ``update_MK`` times ``update_gain_RK`` (None: 1) is added to the stream first, in place.
    """

    gain_RK: Tensor
    bias_RK: Tensor
    update_MK: Tensor | None = None
    update_gain_RK: Tensor | None = None


def prepare(
    x_MK: Tensor,
    coding: Coding,
    *,
    smooth_K: Tensor | None,
    down_NK: Tensor | None,
    inverse_smooth_K: Tensor | None = None,
    source: int | Norm = PLAIN,
    tokens_per_row: int = 1,
    dtype: torch.dtype,
) -> CodedInput:
    """The input of a linear from its source, in one kernel.

    x_MK: 16 or 32 bit floats, or with a `Norm` the float32 residual stream (updated in place).
    smooth_K float32 and down_NK bf16 belong to the linear; down_NK None where the weight holds the
    branch. Codes of 4 bits are divided by smooth_K, which is exact; everything else is multiplied
    by inverse_smooth_K, which is fast, and taken from smooth_K where it is None.
    dtype: what the network runs in, which the source is rounded to before smoothing.
    """
    M, K = x_MK.shape
    assert x_MK.stride(1) == 1 and K % 16 == 0, (x_MK.shape, x_MK.stride())
    assert coding.kind == INT_GROUPS or not coding.shift, "only codes in groups are shifted"
    device = x_MK.device
    rank = 0 if down_NK is None else len(down_NK)
    values_MK = torch.empty(M, K, dtype=_dtype(coding, dtype), device=device)
    num_groups = K // coding.group_size if coding.kind == INT_GROUPS else 1
    has_scales = coding.kind >= INT_GROUPS
    xscales_GM = torch.empty(num_groups, M, device=device) if has_scales else None
    low_MN = torch.empty(M, rank, dtype=torch.bfloat16, device=device) if rank else None
    norm = source if isinstance(source, Norm) else None
    if coding.kind != INT_GROUPS and smooth_K is not None:
        smooth_K = 1 / smooth_K if inverse_smooth_K is None else inverse_smooth_K
    tensors = (
        x_MK,
        x_MK.stride(0),
        *_norm_arguments(norm, x_MK),
        x_MK if smooth_K is None else smooth_K,
        values_MK,
        values_MK if xscales_GM is None else xscales_GM,
    )
    switches = {
        "SOURCE": NORM if norm else source,
        "HAS_UPDATE": norm is not None and norm.update_MK is not None,
        "HAS_UPDATE_GAIN": norm is not None and norm.update_gain_RK is not None,
        "ROUND_TO": _TRITON[dtype],
    }
    if coding.kind == INT_GROUPS:
        _launch_groups(tensors, coding, down_NK, low_MN, tokens_per_row, switches)
        return CodedInput(values_MK, xscales_GM, low_MN)
    block = triton.next_power_of_2(K)
    _prepare_rows[(M,)](
        *tensors, K, tokens_per_row,
        IS_SMOOTHED=smooth_K is not None,
        CODING=coding.kind,
        IS_NATIVE=not triton.knobs.runtime.interpret,
        BLOCK_K=block,
        # a norm waits for two sums over the row, the others compute more per channel
        num_warps=max(1, min(16, block // 256) if norm else min(8, block // 512)),
        **switches,
    )  # fmt: skip
    if low_MN is not None:
        assert down_NK is not None
        _project(values_MK, xscales_GM, down_NK, low_MN)
    return CodedInput(values_MK, xscales_GM, low_MN)


def _launch_groups(
    tensors: tuple[Any, ...],
    coding: Coding,
    down_NK: Tensor | None,
    low_MN: Tensor | None,
    tokens_per_row: int,
    switches: dict[str, Any],
) -> None:
    x_MK = tensors[0]
    M, K = x_MK.shape
    rank = 0 if down_NK is None else len(down_NK)
    few = M < 1024
    block_m = 1 if few else 16
    block_k = max(coding.group_size, min(1024, triton.next_power_of_2(K)) if few else 128)
    num_rows = triton.cdiv(M, tokens_per_row)
    _prepare_groups[(num_rows, triton.cdiv(tokens_per_row, block_m))](
        *tensors,
        x_MK if down_NK is None else down_NK,
        x_MK if low_MN is None else low_MN,
        M, K, tokens_per_row, coding.shift,
        GROUP=coding.group_size,
        LOWEST=coding.lowest,
        HIGHEST=coding.highest,
        RANK=rank,
        PADDED_RANK=max(16, triton.next_power_of_2(rank)),
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        SHIFTED=coding.shift != 0,
        IS_NATIVE=not triton.knobs.runtime.interpret,
        num_warps=8 if few else 4,
        **switches,
    )  # fmt: skip


def _project(values_MK: Tensor, xscales_GM: Tensor | None, down_NK: Tensor, low_MN: Tensor) -> None:
    """low = values * xscale times down^T: by dots for many tokens, else rank by rank."""
    M, K = values_MK.shape
    rank = len(down_NK)
    arguments = (values_MK, values_MK if xscales_GM is None else xscales_GM, down_NK, low_MN, M, K)
    if M <= 128:
        _project_few[(M, rank)](
            *arguments, rank, HAS_SCALES=xscales_GM is not None,
            BLOCK_K=min(4096, triton.next_power_of_2(K)), num_warps=4,
        )  # fmt: skip
        return
    # few tokens make few programs: their channels are split, and the parts added by a second kernel
    block_m, splits = (16, max(1, min(8, K // 512))) if M < 2048 else (32, 1)
    parts_SMN = low_MN
    if splits > 1:
        parts_SMN = torch.empty(splits, M, rank, dtype=torch.float32, device=low_MN.device)
    block_k = 128
    _project_many[(triton.cdiv(M, block_m), splits)](
        *arguments[:3],
        parts_SMN,
        *arguments[4:],
        triton.cdiv(triton.cdiv(K, splits), block_k) * block_k,
        RANK=rank,
        PADDED_RANK=max(16, triton.next_power_of_2(rank)),
        HAS_SCALES=xscales_GM is not None,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=4,
    )
    if splits > 1:
        block = 1024
        _add_parts[(triton.cdiv(M * rank, block),)](
            parts_SMN, low_MN, M * rank, SPLITS=splits, BLOCK=block, num_warps=4
        )


def add_update(x_MK: Tensor, norm: Norm, *, tokens_per_row: int) -> None:
    """Add a norm's update to the residual stream in place, and no more."""
    M, K = x_MK.shape
    assert norm.update_MK is not None
    block = 1024
    _add_update[(M, triton.cdiv(K, block))](
        x_MK,
        x_MK.stride(0),
        *_norm_arguments(norm, x_MK),
        K,
        tokens_per_row,
        HAS_UPDATE_GAIN=norm.update_gain_RK is not None,
        BLOCK_K=block,
        num_warps=4,
    )


_TRITON = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def _dtype(coding: Coding, dtype: torch.dtype) -> torch.dtype:
    if coding.kind in (UNSMOOTHED, SMOOTHED):
        return dtype
    is_fp8 = coding.kind == FP8_TOKEN or coding.as_fp8
    return torch.float8_e4m3fn if is_fp8 else torch.int8


def _norm_arguments(norm: Norm | None, unused: Tensor) -> tuple[object, ...]:
    """Pointers, and how far apart rows lie: 0 where all rows share one."""
    if norm is None:
        return (unused, 0, unused, 0, unused, 0, unused, 0)
    found: list[object] = []
    for tensor in (norm.gain_RK, norm.bias_RK, norm.update_MK, norm.update_gain_RK):
        if tensor is None:
            found += [unused, 0]
        else:
            assert tensor.ndim == 2 and tensor.stride(1) == 1
            found += [tensor, tensor.stride(0) if len(tensor) > 1 else 0]
    return tuple(found)


@triton.jit
def _gelu(x, IS_NATIVE: tl.constexpr):
    """x sigmoid(2 z) of the tanh approximation; the power of e as one of 2."""
    power = tl.exp2(x * (-2.302208198 - 0.1029432397 * x * x))
    if IS_NATIVE:
        # a division checks its range, which is known here
        return x * tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], tl.float32, is_pure=True, pack=1
        )
    return x / (1.0 + power)


@triton.jit
def _round_half_even(x):
    # the sum rounds to an integer as the hardware rounds; exact below 2^22
    magic = 12582912.0
    return (x + magic) - magic


@triton.jit
def _add_update(
    x_ptr, x_stride,
    gain_ptr, gain_stride, bias_ptr, bias_stride,
    update_ptr, update_stride, update_gain_ptr, update_gain_stride,
    K, tokens_per_row,
    HAS_UPDATE_GAIN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = k < K
    update = tl.load(update_ptr + m * update_stride + k, mask=inside, other=0.0).to(tl.float32)
    if HAS_UPDATE_GAIN:
        row = m // tokens_per_row
        gain = tl.load(update_gain_ptr + row * update_gain_stride + k, mask=inside, other=0.0)
        update = update * gain
    x = tl.load(x_ptr + m * x_stride + k, mask=inside, other=0.0)
    tl.store(x_ptr + m * x_stride + k, x + update, mask=inside)


@triton.jit
def _prepare_rows(
    x_ptr, x_stride,
    gain_ptr, gain_stride, bias_ptr, bias_stride,
    update_ptr, update_stride, update_gain_ptr, update_gain_stride,
    inverse_smooth_ptr, values_ptr, xscales_ptr,
    K, tokens_per_row,
    SOURCE: tl.constexpr, HAS_UPDATE: tl.constexpr, HAS_UPDATE_GAIN: tl.constexpr,
    IS_SMOOTHED: tl.constexpr, ROUND_TO: tl.constexpr, CODING: tl.constexpr,
    IS_NATIVE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One token, all of it in registers; 0 past its channels, up to the end."""
    m = tl.program_id(0).to(tl.int64)
    row = m // tokens_per_row
    k = tl.arange(0, BLOCK_K)
    inside = k < K
    x = tl.load(x_ptr + m * x_stride + k, mask=inside, other=0.0).to(tl.float32)
    if SOURCE == 1:
        x = _gelu(x, IS_NATIVE)
    if SOURCE == 2:
        if HAS_UPDATE:
            update = tl.load(update_ptr + m * update_stride + k, mask=inside, other=0.0)
            update = update.to(tl.float32)
            if HAS_UPDATE_GAIN:
                update *= tl.load(
                    update_gain_ptr + row * update_gain_stride + k, mask=inside, other=0.0
                )
            x += update
            tl.store(x_ptr + m * x_stride + k, x, mask=inside)
        mean = tl.sum(x, axis=0) / K
        deviation = tl.where(inside, x - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(deviation * deviation, axis=0) / K + 1e-6)
        gain = tl.load(gain_ptr + row * gain_stride + k, mask=inside, other=0.0)
        x = deviation * rstd * gain
        x += tl.load(bias_ptr + row * bias_stride + k, mask=inside, other=0.0)
    x = x.to(ROUND_TO).to(tl.float32)
    if IS_SMOOTHED:
        x *= tl.load(inverse_smooth_ptr + k, mask=inside, other=0.0)
    values = values_ptr + m * K + k
    if CODING < 2:
        tl.store(values, x.to(values_ptr.dtype.element_ty), mask=inside)
    else:
        largest = tl.max(tl.abs(x), axis=0)
        xscale = tl.where(largest == 0.0, 1.0, largest / (127.0 if CODING == 3 else 448.0))
        tl.store(xscales_ptr + m, xscale)
        # the largest may come out an ulp above the limit, which rounds to the limit
        y = x * (1.0 / xscale)
        if CODING == 3:
            y = _round_half_even(y)
        tl.store(values, y.to(values_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _project_few(
    values_ptr, xscales_ptr, down_ptr, low_ptr, M, K, rank,
    HAS_SCALES: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(values_ptr + m * K + k, mask=k < K, other=0.0).to(tl.float32)
        total += x * tl.load(down_ptr + r * K + k, mask=k < K, other=0.0).to(tl.float32)
    low = tl.sum(total, axis=0)
    if HAS_SCALES:
        low *= tl.load(xscales_ptr + m)
    tl.store(low_ptr + m * rank + r, low.to(low_ptr.dtype.element_ty))


@triton.jit
def _project_many(
    values_ptr, xscales_ptr, down_ptr, low_ptr, M, K, channels_per_split,
    RANK: tl.constexpr, PADDED_RANK: tl.constexpr, HAS_SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, PADDED_RANK)
    low = tl.zeros((BLOCK_M, PADDED_RANK), tl.float32)
    first = tl.program_id(1) * channels_per_split
    for start in range(first, tl.minimum(first + channels_per_split, K), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(
            values_ptr + m[:, None] * K + k[None, :],
            mask=(m < M)[:, None] & (k < K)[None, :],
            other=0.0,
        )
        down = tl.load(
            down_ptr + r[None, :] * K + k[:, None],
            mask=(r < RANK)[None, :] & (k < K)[:, None],
            other=0.0,
        )
        # codes of 8 bits are float16 numbers, and a GPU has an instruction that makes them
        HALF: tl.constexpr = tl.float16 if HAS_SCALES else values_ptr.dtype.element_ty
        low = tl.dot(x.to(HALF), down.to(HALF), low)
    if HAS_SCALES:
        low *= tl.load(xscales_ptr + m, mask=m < M, other=0.0)[:, None]
    tl.store(
        low_ptr + tl.program_id(1) * M * RANK + m[:, None] * RANK + r[None, :],
        low.to(low_ptr.dtype.element_ty),
        mask=(m < M)[:, None] & (r < RANK)[None, :],
    )


@triton.jit
def _add_parts(parts_ptr, low_ptr, count, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts_ptr + split * count + i, mask=i < count, other=0.0)
    tl.store(low_ptr + i, total.to(low_ptr.dtype.element_ty), mask=i < count)


@triton.jit
def _prepare_groups(
    x_ptr, x_stride,
    gain_ptr, gain_stride, bias_ptr, bias_stride,
    update_ptr, update_stride, update_gain_ptr, update_gain_stride,
    smooth_ptr, values_ptr, xscales_ptr, down_ptr, low_ptr,
    M, K, tokens_per_row, shift,
    SOURCE: tl.constexpr, HAS_UPDATE: tl.constexpr, HAS_UPDATE_GAIN: tl.constexpr,
    SHIFTED: tl.constexpr, ROUND_TO: tl.constexpr,
    IS_NATIVE: tl.constexpr, GROUP: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr,
    RANK: tl.constexpr, PADDED_RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tokens of one row, tile by tile."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m = row * tokens_per_row + token
    is_token = (token < tokens_per_row) & (m < M)
    r = tl.arange(0, PADDED_RANK)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    rstd = tl.zeros((BLOCK_M,), tl.float32)
    if SOURCE == 2:
        # running mean and sum of squared deviations, merged tile by tile: one read, no cancellation
        squares = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            inside = is_token[:, None] & (k < K)[None, :]
            x = tl.load(x_ptr + m[:, None] * x_stride + k[None, :], mask=inside, other=0.0)
            if HAS_UPDATE:
                update = tl.load(
                    update_ptr + m[:, None] * update_stride + k[None, :], mask=inside, other=0.0
                ).to(tl.float32)
                if HAS_UPDATE_GAIN:
                    gain = tl.load(
                        update_gain_ptr + row * update_gain_stride + k, mask=k < K, other=0.0
                    )
                    update *= gain[None, :]
                x += update
                tl.store(x_ptr + m[:, None] * x_stride + k[None, :], x, mask=inside)
            count = tl.minimum(K - start, BLOCK_K).to(tl.float32)
            tile_mean = tl.sum(x, axis=1) / count
            deviation = tl.where(inside, x - tile_mean[:, None], 0.0)
            delta = tile_mean - mean
            share = count / (start + count)
            squares += tl.sum(deviation * deviation, axis=1) + delta * delta * start * share
            mean += delta * share
        rstd = tl.rsqrt(squares / K + 1e-6)
        # the tile that was stored is read again, by other threads
        tl.debug_barrier()

    low = tl.zeros((BLOCK_M, PADDED_RANK), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = is_token[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + m[:, None] * x_stride + k[None, :], mask=inside, other=0.0)
        x = x.to(tl.float32)
        if SOURCE == 1:
            x = _gelu(x, IS_NATIVE)
        if SOURCE == 2:
            gain = tl.load(gain_ptr + row * gain_stride + k, mask=k < K, other=0.0)
            bias = tl.load(bias_ptr + row * bias_stride + k, mask=k < K, other=0.0)
            x = (x - mean[:, None]) * rstd[:, None] * gain[None, :] + bias[None, :]
        x = x.to(ROUND_TO).to(tl.float32)
        if SHIFTED:
            x += shift
        smooth = tl.load(smooth_ptr + k, mask=k < K, other=1.0)
        x = tl.where(inside, tl.div_rn(x, tl.broadcast_to(smooth[None, :], x.shape)), 0.0)
        if RANK > 0:
            down = tl.load(
                down_ptr + r[:, None] * K + k[None, :],
                mask=(r < RANK)[:, None] & (k < K)[None, :],
                other=0.0,
            ).to(tl.float32)
            if BLOCK_M >= 16:
                low = tl.dot(x, tl.trans(down), low, input_precision="tf32")
            else:
                low += tl.sum(x[:, None, :] * down[None, :, :], axis=2)
        GROUPS: tl.constexpr = BLOCK_K // GROUP
        grouped = tl.reshape(x, (BLOCK_M, GROUPS, GROUP))
        top = tl.maximum(tl.max(grouped, axis=2), 0.0)
        if LOWEST < 0:
            top = tl.maximum(top, -tl.min(grouped, axis=2))
        xscale = tl.div_rn(top, tl.full(top.shape, HIGHEST, tl.float32))
        xscale = tl.where(xscale == 0.0, 1.0, xscale)
        y = tl.div_rn(grouped, tl.broadcast_to(xscale[:, :, None], grouped.shape))
        y = tl.minimum(tl.maximum(_round_half_even(y), LOWEST), HIGHEST)
        codes = tl.reshape(y, (BLOCK_M, BLOCK_K)).to(values_ptr.dtype.element_ty)
        tl.store(values_ptr + m[:, None] * K + k[None, :], codes, mask=inside)
        g = start // GROUP + tl.arange(0, GROUPS)
        tl.store(
            xscales_ptr + g[None, :].to(tl.int64) * M + m[:, None],
            xscale,
            mask=is_token[:, None] & (g * GROUP < K)[None, :],
        )
    if RANK > 0:
        tl.store(
            low_ptr + m[:, None] * RANK + r[None, :],
            low.to(low_ptr.dtype.element_ty),
            mask=is_token[:, None] & (r < RANK)[None, :],
        )
