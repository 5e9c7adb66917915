"""The executable specification of every hot operation, with exact integer semantics.

A quantized linear holds its weight W as W diag(smooth) = residual + up down, and computes

    x_hat = (x + shift) / smooth
    y     = quantized(x_hat) quantized(residual)^T + (x_hat down^T) up^T + bias

Shapes: M tokens, K input and N output channels, G groups of E channels (K = G*E), R rank of the
branch (0 is allowed: tensors of size 0), B batch rows, H heads, Q queries of the current level, L
cached positions, D head channels. All arithmetic is float32 unless stated; callers cast the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .packing import unpack_int4
from .primitives import NumberFormat, quantize_dynamic

# tokens per step of the GEMMs, whose partial sums are [tokens, N] float32: what a CPU's cache
# holds, or enough to keep a GPU busy between launches
_GEMM_ROWS = {"cpu": 256, "cuda": 16384}
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
    Returns (codes_MK in the format's dtype, xscales_MG float32, low_MR float32). The branch reads
    the unquantized smoothed input.
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
    """Integer activations times 4-bit weights plus the low-rank branch, float32 [M, N].

    codes_MK: int8, signed or unsigned, in groups like the weight's; or with one scale per token
    (xscales [M, 1]), which makes this the W4A8 product too. qweight_NJ: `pack_int4` bytes,
    J = K/2. Order of the sums: low @ up^T + bias first, then groups in ascending order, each adding
    (integer dot * xscale) * wscale. The dots are exact, and rounded once when they become float32.
    Extra memory: the weight in float32 and 256 * (N + K) floats.
    Raises ValueError if the shapes contradict each other.
    """
    y_MN = _branch(low_MR, proj_up_NR, bias_N)
    return _add_integer_product(y_MN, codes_MK, xscales_MG, unpack_int4(qweight_NJ), wscales_NG)


def gemm_w8a8(
    codes_MK: Tensor,
    xscales_MG: Tensor,
    qweight_NK: Tensor,
    wscales_NG: Tensor,
    low_MR: Tensor,
    proj_up_NR: Tensor,
    bias_N: Tensor | None,
) -> Tensor:
    """Integer activations times int8 weights plus the low-rank branch, float32 [M, N].

    Usually one scale per token and one per output channel (G = 1 on both sides). Where one side has
    more groups, those are summed, and the other's scales count for all groups they cover. Sums,
    memory and errors as for `gemm_w4a4`.
    """
    y_MN = _branch(low_MR, proj_up_NR, bias_N)
    return _add_integer_product(y_MN, codes_MK, xscales_MG, qweight_NK, wscales_NG)


def gemm_dequantized(
    x_MK: Tensor, weight_NK: Tensor, low_MR: Tensor, proj_up_NR: Tensor, bias_N: Tensor | None
) -> Tensor:
    """The product of every other pair of formats plus the low-rank branch, float32 [M, N].

    x_MK, weight_NK: float32, codes already multiplied by their scales; a 16-bit x is passed as it
    is, smoothed.
    """
    return _branch(low_MR, proj_up_NR, bias_N).addmm_(x_MK.float(), weight_NK.T)


@dataclass(frozen=True)
class CodedTokens:
    """Cached positions that share their parameters: a code c stands for c * scale + offset.

    k_codes, v_codes: int8 or e4m3 ``[B, H, L, D]``, or uint8 ``[B, H, L, D/2]``, two int4 codes a
    byte (`pack_int4`). Scales and offsets: float, ``[1 or B, H, 1, D]``.
    """

    k_codes: Tensor
    v_codes: Tensor
    k_scale: Tensor
    k_offset: Tensor
    v_scale: Tensor
    v_offset: Tensor


def attend_codes(
    q_BHQD: Tensor, cached: Sequence[CodedTokens], k_now_BHND: Tensor, v_now_BHND: Tensor
) -> Tensor:
    """Attention over cached codes and over unquantized K and V; softmax scale 1.

    Nothing is dequantized:

        logits to the cache   = (q * k_scale) . code + q . k_offset
        output from the cache = (P code) * v_scale + (sum of P) * v_offset

    The per-query constant q . k_offset
    would cancel in a softmax over these positions alone; it must be kept because other positions do
    not share it, and for the same reason their probabilities do not sum to 1. Arithmetic in
    float32, or in float64 for a float64 q; returns o_BHQD in q's dtype. Extra memory: one batch
    row's codes as floats, and about 3 * 64 MiB of logits.
    """
    dtype = torch.float64 if q_BHQD.dtype == torch.float64 else torch.float32
    B, H, num_queries, _ = q_BHQD.shape
    k_now_BHND, v_now_BHND = k_now_BHND.to(dtype), v_now_BHND.to(dtype)
    o_BHQD = torch.empty(q_BHQD.shape, dtype=dtype, device=q_BHQD.device)
    for b in range(B):
        rows = [_one_row(tokens, b, dtype) for tokens in cached]
        lengths = [*(row.k_codes.shape[1] for row in rows), k_now_BHND.shape[2]]
        step = max(1, _ATTEND_LOGITS // (H * sum(lengths)))
        for start in range(0, num_queries, step):
            q_HqD = q_BHQD[b, :, start : start + step].to(dtype)
            logits = [_logits_to(row, q_HqD) for row in rows]
            logits.append(q_HqD @ k_now_BHND[b].mT)
            *to_cached, probs_now_HqN = torch.cat(logits, dim=-1).softmax(-1).split(lengths, dim=-1)
            o_HqD = probs_now_HqN @ v_now_BHND[b]
            for row, probs_HqL in zip(rows, to_cached, strict=True):
                o_HqD += _output_from(row, probs_HqL)
            o_BHQD[b, :, start : start + step] = o_HqD
    return o_BHQD.to(q_BHQD.dtype)


def _one_row(tokens: CodedTokens, b: int, dtype: torch.dtype) -> CodedTokens:
    """Row b without its batch dimension, as floats."""
    found = {}
    for name, tensor in vars(tokens).items():
        part = tensor[b] if len(tensor) > 1 else tensor[0]
        found[name] = (unpack_int4(part) if part.dtype == torch.uint8 else part).to(dtype)
    return CodedTokens(**found)


def _logits_to(row: CodedTokens, q_HqD: Tensor) -> Tensor:
    logits_HqL = (q_HqD * row.k_scale) @ row.k_codes.mT
    return logits_HqL.add_((q_HqD * row.k_offset).sum(-1, keepdim=True))


def _output_from(row: CodedTokens, probs_HqL: Tensor) -> Tensor:
    o_HqD = (probs_HqL @ row.v_codes).mul_(row.v_scale)
    return o_HqD.add_(probs_HqL.sum(-1, keepdim=True) * row.v_offset)


def _branch(low_MR: Tensor, proj_up_NR: Tensor, bias_N: Tensor | None) -> Tensor:
    y_MN = low_MR.float() @ proj_up_NR.float().T
    return y_MN if bias_N is None else y_MN.add_(bias_N.float())


def _row_blocks(x_MK: Tensor) -> list[slice]:
    step = _GEMM_ROWS[x_MK.device.type]
    return [slice(start, start + step) for start in range(0, len(x_MK), step)]


def _add_integer_product(
    y_MN: Tensor, codes_MK: Tensor, xscales_MG: Tensor, wcodes_NK: Tensor, wscales_NG: Tensor
) -> Tensor:
    """y plus the product, group by group of the side that has more of them; in place."""
    K, num_x, num_w = codes_MK.shape[1], xscales_MG.shape[1], wscales_NG.shape[1]
    G = max(num_x, num_w)
    if wcodes_NK.shape[1] != K or G % num_x or G % num_w or K % G:
        raise ValueError(
            f"input has {K} channels in {num_x} groups, "
            f"the weight {wcodes_NK.shape[1]} in {num_w}; they must agree"
        )
    xscales_MG = xscales_MG.repeat_interleave(G // num_x, dim=1)
    wscales_GN = wscales_NG.float().T.repeat_interleave(G // num_w, dim=0)
    weight_NK = wcodes_NK.float()
    for rows in _row_blocks(codes_MK):
        codes_mK = codes_MK[rows].float()
        for g in range(G):
            group = slice(g * (K // G), (g + 1) * (K // G))
            dots_mN = _exact_dots(codes_mK[:, group], weight_NK[:, group])
            y_MN[rows].addcmul_(dots_mN.mul_(xscales_MG[rows, g, None]), wscales_GN[g])
    return y_MN


def _exact_dots(codes_mE: Tensor, wcodes_NE: Tensor) -> Tensor:
    """Integer dots of codes held in float32: summed without rounding, then float32."""
    E = codes_mE.shape[1]
    if E <= _EXACT_INT8_CHANNELS:
        return codes_mE @ wcodes_NE.T
    dots_mN = codes_mE.new_zeros(len(codes_mE), len(wcodes_NE), dtype=torch.int32)
    for start in range(0, E, _EXACT_INT8_CHANNELS):
        part = slice(start, start + _EXACT_INT8_CHANNELS)
        dots_mN += (codes_mE[:, part] @ wcodes_NE[:, part].T).int()
    return dots_mN.float()
