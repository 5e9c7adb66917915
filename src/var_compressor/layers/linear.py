"""Linears that own quantized state, and putting them in place of ``nn.Linear``.

Shapes: N output and K input channels, G groups, R rank of the branch, M tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from var_compressor.artifact import (
    TRANSFORMER_FILE,
    ArtifactError,
    Manifest,
    artifact_folder,
    block_file,
    read_tensors,
)
from var_compressor.models.config import InfinityConfig, config_from_dict
from var_compressor.models.directory import meta_transformer
from var_compressor.models.tensor_files import OnTensor
from var_compressor.models.transformer import Infinity
from var_compressor.ops import reference as ops
from var_compressor.ops.packing import pack_codes, packed_columns, unpack_codes
from var_compressor.ops.primitives import (
    FORMATS,
    QuantizedWeight,
    dequantize_symmetric,
    effective_scales,
    stored_scales,
)
from var_compressor.spec import WHOLE_ROW, LinearSpec, QuantSpec


class QuantizedLinear(nn.Module):
    """``y = Q(x_hat) Qw^T + x_hat down^T up^T + bias`` with ``x_hat = (x + shift) / smooth``.

    ``qweight`` uint8 ``[N, K/2]`` (two 4-bit codes a byte: sint4, nvfp4; other widths likewise
    without gaps), int8 or float8_e4m3fn ``[N, K]``; ``wscales`` ``[N, G]`` bf16, or for nvfp4
    float8_e4m3fn beside the float32 scalar ``wtscale``; ``smooth_factor`` float32 ``[K]``;
    ``proj_down`` bf16 ``[R, K]`` and ``proj_up`` bf16 ``[N, R]`` (R may be 0); ``bias`` ``[N]``. A
    16-bit input (``act_format`` None) is not quantized. With a shift the bias carries its
    correction and is float32. The result has the dtype of the input.
    Raises: ValueError for a pair of group sizes that no op multiplies.
    """

    qweight: Tensor
    wscales: Tensor
    wtscale: Tensor | None
    smooth_factor: Tensor
    proj_down: Tensor
    proj_up: Tensor
    bias: Tensor

    def __init__(
        self, in_features: int, out_features: int, spec: LinearSpec, *, bias_dtype: torch.dtype
    ) -> None:
        super().__init__()
        check_runnable(spec)
        self.weight_format = FORMATS[spec.weight.format]
        self.act_format = FORMATS[spec.act.format] if spec.act.format else None
        self.act_group_size = resolved_group(spec.act.group_size, in_features)
        self.shift = spec.shift
        rank = spec.low_rank.rank
        groups = in_features // resolved_group(spec.weight.group_size, in_features)
        columns = packed_columns(in_features, format=self.weight_format)
        code_dtype = torch.uint8 if self.weight_format.nbits < 8 else self.weight_format.code_dtype
        scale_dtype = self.weight_format.fixed_scale_dtype
        for name, shape, dtype in (
            ("qweight", (out_features, columns), code_dtype),
            ("wscales", (out_features, groups), scale_dtype or torch.bfloat16),
            ("smooth_factor", (in_features,), torch.float32),
            ("proj_down", (rank, in_features), torch.bfloat16),
            ("proj_up", (out_features, rank), torch.bfloat16),
            # a correction rounded to bf16 would leave an offset
            ("bias", (out_features,), torch.float32 if self.shift else bias_dtype),
        ):
            self.register_buffer(name, torch.empty(shape, dtype=dtype))
        self.register_buffer("wtscale", torch.empty(()) if scale_dtype else None)

    @classmethod
    def of(
        cls,
        spec: LinearSpec,
        weight: QuantizedWeight,
        *,
        smooth_factor_K: Tensor,
        down_RK: Tensor,
        up_NR: Tensor,
        bias_N: Tensor,
    ) -> QuantizedLinear:
        """The linear of a rounded residual, its branch (stored as bf16) and the plain bias.

        weight.scales_NG must be what storage holds: rounded to bf16, or as nvfp4 prescribes.
        """
        N, K = weight.codes_NK.shape
        with torch.device(weight.codes_NK.device):
            linear = cls(K, N, spec, bias_dtype=bias_N.dtype)
        assert linear.weight_format == weight.format
        linear.qweight.copy_(pack_codes(weight.codes_NK, format=weight.format))
        if linear.wtscale is not None:
            assert weight.tensor_scale is not None
            linear.wtscale.copy_(weight.tensor_scale)
        linear.wscales.copy_(
            stored_scales(weight.scales_NG, dtype=linear.wscales.dtype, tensor_scale=linear.wtscale)
        )
        assert torch.equal(linear.effective_scales(), weight.scales_NG), "scales changed in storage"
        linear.smooth_factor.copy_(smooth_factor_K)
        linear.proj_down.copy_(down_RK)
        linear.proj_up.copy_(up_NR)
        linear.bias.copy_(bias_N)
        if linear.shift:
            weight_NK = linear.weight_on_inputs()
            linear.bias.copy_(ops.shifted_bias(bias_N, weight_NK, shift=linear.shift))
        return linear

    def forward(self, x: Tensor) -> Tensor:
        x_MK = x.flatten(0, -2)
        y_MN = self._forward_16bit(x_MK) if self.act_format is None else self._forward(x_MK)
        return y_MN.to(x.dtype).unflatten(0, x.shape[:-1])

    def _forward(self, x_MK: Tensor) -> Tensor:
        assert self.act_format is not None
        codes_MK, xscales_MG, low_MR = ops.quantize_act(
            x_MK,
            self.smooth_factor,
            self.proj_down,
            group_size=self.act_group_size,
            format=self.act_format,
            shift=self.shift,
        )
        if self.act_format.kind == self.weight_format.kind == "int":
            has_4_bits = self.weight_format.nbits == 4
            gemm = ops.gemm_w4a4 if has_4_bits else ops.gemm_w8a8
            qweight = self.qweight
            if not has_4_bits:
                qweight = unpack_codes(qweight, format=self.weight_format)
            return gemm(
                codes_MK, xscales_MG, qweight, self.wscales, low_MR, self.proj_up, self.bias
            )
        qx_MK = dequantize_symmetric(codes_MK, xscales_MG, format=self.act_format)
        return ops.gemm_dequantized(qx_MK, self.residual(), low_MR, self.proj_up, self.bias)

    def _forward_16bit(self, x_MK: Tensor) -> Tensor:
        x_hat_MK = x_MK.float() / self.smooth_factor
        low_MR = x_hat_MK @ self.proj_down.float().T
        return ops.gemm_dequantized(x_hat_MK, self.residual(), low_MR, self.proj_up, self.bias)

    def effective_scales(self) -> Tensor:
        """Factor of every group's codes, float32 [N, G]."""
        return effective_scales(self.wscales, self.wtscale)

    def residual(self) -> Tensor:
        """The quantized part of the smoothed weight, dequantized: float32 [N, K]."""
        codes_NK = unpack_codes(self.qweight, format=self.weight_format)
        return dequantize_symmetric(codes_NK, self.effective_scales(), format=self.weight_format)

    def weight_on_inputs(self) -> Tensor:
        """The whole weight, branch included, as it acts on unsmoothed inputs: float64 [N, K]."""
        branch_NK = self.proj_up.double() @ self.proj_down.double()
        return (self.residual().double() + branch_NK) / self.smooth_factor.double()


def check_runnable(spec: LinearSpec) -> None:
    """Raises: ValueError naming a format that is not there, or the group sizes when integer codes
    can't be multiplied in them.
    """
    for name in (spec.weight.format, spec.act.format):
        if name is not None and name not in FORMATS:
            raise ValueError(f"the number format {name!r} has no entry in FORMATS")
    if spec.act.format is None:
        return
    if not FORMATS[spec.act.format].kind == FORMATS[spec.weight.format].kind == "int":
        return
    weight_group, act_group = spec.weight.group_size, spec.act.group_size
    if WHOLE_ROW in (weight_group, act_group):
        return
    if max(weight_group, act_group) % min(weight_group, act_group):
        raise ValueError(
            f"weight groups of {weight_group} and input groups of {act_group} do not nest; "
            "the integer product needs one to be a multiple of the other"
        )


def resolved_group(group_size: int, in_features: int) -> int:
    """Channels per scale, with WHOLE_ROW spelled out.

    Raises: ValueError when the channels do not split into groups.
    """
    size = in_features if group_size == WHOLE_ROW else group_size
    if in_features % size:
        raise ValueError(f"{in_features} input channels do not split into groups of {size}")
    return size


def swap_linears(block: nn.Module, specs: Mapping[str, LinearSpec]) -> None:
    """Replace the named linears of a block by empty quantized ones on the same device."""
    for name, spec in specs.items():
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        with torch.device(linear.weight.device):
            quantized = QuantizedLinear(
                linear.in_features, linear.out_features, spec, bias_dtype=linear.bias.dtype
            )
        parent, attribute = name.rsplit(".", 1)
        setattr(block.get_submodule(parent), attribute, quantized)


def linear_specs(spec: QuantSpec, block: nn.Module, index: int) -> dict[str, LinearSpec]:
    """The linears of block ``index`` that are quantized, and how."""
    named = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    found = {name: spec.for_module(f"blocks.{index}.{name}") for name in named}
    return {name: chosen for name, chosen in found.items() if chosen is not None}


def load_compressed(
    folder: Path,
    manifest: Manifest,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    on_tensor: OnTensor | None = None,
) -> Infinity:
    """The transformer of an artifact: packed weights as stored, other block tensors in ``dtype``.

    Weights stay packed from the file to the multiplication, and go to ``device`` block by block;
    ``on_tensor`` hears of every file: its name and bytes.
    Raises: ArtifactError naming file and tensor when something does not fit.
    """
    folder = artifact_folder(folder)
    config = config_from_dict(InfinityConfig, manifest.config, f"{folder}: config")
    spec = QuantSpec.from_dict(manifest.spec)
    model = meta_transformer(config, dtype)

    def fill(module: nn.Module, name: str, expected: Mapping[str, Tensor]) -> None:
        _fill(module, folder / name, device, expected)
        if on_tensor is not None:
            on_tensor(name, manifest.files[name]["bytes"])

    for index, block in enumerate(model.blocks):
        swap_linears(block, linear_specs(spec, block, index))
        fill(block, block_file(index), block.state_dict())
    outside = {n: t for n, t in model.state_dict().items() if not n.startswith("blocks.")}
    fill(model, TRANSFORMER_FILE, outside)
    return model.requires_grad_(False).eval()


def _fill(
    module: nn.Module, path: Path, device: torch.device | str, expected: Mapping[str, Tensor]
) -> None:
    tensors = read_tensors(path, str(device))
    for name in sorted(expected.keys() | tensors.keys()):
        wanted, found = _kind(expected.get(name)), _kind(tensors.get(name))
        if wanted != found:
            raise ArtifactError(
                f"{path}: {name} is {found}, expected {wanted}; make the artifact again"
            )
    state = {name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()}
    module.load_state_dict(state, strict=False, assign=True)


def _kind(tensor: Tensor | None) -> str:
    """Shape and, because codes must not be cast, the dtype; floats of 16 and 32 bits count as one.

    An 8-bit float holds codes or exact scales.
    """
    if tensor is None:
        return "missing"
    castable = tensor.is_floating_point() and tensor.itemsize > 1
    dtype = "float" if castable else str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} {list(tensor.shape)}"
