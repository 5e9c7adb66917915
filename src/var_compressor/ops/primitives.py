"""Number formats as data, and the quantize/dequantize pairs built on them.

Shapes: M rows (tokens, or output channels of a weight), K channels, G groups of E consecutive
channels (K = G*E); `x_MK` may carry any number of leading dimensions in place of M. One group per
row (E = K) is the per-token or per-output-channel case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class NumberFormat:
    """One element format: what a stored code can be.

    `qmin`/`qmax` bound the codes (kind "int") or the representable values (kind "float"). A scale
    maps the largest magnitude of a group onto `qmax`. `fixed_group_size` is set where the format
    prescribes its group.
    """

    name: str
    nbits: int
    kind: Literal["int", "float"]
    qmin: float
    qmax: float
    code_dtype: torch.dtype
    fixed_group_size: int | None = None


# sint4 and sint8 leave the most negative code unused: the grid is symmetric, so -x quantizes to
# minus the code of x.
FORMATS: dict[str, NumberFormat] = {
    f.name: f
    for f in (
        NumberFormat("sint4", 4, "int", -7, 7, torch.int8),
        NumberFormat("uint4", 4, "int", 0, 15, torch.int8),
        NumberFormat("sint8", 8, "int", -127, 127, torch.int8),
        NumberFormat("fp8_e4m3", 8, "float", -448, 448, torch.float8_e4m3fn),
        NumberFormat("nvfp4", 4, "float", -6, 6, torch.uint8, fixed_group_size=16),
    )
}

# e2m1 values in the hardware's code order: bit 3 is the sign, bits 0..2 index the magnitude
_E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_VALUES = (*_E2M1_MAGNITUDES, *(-v for v in _E2M1_MAGNITUDES))


def split_groups(x_MK: Tensor, *, group_size: int) -> Tensor:
    """View the channels as groups: [..., K] -> [..., G, E].

    Raises ValueError if K is no multiple of the group.
    """
    K = x_MK.shape[-1]
    if group_size < 1 or K % group_size:
        raise ValueError(
            f"{K} channels do not split into groups of {group_size}; choose a divisor of {K}"
        )
    return x_MK.unflatten(-1, (K // group_size, group_size))


def choose_scales(
    x_MK: Tensor, *, format: NumberFormat, group_size: int, scale_dtype: torch.dtype
) -> Tensor:
    """Symmetric scale of every group: absmax / qmax in `scale_dtype`; an all-zero group gets 1.

    x_MK: any float dtype. Returns scales_MG, float32 storage whose values are exact in
    `scale_dtype`.
    Raises ValueError for a format without a single-level scale (nvfp4) or channels that do not
    split into groups.
    """
    _require_single_level(format)
    absmax_MG = split_groups(x_MK, group_size=group_size).abs().amax(-1).float()
    scales_MG = (absmax_MG / format.qmax).to(scale_dtype).float()
    return torch.where(scales_MG == 0, 1.0, scales_MG)


def quantize_symmetric(x_MK: Tensor, scales_MG: Tensor, *, format: NumberFormat) -> Tensor:
    """Codes of x under given scales: round half to even, then clamp to the format's range.

    x_MK: any float dtype, computed in float32. scales_MG: float32, positive; G divides K.
    Returns codes_MK in `format.code_dtype` (int8, or float8 for fp8_e4m3).
    """
    _require_single_level(format)
    y_MGE = _scaled(x_MK, scales_MG)
    if format.kind == "int":
        y_MGE = y_MGE.round_()
    return y_MGE.clamp_(format.qmin, format.qmax).to(format.code_dtype).flatten(-2)


def dequantize_symmetric(codes_MK: Tensor, scales_MG: Tensor) -> Tensor:
    """code * scale in float32, [..., K]; the inverse of `quantize_symmetric` up to rounding."""
    G = scales_MG.shape[-1]
    values_MGE = split_groups(codes_MK.float(), group_size=codes_MK.shape[-1] // G)
    return (values_MGE * scales_MG.unsqueeze(-1)).flatten(-2)


def quantize_dynamic(
    x_MK: Tensor, *, format: NumberFormat, group_size: int, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Quantize with the range taken from x itself, per row and group.

    Arguments as for `choose_scales`. Returns (codes_MK, scales_MG).
    """
    scales_MG = choose_scales(x_MK, format=format, group_size=group_size, scale_dtype=scale_dtype)
    return quantize_symmetric(x_MK, scales_MG, format=format), scales_MG


def round_trip(
    x_MK: Tensor, *, format: NumberFormat, group_size: int, scale_dtype: torch.dtype
) -> Tensor:
    """What x is after `quantize_dynamic` and back, float32: what the offline searches need.

    nvfp4 weights and activations differ in their scales, so they have their own pair of functions.
    """
    scales_MG = choose_scales(x_MK, format=format, group_size=group_size, scale_dtype=scale_dtype)
    if format.kind == "float":
        return dequantize_symmetric(quantize_symmetric(x_MK, scales_MG, format=format), scales_MG)
    y_MGE = _scaled(x_MK, scales_MG).round_().clamp_(format.qmin, format.qmax)
    return y_MGE.mul_(scales_MG.unsqueeze(-1)).flatten(-2)


def _scaled(x_MK: Tensor, scales_MG: Tensor) -> Tensor:
    # a true division: multiplying by the reciprocal rounds differently and would move codes
    G = scales_MG.shape[-1]
    if G == 0 or x_MK.shape[-1] % G:
        raise ValueError(f"{G} scales per row do not divide {x_MK.shape[-1]} channels")
    return split_groups(x_MK.float(), group_size=x_MK.shape[-1] // G) / scales_MG.unsqueeze(-1)


def _require_single_level(format: NumberFormat) -> None:
    if format.fixed_group_size is not None:
        raise ValueError(
            f"{format.name} has scales of its own; use quantize_{format.name} and its inverse"
        )


def choose_affine(lo: Tensor, hi: Tensor, *, nbits: int) -> tuple[Tensor, Tensor]:
    """Scale and integer zero point that spread the codes -2^(n-1) .. 2^(n-1)-1 over [lo, hi].

    lo, hi: float, any shape, lo <= hi; the range need not contain 0, so the zero point is not
    clamped to the code range. A range too narrow for its distance from 0 is widened until
    |zero_point| stays near 2^20, where float32 still resolves a sixteenth of a step.
    Returns (scale float32 > 0, zero_point int32), both shaped like lo.
    """
    num_steps = 2**nbits - 1
    scale = (hi.float() - lo.float()) / num_steps
    narrowest = torch.maximum(lo.abs(), hi.abs()).float() * 2.0**-20
    scale = torch.maximum(scale, narrowest).clamp_min(1e-30)
    zero_point = torch.round(-(2.0 ** (nbits - 1)) - lo.float() / scale)
    return scale, zero_point.to(torch.int32)


def quantize_affine(x: Tensor, scale: Tensor, zero_point: Tensor, *, nbits: int) -> Tensor:
    """Signed codes clamp(round(x / scale + zero_point)), round half to even, stored as int8.

    scale (float) and zero_point (int, or a float offset in code units) broadcast against x.
    """
    codes = torch.round(x.float() / scale + zero_point)
    return codes.clamp_(-(2 ** (nbits - 1)), 2 ** (nbits - 1) - 1).to(torch.int8)


def dequantize_affine(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """(code - zero_point) * scale in float32; scale and zero_point broadcast against the codes."""
    return (codes.float() - zero_point) * scale


def quantize_nvfp4(x_MK: Tensor, *, tensor_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """e2m1 codes with an fp8-e4m3 scale per 16 channels.

    tensor_scale: float scalar from `choose_nvfp4_tensor_scale` (weights), or None (activations: the
    group scale then saturates at 448, and groups whose absmax / 6 underflows fp8 get scale 1 and
    vanish).
    Returns (codes_MK uint8 in hardware order, scales_MG float8_e4m3fn; a zero scale means that the
    factor is 1).
    Source: rounding sends an exact midpoint to the larger value, as the NVFP4 codebook kernel of
    deepcompressor.
    """
    group_size = _nvfp4_group_size()
    per_tensor = 1.0 if tensor_scale is None else tensor_scale.float()
    absmax_MG = split_groups(x_MK, group_size=group_size).abs().amax(-1).float()
    fp8 = FORMATS["fp8_e4m3"]
    raw_MG = absmax_MG / FORMATS["nvfp4"].qmax / per_tensor
    scales_MG = raw_MG.clamp_max(fp8.qmax).to(fp8.code_dtype)
    return _round_e2m1(_scaled(x_MK, _nvfp4_factor(scales_MG, tensor_scale))), scales_MG


def dequantize_nvfp4(codes_MK: Tensor, scales_MG: Tensor, *, tensor_scale: Tensor | None) -> Tensor:
    """Inverse of `quantize_nvfp4` up to rounding; float32."""
    table = torch.tensor(E2M1_VALUES, device=codes_MK.device)
    values_MGE = split_groups(table[codes_MK.int()], group_size=_nvfp4_group_size())
    return (values_MGE * _nvfp4_factor(scales_MG, tensor_scale).unsqueeze(-1)).flatten(-2)


def choose_nvfp4_tensor_scale(weight_NK: Tensor, *, scale_dtype: torch.dtype) -> Tensor:
    """Scale of a whole nvfp4 weight, which puts its largest group scale on 448.

    Rounded to scale_dtype; scalar float32; 1 for a zero weight.
    """
    largest = weight_NK.abs().amax().float() / FORMATS["nvfp4"].qmax
    scale = (largest / FORMATS["fp8_e4m3"].qmax).to(scale_dtype).float()
    return torch.where(scale == 0, 1.0, scale)


def _nvfp4_group_size() -> int:
    group_size = FORMATS["nvfp4"].fixed_group_size
    assert group_size is not None
    return group_size


def _nvfp4_factor(scales_MG: Tensor, tensor_scale: Tensor | None) -> Tensor:
    factor_MG = (
        scales_MG.float() if tensor_scale is None else scales_MG.float() * tensor_scale.float()
    )
    return torch.where(factor_MG == 0, 1.0, factor_MG)


def _round_e2m1(x_MGE: Tensor) -> Tensor:
    values = torch.tensor(sorted(set(E2M1_VALUES)), device=x_MGE.device)
    codes = torch.tensor(
        [E2M1_VALUES.index(v) for v in values.tolist()], dtype=torch.uint8, device=x_MGE.device
    )
    midpoints = (values[1:] + values[:-1]) / 2
    return codes[torch.bucketize(x_MGE.contiguous(), midpoints, right=True)].flatten(-2)
