"""What an original's stored linears are: number format, integer codes, branch, one by one.

The original stores dequantized weights. A code is what weight / scale rounds to; that it is *the*
code is proved by multiplying it out again: the stored bytes must come back.

Shapes: N output and K input channels, G groups, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from var_compressor.interop.original import (
    BRANCH,
    SCALE,
    SMOOTH,
    OriginalFiles,
    Place,
    Problems,
)
from var_compressor.ops.primitives import (
    FORMATS,
    QuantizedWeight,
    dequantize_symmetric,
    effective_scales,
    quantize_symmetric,
)
from var_compressor.spec import WHOLE_ROW

# rows that tell 4-bit from 8-bit codes: of these, every group reaches 127 or nearly so
_SAMPLE_ROWS, _EIGHT_BITS = 16, 64
# a code further than this share of a step from the stored value could as well be its neighbour
_AMBIGUOUS = 0.25


@dataclass(frozen=True)
class Stored:
    """How a linear's weight is stored: number format, and input channels per scale."""

    format: str
    group_size: int


@dataclass(frozen=True)
class Recovery:
    """How well the codes of a weight are known.

    ``num_inexact`` do not give back the stored value bit by bit; ``num_ambiguous`` of these are a
    quarter step or more away from it; ``max_deviation`` in steps.
    """

    num_codes: int
    num_inexact: int
    num_ambiguous: int
    max_deviation: float


def stored_format(files: OriginalFiles, block: str, place: Place) -> Stored | None:
    """Of one of our linears; None where scale.pt has nothing of it: 16 bits.

    Raises: ValueError saying what its scales are instead.
    """
    found = {part: files.scales_of(block, part) for part in place.parts}
    absent = [part for part, (scales, _) in found.items() if scales is None]
    if len(absent) == len(found):
        return None
    if absent:
        raise ValueError(f"{SCALE} lacks {', '.join(absent)}")
    kinds = {_part_format(files, block, part) for part in place.parts}
    if len(kinds) > 1:
        raise ValueError(f"{SCALE}: {', '.join(place.parts)} have different formats")
    tensor_scales = [whole for _, whole in found.values() if whole is not None]
    if any(not torch.equal(one, tensor_scales[0]) for one in tensor_scales):
        raise ValueError(
            f"{SCALE}: {', '.join(place.parts)} have different NVFP4 tensor scales, which one "
            "weight of all of them cannot have"
        )
    return kinds.pop()


def _part_format(files: OriginalFiles, block: str, part: str) -> Stored:
    scales, tensor_scale = files.scales_of(block, part)
    assert scales is not None
    N, K = files.model.info(f"{block}.{part}.weight").shape
    groups = scales.shape[2] if scales.ndim == 4 else 0
    if scales.shape != (N, 1, groups, 1) or groups == 0 or K % groups:
        raise ValueError(
            f"{SCALE}: {part} has shape {list(scales.shape)}, its weight is [{N}, {K}]"
        )
    if f"{block}.{part}.weight.scale.1" in files.wscales:
        if tensor_scale is None or tensor_scale.numel() != 1 or K // groups != 16:
            raise ValueError(f"{SCALE}: {part} is not NVFP4: groups of {K // groups}")
        if not torch.equal(scales.to(torch.float8_e4m3fn).float(), scales):
            raise ValueError(f"{SCALE}: {part} has NVFP4 scales that are not e4m3")
        return Stored("nvfp4", 16)
    group_size = WHOLE_ROW if groups == 1 else K // groups
    sample_nK = files.weight(block, part)[:_SAMPLE_ROWS]
    steps = sample_nK.unflatten(1, (groups, -1)) / scales[:_SAMPLE_ROWS, 0]
    nbits = 8 if float(steps.abs().max()) > _EIGHT_BITS else 4
    if nbits == 4 and group_size == WHOLE_ROW and K == 64:
        group_size = 64
    return Stored(f"sint{nbits}", group_size)


def recover(
    files: OriginalFiles, block: str, place: Place, stored: Stored
) -> tuple[QuantizedWeight, Recovery]:
    """The codes and scales (float32, as stored) of one of our linears."""
    format = FORMATS[stored.format]
    codes, scales_of_parts, recoveries = [], [], []
    tensor_scale = None
    for part in place.parts:
        stored_scales, tensor_scale = files.scales_of(block, part)
        assert stored_scales is not None
        scales_NG = stored_scales[:, 0, :, 0]
        if tensor_scale is not None:
            tensor_scale = tensor_scale.reshape(())
        scales_NG = effective_scales(scales_NG, tensor_scale)
        weight_NK = files.weight(block, part)
        codes_NK = quantize_symmetric(weight_NK, scales_NG, format=format)
        one = QuantizedWeight(codes_NK, scales_NG, format, tensor_scale)
        codes.append(codes_NK)
        scales_of_parts.append(scales_NG)
        recoveries.append(_judged(weight_NK, one, files.weight_dtype(block, part)))
    weight = QuantizedWeight(torch.cat(codes), torch.cat(scales_of_parts), format, tensor_scale)
    return weight, Recovery(
        sum(one.num_codes for one in recoveries),
        sum(one.num_inexact for one in recoveries),
        sum(one.num_ambiguous for one in recoveries),
        max(one.max_deviation for one in recoveries),
    )


def _judged(weight_NK: Tensor, found: QuantizedWeight, dtype: torch.dtype) -> Recovery:
    again_NK = dequantize_symmetric(found.codes_NK, found.scales_NG, format=found.format)
    # bf16(code * scale) and bf16(code * bf16(scale)) are both what an original may have stored
    is_inexact_NK = again_NK.to(dtype) != weight_NK.to(dtype)
    step = 1.0 if found.format.kind == "int" else 0.5
    group_size = weight_NK.shape[1] // found.scales_NG.shape[1]
    steps_NK = found.scales_NG.repeat_interleave(group_size, dim=1) * step
    deviation_NK = (again_NK - weight_NK).abs_().div_(steps_NK)
    return Recovery(
        weight_NK.numel(),
        int(is_inexact_NK.sum()),
        int((is_inexact_NK & (deviation_NK > _AMBIGUOUS)).sum()),
        float(deviation_NK.max()),
    )


# --- factors and branches -------------------------------------------------------------------------


def smooth_factors(files: OriginalFiles, block: str, place: Place, in_features: int) -> Tensor:
    """What inputs are divided by, float32 ``[K]``; 1 where smooth.pt is empty.

    Raises: ValueError when there are none, or of another length.
    """
    if not files.smooth:
        return torch.ones(in_features)
    factors_K = files.smooth.get(f"{block}.{place.smooth}")
    if factors_K is None:
        raise ValueError(f"{SMOOTH} lacks {place.smooth}")
    if factors_K.shape != (in_features,):
        raise ValueError(
            f"{SMOOTH}: {place.smooth} has shape {list(factors_K.shape)}, expected [{in_features}]"
        )
    return factors_K


def branch_of(
    files: OriginalFiles, block: str, place: Place, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """``(down_RK, up_NR)`` of one of our linears of shape (N, K); ranks that add nothing left out.

    Raises: ValueError for shapes that do not fit.
    """
    N, K = shape
    found = files.branch.get(f"{block}.{place.branch}")
    if found is None:
        return torch.zeros(0, K), torch.zeros(N, 0)
    down_RK, up = found
    first = place.first_row * K
    is_joint = place.branch in ("sa.to_q", "ca.to_q")
    rows = 3 * K if is_joint else N
    if down_RK.shape[1] != K or len(up) != rows:
        raise ValueError(
            f"{BRANCH}: {place.branch} has a {list(down_RK.shape)} and b {list(up.shape)}, "
            f"expected {K} columns and {rows} rows"
        )
    if place.branch == "ca.to_q":
        down_RK, up = _own_half(down_RK, up, of_text=place.first_row > 0, num_queries=K)
    up_NR = up[first : first + N]
    matters_R = (up_NR != 0).any(0) & (down_RK != 0).any(1)
    rank = int(matters_R.nonzero().max()) + 1 if bool(matters_R.any()) else 0
    return down_RK[:rank], up_NR[:, :rank]


def _own_half(
    down_RK: Tensor, up: Tensor, *, of_text: bool, num_queries: int
) -> tuple[Tensor, Tensor]:
    """A joint branch that is two beside each other (as our export writes it): one of them."""
    half = len(down_RK) // 2
    is_two = len(down_RK) == 2 * half and not bool(
        up[:num_queries, half:].any() or up[num_queries:, :half].any()
    )
    if not is_two:
        return down_RK, up
    ranks = slice(half, None) if of_text else slice(0, half)
    return down_RK[ranks], up[:, ranks]


def check_linear(
    files: OriginalFiles,
    block: str,
    place: Place,
    shape: tuple[int, int],
    problems: Problems,
    index: int,
) -> tuple[Stored | None, int]:
    """Format and rank of a linear; what does not fit goes to ``problems``."""
    stored, rank = None, 0
    try:
        stored = stored_format(files, block, place)
    except ValueError as error:
        problems.add(str(error), index)
    if stored is None:
        return None, 0
    for check in (
        lambda: smooth_factors(files, block, place, shape[1]),
        lambda: branch_of(files, block, place, shape),
    ):
        try:
            found = check()
        except ValueError as error:
            problems.add(str(error), index)
            continue
        rank = len(found[0]) if isinstance(found, tuple) else rank
    return stored, rank
