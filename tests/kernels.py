"""Where kernels are tested: on the GPU, or through Triton's interpreter. Import before triton.

The interpreter truncates where a GPU rounds to bf16, loses the carry when e4m3 rounds up to a power
of two, and cannot multiply bf16 matrices: there, 16-bit inputs are float16, other roundings may be
one unit off, and powers of two are left out of e4m3.
"""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
IS_INTERPRETED = DEVICE == "cpu"


def assert_rounded(found: torch.Tensor, exact: torch.Tensor, *, off_by_one: float = 0.0) -> None:
    """found is exact, rounded to found's dtype: to nearest, or either way by the interpreter.

    ``off_by_one``: the share of elements that may be one unit off.
    """
    wanted = exact.to(found.dtype).float()
    if not IS_INTERPRETED:
        assert (found.float() != wanted).float().mean() <= off_by_one
    mantissa = {torch.float8_e4m3fn: 3, torch.bfloat16: 7, torch.float16: 10}[found.dtype]
    smallest = torch.finfo(found.dtype).smallest_normal
    unit = exact.abs().clamp_min(smallest) * 2.0**-mantissa
    close = (found.float() - exact).abs() <= unit
    if IS_INTERPRETED and found.dtype == torch.float8_e4m3fn:
        close |= wanted.abs().frexp().mantissa == 0.5
    assert close.all()
