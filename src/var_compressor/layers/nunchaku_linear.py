"""Quantized linears in nunchaku's layout, and running them with its kernels where it is installed.

nunchaku is imported by `use_nunchaku` alone. Its W4A4 linears read their inputs signed; only its
fused feed-forward quantizes what GELU puts out as unsigned codes, shifted as ours are.

Shapes: N output and K input channels, G groups, R rank of the branch.

Source: nunchaku/models/linear.py and nunchaku/ops/fused.py of github.com/nunchaku-tech/nunchaku.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from var_compressor.layers.linear import QuantizedLinear
from var_compressor.models.transformer import FeedForward, Infinity
from var_compressor.ops import nunchaku_layout as layout
from var_compressor.ops.packing import unpack_codes

Kind = Literal["int4", "nvfp4", "awq"]
INT4_CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9))
NVFP4_CAPABILITIES = ((12, 0), (12, 1))
_INSTALL = (
    "nunchaku is not installed; its wheels are on github.com/nunchaku-tech/nunchaku/releases "
    "(the nunchaku of PyPI is another package), or use --compute auto"
)


class NunchakuError(ValueError):
    """What nunchaku has no kernels for, or cannot run here; the message tells the way out."""


@dataclass(frozen=True)
class Fit:
    """Which of nunchaku's linears holds one of ours: None, and then why there is none."""

    kind: Kind | None
    why: str = ""


def fit(linear: QuantizedLinear) -> Fit:
    """nunchaku's linear for one of ours; nothing is rounded a second time to make one fit."""
    (N, columns), act = linear.qweight.shape, linear.act_format
    if linear.weight_format.name not in ("sint4", "nvfp4"):
        return Fit(None, f"{linear.weight_format.name} weights")
    K = 2 * columns
    group_size = K // linear.wscales.shape[1]
    if linear.weight_format.name == "sint4" and group_size != layout.INT4_GROUP:
        return Fit(None, f"groups of {group_size}, nunchaku has {layout.INT4_GROUP}")
    if act is None:
        return _fit_awq(linear, N)
    wanted = ("sint4", "uint4") if linear.weight_format.name == "sint4" else ("nvfp4",)
    if act.name not in wanted or linear.act_group_size != group_size:
        return Fit(None, f"{act.name} inputs in groups of {linear.act_group_size}")
    if N % layout.TILE or K % layout.TILE:
        return Fit(None, f"[{N}, {K}] are no multiples of {layout.TILE}")
    return Fit("int4" if linear.weight_format.name == "sint4" else "nvfp4")


def _fit_awq(linear: QuantizedLinear, N: int) -> Fit:
    if linear.weight_format.name != "sint4":
        return Fit(None, f"{linear.weight_format.name} weights with 16-bit inputs")
    if len(linear.proj_down) or not bool((linear.smooth_factor == 1).all()):
        return Fit(None, "16-bit inputs with a branch or smoothing factors, AWQ has neither")
    return Fit("awq") if N % 4 == 0 else Fit(None, f"{N} rows are no multiple of 4")


def w4a4_tensors(
    codes_NK: Tensor,
    stored_scales_NG: Tensor,
    *,
    smooth_K: Tensor,
    branch: tuple[Tensor, Tensor],
    bias_N: Tensor,
    shift: float,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """A packed W4A4 linear, under the names of nunchaku's version 2.

    ``stored_scales_NG``: e4m3 for NVFP4, else cast to ``dtype``. ``branch`` (down_RK, up_NR) acts
    on smoothed inputs; the kernel's does on plain ones. ``bias_N`` is that of a shifted input; what
    the branch would have seen of the shift is added to it.
    """
    down_RK, up_NR = branch
    plain_down_RK = down_RK.double() / smooth_K.double()
    bias_N = bias_N.double() + shift * (up_NR.double() @ plain_down_RK.sum(-1))
    is_nvfp4 = stored_scales_NG.dtype == torch.float8_e4m3fn
    packed_smooth = layout.pack_vector(smooth_K.to(dtype))
    tensors = {
        "qweight": layout.pack_weight(codes_NK),
        "wscales": layout.pack_micro_scales(stored_scales_NG)
        if is_nvfp4
        else layout.pack_group_scales(stored_scales_NG.to(dtype)),
        "bias": layout.pack_vector(bias_N.to(dtype)),
        "smooth_factor": packed_smooth,
        # of no use to the kernels, but a loader wants it
        "smooth_factor_orig": packed_smooth.clone(),
        "proj_down": layout.pack_down(plain_down_RK.to(dtype)),
        "proj_up": layout.pack_up(up_NR.to(dtype)),
    }
    if is_nvfp4:
        tensors["wcscales"] = torch.ones(len(tensors["bias"]), dtype=dtype, device=codes_NK.device)
    return tensors


def pack_w4a4(
    linear: QuantizedLinear, *, dtype: torch.dtype, rank: int, unsigned: bool
) -> dict[str, Tensor]:
    """A linear that `fit` calls int4 or nvfp4, with its branch filled up to ``rank``.

    ``unsigned``: for the fused feed-forward, which shifts what GELU puts out; else the linear reads
    plain signed inputs, whatever its recipe says.
    """
    missing = rank - len(linear.proj_down)
    down_RK = nn.functional.pad(linear.proj_down, (0, 0, 0, missing))
    up_NR = nn.functional.pad(linear.proj_up, (0, missing))
    bias_N, shift = linear.bias.double(), linear.shift
    if shift and not unsigned:
        bias_N, shift = plain_bias(linear), 0.0
    tensors = w4a4_tensors(
        unpack_codes(linear.qweight, format=linear.weight_format),
        linear.wscales,
        smooth_K=linear.smooth_factor,
        branch=(down_RK, up_NR),
        bias_N=bias_N,
        shift=shift,
        dtype=dtype,
    )
    if linear.wtscale is not None:
        tensors["wtscale"] = linear.wtscale.reshape(1).float()
    return tensors


def plain_bias(linear: QuantizedLinear) -> Tensor:
    """The bias for inputs that are not shifted, float64 ``[N]``."""
    return linear.bias.double() + linear.shift * linear.weight_on_inputs().sum(-1)


def pack_awq(linear: QuantizedLinear, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """A linear that `fit` calls awq."""
    codes_NK = unpack_codes(linear.qweight, format=linear.weight_format)
    wscales_GN, wzeros_GN = layout.awq_scales(linear.wscales.to(dtype))
    return {
        "qweight": layout.pack_awq_weight(codes_NK),
        "wscales": wscales_GN,
        "wzeros": wzeros_GN,
        "bias": linear.bias.to(dtype),
    }


def common_rank(linears: list[QuantizedLinear]) -> int:
    """The one rank that nunchaku gives all W4A4 linears: whole tiles, at least one."""
    largest = max(len(linear.proj_down) for linear in linears)
    return layout.padded_size(max(largest, 1), layout.RANK_TILE)


# --- running --------------------------------------------------------------------------------------


class NunchakuLinear(nn.Module):
    """A W4A4 linear that nunchaku's own module computes."""

    def __init__(self, kernel: nn.Module) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        y_1MN = self.kernel(x.flatten(0, -2).unsqueeze(0))
        return y_1MN.view(*x.shape[:-1], -1)


class NunchakuFeedForward(nn.Module):
    """Both linears with GELU between them in nunchaku's fused operation."""

    def __init__(self, fc1: nn.Module, fc2: nn.Module, fused: Any) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fused = fc1, fc2, fused

    def forward(self, x: Tensor) -> Tensor:
        y_1MN = self.fused(x.flatten(0, -2).unsqueeze(0), self.fc1, self.fc2)
        return y_1MN.view(*x.shape[:-1], -1)


def use_nunchaku(transformer: Infinity, *, capability: tuple[int, int] | None) -> None:
    """Let nunchaku multiply from now on, in place of every linear that its kernels hold exactly.

    Other linears stay as they are. ``capability`` of the GPU, None without one.
    Raises: NunchakuError when it cannot run here, or holds none of these linears.
    """
    linears = {
        name: module
        for name, module in transformer.blocks.named_modules()
        if isinstance(module, QuantizedLinear) and fit(module).kind in ("int4", "nvfp4")
    }
    _check_runs(transformer, linears, capability)
    try:
        from nunchaku.models.linear import SVDQW4A4Linear
        from nunchaku.ops.fused import fused_gelu_mlp
    except ImportError:
        raise NunchakuError(_INSTALL) from None
    rank, dtype = common_rank(list(linears.values())), transformer.block_dtype

    def kernel(name: str, *, unsigned: bool) -> nn.Module:
        return _kernel(SVDQW4A4Linear, linears[name], dtype=dtype, rank=rank, unsigned=unsigned)

    for name, module in list(transformer.blocks.named_modules()):
        if isinstance(module, FeedForward) and _fuses(module, name, linears):
            fc1 = kernel(f"{name}.fc1", unsigned=False)
            fc2 = kernel(f"{name}.fc2", unsigned=bool(linears[f"{name}.fc2"].shift))
            _put(transformer, name, NunchakuFeedForward(fc1, fc2, fused_gelu_mlp))
            del linears[f"{name}.fc1"], linears[f"{name}.fc2"]
    for name, linear in linears.items():
        # a shifted input that is not fused stays with the linear that knows of the shift
        if not linear.shift:
            _put(transformer, name, NunchakuLinear(kernel(name, unsigned=False)))


def _fuses(ffn: FeedForward, name: str, linears: dict[str, QuantizedLinear]) -> bool:
    """The fused operation always shifts in INT4, and never in NVFP4."""
    if not {f"{name}.fc1", f"{name}.fc2"} <= linears.keys():
        return False
    fc2: QuantizedLinear = ffn.fc2  # type: ignore[assignment]
    return fc2.weight_format.name == "nvfp4" or fc2.shift != 0


def _check_runs(
    transformer: Infinity,
    linears: dict[str, QuantizedLinear],
    capability: tuple[int, int] | None,
) -> None:
    if capability is None:
        raise NunchakuError("nunchaku runs on a CUDA GPU; use --compute auto")
    if not linears:
        raise NunchakuError("nunchaku has no kernels for this model's linears; use --compute auto")
    kinds = {fit(linear).kind for linear in linears.values()}
    runs = {"int4": INT4_CAPABILITIES, "nvfp4": NVFP4_CAPABILITIES}
    for kind in sorted(kind for kind in kinds if kind is not None):
        if capability not in runs[kind]:
            known = ", ".join(f"sm_{major}{minor}" for major, minor in runs[kind])
            raise NunchakuError(
                f"nunchaku has {kind} kernels for {known}, this GPU is "
                f"sm_{capability[0]}{capability[1]}; use --compute auto"
            )
    if transformer.block_dtype not in (torch.bfloat16, torch.float16):
        raise NunchakuError(
            f"nunchaku computes in 16 bits, blocks are in {transformer.block_dtype}; use bfloat16"
        )
    if capability < (8, 0) and transformer.block_dtype == torch.bfloat16:
        raise NunchakuError("nunchaku has no bfloat16 on this GPU; use float16")


def _kernel(
    kernel_class: Any, linear: QuantizedLinear, *, dtype: torch.dtype, rank: int, unsigned: bool
) -> nn.Module:
    N, columns = linear.qweight.shape
    kernel = kernel_class(
        in_features=2 * columns,
        out_features=N,
        rank=rank,
        bias=True,
        precision=fit(linear).kind,
        act_unsigned=unsigned,
        torch_dtype=dtype,
        device=linear.qweight.device,
    )
    tensors = pack_w4a4(linear, dtype=dtype, rank=rank, unsigned=unsigned)
    if "wtscale" in tensors:
        # its module keeps it as a number
        kernel.wtscale = tensors.pop("wtscale").item()
    kernel.load_state_dict(tensors)
    module: nn.Module = kernel.requires_grad_(False)
    return module


def _put(transformer: Infinity, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(transformer.blocks.get_submodule(parent), attribute, module)
