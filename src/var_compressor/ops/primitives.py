"""Number formats as data, and the quantize/dequantize pairs built on them.

Shapes: M rows (tokens, or output channels of a weight), K channels, G groups of E consecutive
channels (K = G*E); `x_MK` may carry any number of leading dimensions in place of M. One group per
row (E = K) is the per-token or per-output-channel case.

All formats go through the same functions. Scales are *effective* float32 factors: code value *
scale is what the code stands for. An nvfp4 weight has two levels of them, an e4m3 scale per group
times one `tensor_scale` per matrix; the effective scale is their product.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class NumberFormat:
    """One element format: what a stored code can be.

    `qmin`/`qmax` bound the values that codes stand for; a scale maps the largest magnitude of a
    group onto `qmax`. Codes of the kinds "int" and "float" are those values themselves, codes of
    the kind "table" index `values`, one for each pattern of bits. `fixed_group_size` and
    `fixed_scale_dtype` are set where the format prescribes its group, and what its scales are
    stored in.
    Raises: ValueError for a format whose codes could not be stored, or not hold a group of zeros.
    """

    name: str
    nbits: int
    kind: Literal["int", "float", "table"]
    qmin: float
    qmax: float
    code_dtype: torch.dtype
    fixed_group_size: int | None = None
    fixed_scale_dtype: torch.dtype | None = None
    values: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.nbits <= 8 or (self.kind == "float" and self.nbits != 8):
            raise ValueError(f"{self.name}: {self.nbits} bits; codes have 1 to 8, floats have 8")
        if self.kind == "table":
            # a damaged code must not point past the table; a group of zeros has scale 1
            if len(self.values) != 2**self.nbits or 0 not in self.values:
                raise ValueError(
                    f"{self.name}: {len(self.values)} values, expected {2**self.nbits}, 0 among "
                    f"them, for {self.nbits} bits; repeat one to fill the table"
                )
            if (self.qmin, self.qmax) != (min(self.values), max(self.values)):
                raise ValueError(
                    f"{self.name}: range {self.qmin} to {self.qmax}, but the values span "
                    f"{min(self.values)} to {max(self.values)}"
                )
        if self.kind == "int" and self.qmax - self.qmin >= 2**self.nbits:
            raise ValueError(
                f"{self.name}: {self.nbits} bits do not hold {self.qmin} to {self.qmax}"
            )
        dtypes = {"int": torch.int8, "table": torch.uint8}
        if self.code_dtype != dtypes.get(self.kind, self.code_dtype):
            raise ValueError(
                f"{self.name}: codes of the kind {self.kind!r} are {dtypes[self.kind]}, "
                f"got {self.code_dtype}"
            )


# e2m1 values in the hardware's code order: bit 3 is the sign, bits 0..2 index the magnitude
_E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_VALUES = (*_E2M1_MAGNITUDES, *(-v for v in _E2M1_MAGNITUDES))

# sint4 and sint8 leave the most negative code unused: the grid is symmetric, so -x quantizes to
# minus the code of x.
FORMATS: dict[str, NumberFormat] = {
    f.name: f
    for f in (
        NumberFormat("sint4", 4, "int", -7, 7, torch.int8),
        NumberFormat("uint4", 4, "int", 0, 15, torch.int8),
        NumberFormat("sint8", 8, "int", -127, 127, torch.int8),
        NumberFormat("fp8_e4m3", 8, "float", -448, 448, torch.float8_e4m3fn),
        NumberFormat("nvfp4", 4, "table", -6, 6, torch.uint8, 16, torch.float8_e4m3fn, E2M1_VALUES),
    )
}


@dataclass(frozen=True)
class QuantizedWeight:
    """A rounded weight: codes_NK in the format's dtype, and what they stand for.

    scales_NG: effective, float32. tensor_scale: float32, one per matrix, of a format with two
    levels of scales, else None; with it the scales can be stored exactly.
    """

    codes_NK: Tensor
    scales_NG: Tensor
    format: NumberFormat
    tensor_scale: Tensor | None

    def dequantize(self) -> Tensor:
        return dequantize_symmetric(self.codes_NK, self.scales_NG, format=self.format)


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
    x_MK: Tensor,
    *,
    format: NumberFormat,
    group_size: int,
    scale_dtype: torch.dtype,
    tensor_scale: Tensor | None = None,
) -> Tensor:
    """Symmetric effective scale of every group, which puts its absmax on qmax.

    x_MK: any float dtype. Arguments and result as for `round_scales`.
    Raises ValueError for channels that do not split into groups, or a group size other than the
    one that the format prescribes.
    """
    return round_scales(
        unrounded_scales(x_MK, format=format, group_size=group_size),
        format=format,
        scale_dtype=scale_dtype,
        tensor_scale=tensor_scale,
    )


def unrounded_scales(x_MK: Tensor, *, format: NumberFormat, group_size: int) -> Tensor:
    """absmax / qmax of every group, float32; Raises as `choose_scales`."""
    if format.fixed_group_size not in (None, group_size):
        raise ValueError(
            f"{format.name} has groups of {format.fixed_group_size}, got group size {group_size}"
        )
    # one read of x, where abs().amax() takes two passes and a copy
    lowest_MG, highest_MG = split_groups(x_MK, group_size=group_size).aminmax(dim=-1)
    return _divided(torch.maximum(-lowest_MG, highest_MG), by=format.qmax)


def round_scales(
    wanted_MG: Tensor,
    *,
    format: NumberFormat,
    scale_dtype: torch.dtype,
    tensor_scale: Tensor | None,
) -> Tensor:
    """The effective scales that storage can hold, nearest to the wanted ones; 0 becomes 1.

    wanted_MG: float32, not negative. scale_dtype: what a scale is rounded to, unless the format
    prescribes it (nvfp4: e4m3, which saturates at 448 and lets small scales underflow to 0).
    tensor_scale: from `choose_tensor_scale` for weights; None counts as 1. Returns float32.
    """
    scale_dtype = format.fixed_scale_dtype or scale_dtype
    stored_MG = _stored(wanted_MG, dtype=scale_dtype, tensor_scale=tensor_scale)
    return effective_scales(stored_MG, tensor_scale)


def effective_scales(stored_MG: Tensor, tensor_scale: Tensor | None) -> Tensor:
    """What stored group scales amount to, float32: times their tensor scale, and 1 for 0."""
    scales_MG = stored_MG.float()
    if tensor_scale is not None:
        scales_MG = scales_MG * tensor_scale[..., None, None]
    return torch.where(scales_MG == 0, 1.0, scales_MG)


def stored_scales(scales_MG: Tensor, *, dtype: torch.dtype, tensor_scale: Tensor | None) -> Tensor:
    """Inverse of `effective_scales` for scales that `round_scales` made with the same arguments."""
    stored_MG = _stored(scales_MG, dtype=dtype, tensor_scale=tensor_scale)
    # an effective 1 may stand for a 0, because 1 / tensor_scale can be out of e4m3's range
    survives_MG = effective_scales(stored_MG, tensor_scale) == scales_MG
    return torch.where(survives_MG, stored_MG.float(), 0.0).to(dtype)


def _stored(scales_MG: Tensor, *, dtype: torch.dtype, tensor_scale: Tensor | None) -> Tensor:
    if tensor_scale is not None:
        scales_MG = scales_MG / tensor_scale[..., None, None]
    return scales_MG.clamp(max=torch.finfo(dtype).max).to(dtype)


def choose_tensor_scale(weight_NK: Tensor, *, format: NumberFormat) -> Tensor | None:
    """Scale of a whole weight matrix that puts its largest group scale on e4m3's 448.

    None for formats with one level of scales, so that any weight can be passed. weight_NK may carry
    leading dimensions: one scale per matrix, float32, shaped like those; 1 for a zero matrix.
    """
    if format.fixed_scale_dtype is None:
        return None
    largest = _divided(weight_NK.abs().amax((-2, -1)), by=format.qmax)
    scale = _divided(largest, by=torch.finfo(format.fixed_scale_dtype).max)
    return torch.where(scale == 0, 1.0, scale)


def quantize_symmetric(x_MK: Tensor, scales_MG: Tensor, *, format: NumberFormat) -> Tensor:
    """Codes of x under given scales: the nearest value of the format, clamped to its range.

    x_MK: any float dtype, computed in float32. scales_MG: float32, positive; G divides K.
    A midpoint between two values goes to the even one; of a table, to the larger.
    Returns codes_MK in `format.code_dtype`.
    Source: ties of e2m1 as in the NVFP4 codebook kernel of deepcompressor.
    """
    y_MGE = _scaled(x_MK, scales_MG)
    if format.kind == "table":
        tables = _tables(format, y_MGE.device)
        return _looked_up(tables.codes, _places(y_MGE, tables)).flatten(-2)
    if format.kind == "int":
        y_MGE = y_MGE.round_()
    return y_MGE.clamp_(format.qmin, format.qmax).to(format.code_dtype).flatten(-2)


def dequantize_symmetric(codes_MK: Tensor, scales_MG: Tensor, *, format: NumberFormat) -> Tensor:
    """Value of code * scale in float32, [..., K]; undoes `quantize_symmetric` up to rounding."""
    if format.kind == "table":
        values_MK = _looked_up(_tables(format, codes_MK.device).by_code, codes_MK.int())
    else:
        values_MK = codes_MK.float()
    return _rescaled(_grouped_like(values_MK, scales_MG), scales_MG)


def round_to_grid(x_MK: Tensor, scales_MG: Tensor, *, format: NumberFormat) -> Tensor:
    """What x is after `quantize_symmetric` and back, float32, without making the codes."""
    y_MGE = _scaled(x_MK, scales_MG)
    if format.kind == "table":
        tables = _tables(format, y_MGE.device)
        y_MGE = _looked_up(tables.ascending, _places(y_MGE, tables))
    elif format.kind == "int":
        y_MGE = y_MGE.round_().clamp_(format.qmin, format.qmax)
    else:
        y_MGE = y_MGE.clamp_(format.qmin, format.qmax).to(format.code_dtype).float()
    return _rescaled(y_MGE, scales_MG)


def quantize_dynamic(
    x_MK: Tensor, *, format: NumberFormat, group_size: int, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Quantize with the range taken from x itself, per row and group, as inputs are.

    Arguments as for `choose_scales`. Returns (codes_MK, scales_MG).
    """
    scales_MG = choose_scales(x_MK, format=format, group_size=group_size, scale_dtype=scale_dtype)
    return quantize_symmetric(x_MK, scales_MG, format=format), scales_MG


def round_trip(
    x_MK: Tensor,
    *,
    format: NumberFormat,
    group_size: int,
    scale_dtype: torch.dtype,
    tensor_scale: Tensor | None = None,
) -> Tensor:
    """What x is after quantization in its own range and back, float32: what searches need.

    Arguments as for `choose_scales`; a weight passes its `choose_tensor_scale`.
    """
    scales_MG = choose_scales(
        x_MK,
        format=format,
        group_size=group_size,
        scale_dtype=scale_dtype,
        tensor_scale=tensor_scale,
    )
    return round_to_grid(x_MK, scales_MG, format=format)


def _divided(x: Tensor, *, by: float) -> Tensor:
    # by a tensor, because a GPU multiplies by the reciprocal of a number, which rounds differently
    x = x.float()
    return x / x.new_full((), by)


def _grouped_like(x_MK: Tensor, scales_MG: Tensor) -> Tensor:
    G = scales_MG.shape[-1]
    if G == 0 or x_MK.shape[-1] % G:
        raise ValueError(f"{G} scales per row do not divide {x_MK.shape[-1]} channels")
    return split_groups(x_MK, group_size=x_MK.shape[-1] // G)


def _scaled(x_MK: Tensor, scales_MG: Tensor) -> Tensor:
    # a true division: multiplying by the reciprocal rounds differently and would move codes
    return _grouped_like(x_MK.float(), scales_MG) / scales_MG.unsqueeze(-1)


def _rescaled(values_MGE: Tensor, scales_MG: Tensor) -> Tensor:
    return (values_MGE * scales_MG.unsqueeze(-1)).flatten(-2)


@dataclass(frozen=True)
class _Tables:
    """A format's values in ascending order, where one gives way to the next, and their codes."""

    ascending: Tensor
    midpoints: Tensor
    codes: Tensor
    by_code: Tensor


# kept per device: making a tensor from a list waits for the GPU
@functools.cache
def _tables(format: NumberFormat, device: torch.device) -> _Tables:
    values = sorted(set(format.values))
    ascending = torch.tensor(values, device=device)
    codes = [format.values.index(value) for value in values]
    by_code = torch.tensor(format.values, device=device)
    midpoints = (ascending[1:] + ascending[:-1]) / 2
    codes_of = torch.tensor(codes, dtype=format.code_dtype, device=device)
    return _Tables(ascending, midpoints, codes_of, by_code)


def _places(y_MGE: Tensor, tables: _Tables) -> Tensor:
    """Index into the ascending values of the one nearest to y."""
    return torch.bucketize(y_MGE.contiguous(), tables.midpoints, right=True, out_int32=True)


def _looked_up(table: Tensor, places: Tensor) -> Tensor:
    # three times as fast as table[places]
    return table.index_select(0, places.flatten()).view(places.shape)


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
