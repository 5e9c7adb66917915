"""The executable specification of every hot operation, with exact integer semantics.

A quantized linear holds its weight W as W diag(smooth) = residual + up down, and computes

    x_hat = (x + shift) / smooth
    y     = quantized(x_hat) quantized(residual)^T + (x_hat down^T) up^T + bias

Shapes: M tokens, K input and N output channels, G groups of E channels (K = G*E), R rank of the
branch (0 is allowed: tensors of size 0), B batch rows, H heads, Q queries of the current level, L
cached positions, D head channels. All arithmetic is float32 unless stated; callers cast the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .packing import unpack_int4
from .primitives import NumberFormat, dequantize_symmetric, quantize_dynamic, split_groups

# tokens per step of the GEMMs: the partial sums of a step are [256, N] float32
_GEMM_ROWS = 256
# channels whose int8 products a float32 sum holds exactly: 1024 * 127^2 < 2^24
_EXACT_INT8_CHANNELS = 1024
# logits per step of attention: 16 Mi elements, 64 MiB in float32
_ATTEND_LOGITS = 2**24


def quantize_act(
    x_MK: Tensor,
    smooth_factor_K: Tensor,
    proj_down_RK: Tensor,
    *,
    group_size: int,
    format: NumberFormat,
    shift: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Smoothed input as codes, and its low-rank projection, from one read of x.

    x_MK: float. smooth_factor_K: float, positive; the input is divided by it, the weight columns
    and proj_down were made for the divided input. group_size: channels per scale (K: one scale per
    token). shift: added to x first, so that a post-GELU input is never negative and can take an
    unsigned format; both branches see the shifted input, and the caller's bias must carry
    `shifted_bias`.
    Returns (codes_MK int8, xscales_MG float32, low_MR float32). The branch reads the unquantized
    smoothed input.
    """
    if x_MK.ndim != 2:
        raise ValueError(
            f"quantize_act takes [tokens, channels], got shape {tuple(x_MK.shape)}; flatten first"
        )
    x_hat_MK = (x_MK.float() + shift) / smooth_factor_K.float()
    codes_MK, xscales_MG = quantize_dynamic(
        x_hat_MK, format=format, group_size=group_size, scale_dtype=torch.float32
    )
    return codes_MK, xscales_MG, x_hat_MK @ proj_down_RK.float().T


def shifted_bias(bias_N: Tensor | None, weight_NK: Tensor, *, shift: float) -> Tensor:
    """Bias that undoes an input shift: bias - shift * sum_k W[:, k], float32.

    weight_NK: the weight as it acts on unsmoothed inputs. Passing the *quantized* one (residual and
    branch together, divided by the smooth factor) makes the shift cancel exactly; the original one
    leaves the weight error times shift.
    """
    correction_N = shift * weight_NK.double().sum(-1)
    return (-correction_N if bias_N is None else bias_N.double() - correction_N).float()


def gemm_w4a4(
    codes_MK: Tensor,
    xscales_MG: Tensor,
    qweight_NJ: Tensor,
    wscales_NG: Tensor,
    low_MR: Tensor,
    proj_up_NR: Tensor,
    bias_N: Tensor | None,
) -> Tensor:
    """4-bit activations times 4-bit weights plus the low-rank branch, float32 [M, N].

    codes_MK: int8, in groups like the weight's; or int8 with one scale per token (xscales [M, 1]),
    which makes this the W4A8 product too. qweight_NJ: `pack_int4` bytes, J = K/2. Order of the
    sums: low @ up^T + bias first, then groups in ascending order, each adding (integer dot *
    xscale) * wscale. The dots are exact: a group's products stay below 2^24 in float32 (checked).
    Extra memory: the weight in float32 and 256 * (N + K) floats.
    Raises ValueError if the shapes contradict each other.
    """
    G = wscales_NG.shape[-1]
    weight_NK = unpack_int4(qweight_NJ).float()
    if xscales_MG.shape[-1] == 1:
        xscales_MG = xscales_MG.expand(-1, G)
    _check_gemm(codes_MK, weight_NK, xscales_MG, wscales_NG)
    assert weight_NK.shape[1] // G * 128 * 8 <= 2**24, (
        "a group's integer dot no longer fits float32"
    )
    weight_NGE = split_groups(weight_NK, group_size=weight_NK.shape[1] // G)
    wscales_GN = wscales_NG.float().T.contiguous()
    y_MN = _branch(low_MR, proj_up_NR, bias_N)
    for rows in _row_blocks(len(codes_MK)):
        codes_mGE = split_groups(codes_MK[rows].float(), group_size=weight_NGE.shape[2])
        for g in range(G):
            dots_mN = codes_mGE[:, g] @ weight_NGE[:, g].T
            y_MN[rows].addcmul_(dots_mN.mul_(xscales_MG[rows, g, None]), wscales_GN[g])
    return y_MN


def gemm_w4a16(
    x_hat_MK: Tensor,
    qweight_NJ: Tensor,
    wscales_NG: Tensor,
    low_MR: Tensor,
    proj_up_NR: Tensor,
    bias_N: Tensor | None,
) -> Tensor:
    """Unquantized smoothed input times 4-bit weights plus the low-rank branch, float32 [M, N].

    Extra memory: the dequantized weight in float32.
    """
    weight_NK = dequantize_symmetric(unpack_int4(qweight_NJ), wscales_NG.float())
    return _branch(low_MR, proj_up_NR, bias_N).addmm_(x_hat_MK.float(), weight_NK.T)


def gemm_w8a8(
    codes_MK: Tensor,
    xscales_M1: Tensor,
    qweight_NK: Tensor,
    wscales_N1: Tensor,
    low_MR: Tensor,
    proj_up_NR: Tensor,
    bias_N: Tensor | None,
) -> Tensor:
    """int8 per token times int8 per output channel plus the low-rank branch, float32 [M, N].

    low @ up^T + bias, plus (int32 dot * xscale) * wscale. The dot is summed exactly (in int32) and
    rounded once, when it becomes float32. Extra memory: 1024 channels of the weight in float32 and
    256 * (2N + 1024) words.
    """
    _check_gemm(codes_MK, qweight_NK, xscales_M1, wscales_N1)
    if wscales_N1.shape[-1] != 1:
        raise ValueError(
            f"gemm_w8a8 takes one scale per row, got {wscales_N1.shape[-1]}; set group_size=K"
        )
    M, K = codes_MK.shape
    y_MN = _branch(low_MR, proj_up_NR, bias_N)
    for rows in _row_blocks(M):
        dots_mN = torch.zeros(y_MN[rows].shape, dtype=torch.int32, device=y_MN.device)
        for k in range(0, K, _EXACT_INT8_CHANNELS):
            channels = slice(k, k + _EXACT_INT8_CHANNELS)
            dots_mN += (codes_MK[rows, channels].float() @ qweight_NK[:, channels].float().T).int()
        y_MN[rows].addcmul_(dots_mN.float().mul_(xscales_M1[rows]), wscales_N1.float().T)
    return y_MN


def attend_codes(
    q_BHQD: Tensor,
    k_codes_BHLD: Tensor,
    v_codes_BHLD: Tensor,
    k_now_BHQD: Tensor,
    v_now_BHQD: Tensor,
    *,
    k_scale_HD: Tensor,
    k_zero_point_HD: Tensor,
    v_scale_HD: Tensor,
    v_zero_point_HD: Tensor,
) -> Tensor:
    """Attention over an int8 cache and the level's own unquantized K and V; softmax scale 1.

    A cached element stands for (code - zero_point) * scale per (head, channel). Nothing is
    dequantized:

        logits to the cache   = (q * k_scale) . code - q . (k_scale * k_zero_point)
        output from the cache = (P code) * v_scale - (sum of P) * v_scale * v_zero_point

    The per-query constant in the first line would cancel in a softmax over the cache alone; it must
    be kept because the level's own keys do not share it, and for the same reason the cache's
    probabilities do not sum to 1. L may be 0. Zero points are integers or floats. Arithmetic in
    float32, or in float64 for a float64 q; returns o_BHQD in q's dtype. Extra memory: one batch
    row's codes as floats, and about 3 * 64 MiB of logits.
    """
    dtype = torch.float64 if q_BHQD.dtype == torch.float64 else torch.float32
    k_now_BHQD, v_now_BHQD = k_now_BHQD.to(dtype), v_now_BHQD.to(dtype)
    k_scale_H1D, v_scale_H1D = (s.to(dtype).unsqueeze(1) for s in (k_scale_HD, v_scale_HD))
    k_offset_H1D = k_scale_H1D * k_zero_point_HD.to(dtype).unsqueeze(1)
    v_offset_H1D = v_scale_H1D * v_zero_point_HD.to(dtype).unsqueeze(1)
    B, H, num_queries, _ = q_BHQD.shape
    L = k_codes_BHLD.shape[2]
    step = max(1, _ATTEND_LOGITS // (H * (L + num_queries)))
    o_BHQD = torch.empty_like(v_now_BHQD)
    for b in range(B):
        k_codes_HLD, v_codes_HLD = k_codes_BHLD[b].to(dtype), v_codes_BHLD[b].to(dtype)
        for start in range(0, num_queries, step):
            rows = slice(start, start + step)
            q_HqD = q_BHQD[b, :, rows].to(dtype)
            to_cache_HqL = (q_HqD * k_scale_H1D) @ k_codes_HLD.mT
            to_cache_HqL -= (q_HqD * k_offset_H1D).sum(-1, keepdim=True)
            logits_HqS = torch.cat((to_cache_HqL, q_HqD @ k_now_BHQD[b].mT), dim=-1)
            probs_HqL, probs_now_HqQ = logits_HqS.softmax(-1).split((L, num_queries), dim=-1)
            o_HqD = (probs_HqL @ v_codes_HLD) * v_scale_H1D
            o_HqD -= probs_HqL.sum(-1, keepdim=True) * v_offset_H1D
            o_BHQD[b, :, rows] = o_HqD + probs_now_HqQ @ v_now_BHQD[b]
    return o_BHQD.to(q_BHQD.dtype)


def _branch(low_MR: Tensor, proj_up_NR: Tensor, bias_N: Tensor | None) -> Tensor:
    y_MN = low_MR.float() @ proj_up_NR.float().T
    return y_MN if bias_N is None else y_MN.add_(bias_N.float())


def _row_blocks(num_rows: int) -> list[slice]:
    return [slice(start, start + _GEMM_ROWS) for start in range(0, num_rows, _GEMM_ROWS)]


def _check_gemm(
    codes_MK: Tensor, weight_NK: Tensor, xscales_MG: Tensor, wscales_NG: Tensor
) -> None:
    if codes_MK.shape[1] != weight_NK.shape[1] or xscales_MG.shape[1] != wscales_NG.shape[1]:
        raise ValueError(
            f"input has {codes_MK.shape[1]} channels in {xscales_MG.shape[1]} groups, "
            f"the weight {weight_NK.shape[1]} in {wscales_NG.shape[1]}; they must agree"
        )
