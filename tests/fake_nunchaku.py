"""What nunchaku's kernels compute from packed tensors, on a CPU, by the index of every element.

Stands in for the package where it is not installed. Written from the layout's formulas, element by
element, so that it knows nothing of how this project packs. Only what the project calls is here.
"""

from __future__ import annotations

import functools
import sys
import types

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GELU_SHIFT = 0.171875
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def grid(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return torch.arange(rows)[:, None], torch.arange(columns)[None]


def codes(qweight: Tensor, K: int) -> Tensor:
    """The 4-bit codes ``[N, K]``, 0..15."""
    N = len(qweight)
    n, k = grid(N, K)
    a, b, c = n // 16 % 8, n // 8 % 2, n % 8
    d, e, f = k // 32 % 2, k // 8 % 4, k % 8
    word = ((((n // 128 * (K // 64) + k // 64) * 8 + a) * 8 + c) * 4 + e) * 4 + b * 2 + d
    found = qweight.view(torch.uint8).flatten()[4 * word + f // 2].int()
    return found >> (4 * (f % 2)) & 15


def slot(n: Tensor) -> Tensor:
    n = n % 128
    return n // 16 * 16 + n // 2 % 4 * 4 + n // 8 % 2 * 2 + n % 2


def vector(packed: Tensor) -> Tensor:
    n = torch.arange(len(packed))
    return packed[n // 128 * 128 + slot(n)].float()


def group_scales(wscales: Tensor) -> Tensor:
    """``[N, G]`` of either precision."""
    G, N = wscales.shape
    n, g = grid(N, G)
    if wscales.dtype != torch.float8_e4m3fn:
        return wscales.flatten()[(n // 128 * G + g) * 128 + slot(n)].float()
    s, f, e = n % 128 // 32, n % 32 // 8, n % 8
    place = (((n // 128 * (G // 4) + g // 4) * 8 + e) * 4 + f) * 16 + s * 4 + g % 4
    return wscales.view(torch.uint8).flatten()[place].view(torch.float8_e4m3fn).float()


def tiled(packed: Tensor, channel: Tensor, rank: Tensor, p: Tensor, q: Tensor) -> Tensor:
    R = packed.shape[1]
    tile = channel // 16 * (R // 16) + rank // 16
    place = ((tile * 8 + p % 8) * 4 + q // 2 % 4) * 8 + p // 8 * 4 + q // 8 * 2 + q % 2
    return packed.flatten()[place].float()


def down(packed: Tensor) -> Tensor:
    """``[R, K]``."""
    r, k = grid(packed.shape[1], packed.shape[0])
    return tiled(packed, k, r, r % 16, k % 16)


def up(packed: Tensor) -> Tensor:
    """``[N, R]``."""
    n, r = grid(*packed.shape)
    return tiled(packed, n, r, n % 16, r % 16)


class SVDQW4A4Linear(nn.Module):
    def __init__(
        self,
        in_features,
        out_features,
        rank=32,
        bias=True,
        precision="int4",
        act_unsigned=False,
        torch_dtype=torch.bfloat16,
        device=None,
    ):
        super().__init__()
        assert in_features % 128 == out_features % 128 == rank % 16 == 0
        self.K, self.precision, self.act_unsigned = in_features, precision, act_unsigned
        self.dtype = torch_dtype
        is_fp4 = precision == "nvfp4"
        groups = in_features // (16 if is_fp4 else 64)
        self.wtscale = 1.0 if is_fp4 else None
        for name, shape, dtype in (
            ("qweight", (out_features, in_features // 2), torch.int8),
            ("wscales", (groups, out_features), torch.float8_e4m3fn if is_fp4 else torch_dtype),
            ("bias", (out_features,), torch_dtype),
            ("smooth_factor", (in_features,), torch_dtype),
            ("smooth_factor_orig", (in_features,), torch_dtype),
            ("proj_down", (in_features, rank), torch_dtype),
            ("proj_up", (out_features, rank), torch_dtype),
            *([("wcscales", (out_features,), torch_dtype)] if is_fp4 else []),
        ):
            empty = torch.empty(shape, dtype=dtype, device=device)
            setattr(self, name, nn.Parameter(empty, requires_grad=False))

    def quantize(self, x_MK: Tensor, *, shift: float = 0.0) -> tuple[Tensor, Tensor]:
        """The smoothed input as it is multiplied, and what the branch makes of the plain one."""
        low_MR = x_MK.float() @ self.branch[0].T
        x_hat = ((x_MK + shift) / vector(self.smooth_factor).to(x_MK.dtype)).float()
        if self.precision == "nvfp4":
            x_MGE = x_hat.unflatten(-1, (-1, 16))
            scale = (x_MGE.abs().amax(-1, keepdim=True) / 6).to(torch.float8_e4m3fn).float()
            scale[scale == 0] = 1
            nearest = (x_MGE / scale).unsqueeze(-1).sub(E2M1).abs().argmin(-1)
            return (E2M1[nearest] * scale).flatten(1), low_MR
        x_MGE = x_hat.unflatten(-1, (-1, 64))
        lowest, highest = (0, 15) if self.act_unsigned else (-7, 7)
        scale = (x_MGE.abs().amax(-1, keepdim=True) / highest).to(x_MK.dtype).float()
        scale[scale == 0] = 1
        return ((x_MGE / scale).round().clamp(lowest, highest) * scale).flatten(1), low_MR

    @functools.cached_property
    def weight(self) -> Tensor:
        """The residual ``[N, K]`` that the codes stand for."""
        found = codes(self.qweight, self.K)
        values = E2M1[found] if self.precision == "nvfp4" else found - 16 * (found > 7)
        scales = group_scales(self.wscales)
        weight = values * scales.repeat_interleave(self.K // scales.shape[1], dim=1)
        if self.precision == "nvfp4":
            weight = weight * self.wtscale * vector(self.wcscales)[:, None]
        return weight

    @functools.cached_property
    def branch(self) -> tuple[Tensor, Tensor]:
        return down(self.proj_down), up(self.proj_up)

    def forward_quant(self, quantized: tuple[Tensor, Tensor]) -> Tensor:
        x_MK, low_MR = quantized
        y_MN = x_MK @ self.weight.T + low_MR @ self.branch[1].T + vector(self.bias)
        return y_MN.to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, channels = x.shape
        assert not self.act_unsigned and channels == self.K and x.dtype == self.dtype
        return self.forward_quant(self.quantize(x.reshape(-1, channels))).view(batch, length, -1)


def fused_gelu_mlp(x: Tensor, fc1: SVDQW4A4Linear, fc2: SVDQW4A4Linear) -> Tensor:
    batch, length, channels = x.shape
    hidden = fc1.forward_quant(fc1.quantize(x.reshape(-1, channels)))
    hidden = F.gelu(hidden, approximate="tanh")
    is_int4 = fc2.precision == "int4"
    assert fc2.act_unsigned == is_int4
    quantized = fc2.quantize(hidden, shift=GELU_SHIFT if is_int4 else 0.0)
    return fc2.forward_quant(quantized).view(batch, length, -1)


def install(monkeypatch) -> None:
    """As `nunchaku`, until the test is over."""
    modules = {name: types.ModuleType(name) for name in ("nunchaku", "nunchaku.models")}
    modules["nunchaku.ops"] = types.ModuleType("nunchaku.ops")
    linear, fused = (types.ModuleType(name) for name in ("linear", "fused"))
    linear.SVDQW4A4Linear, fused.fused_gelu_mlp = SVDQW4A4Linear, fused_gelu_mlp
    modules |= {"nunchaku.models.linear": linear, "nunchaku.ops.fused": fused}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
