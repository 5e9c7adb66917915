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
    block_file,
    read_tensors,
)
from var_compressor.models.config import InfinityConfig, config_from_dict
from var_compressor.models.directory import meta_transformer
from var_compressor.models.transformer import Infinity
from var_compressor.ops import reference as ops
from var_compressor.ops.primitives import FORMATS
from var_compressor.spec import WHOLE_ROW, LinearSpec, QuantSpec


class QuantizedLinear(nn.Module):
    """``y = Q(x / smooth) Qw^T + (x / smooth) down^T up^T + bias`` from packed weights.

    ``qweight`` uint8 ``[N, K/2]`` (two 4-bit codes a byte) or int8 ``[N, K]``; ``wscales`` bf16
    ``[N, G]``; ``smooth_factor`` float32 ``[K]``; ``proj_down`` bf16 ``[R, K]`` and ``proj_up``
    bf16 ``[N, R]`` (R may be 0); ``bias`` ``[N]``. A 16-bit input (``act_format`` None) is not
    quantized. The result has the dtype of the input.
    Raises: ValueError for a pair of formats that no op multiplies.
    """

    qweight: Tensor
    wscales: Tensor
    smooth_factor: Tensor
    proj_down: Tensor
    proj_up: Tensor
    bias: Tensor

    def __init__(
        self, in_features: int, out_features: int, spec: LinearSpec, *, bias_dtype: torch.dtype
    ) -> None:
        super().__init__()
        check_runnable(spec)
        weight_format = FORMATS[spec.weight.format]
        rank = spec.low_rank.rank
        groups = in_features // resolved_group(spec.weight.group_size, in_features)
        packed = weight_format.nbits == 4
        columns = in_features // 2 if packed else in_features
        code_dtype = torch.uint8 if packed else torch.int8
        self.act_format = FORMATS[spec.act.format] if spec.act.format else None
        self.act_group_size = resolved_group(spec.act.group_size, in_features)
        self.weight_nbits = weight_format.nbits
        for name, shape, dtype in (
            ("qweight", (out_features, columns), code_dtype),
            ("wscales", (out_features, groups), torch.bfloat16),
            ("smooth_factor", (in_features,), torch.float32),
            ("proj_down", (rank, in_features), torch.bfloat16),
            ("proj_up", (out_features, rank), torch.bfloat16),
            ("bias", (out_features,), bias_dtype),
        ):
            self.register_buffer(name, torch.empty(shape, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        x_MK = x.flatten(0, -2)
        if self.act_format is None:
            y_MN = self._forward_16bit(x_MK)
        else:
            codes_MK, xscales_MG, low_MR = ops.quantize_act(
                x_MK,
                self.smooth_factor,
                self.proj_down,
                group_size=self.act_group_size,
                format=self.act_format,
            )
            gemm = ops.gemm_w4a4 if self.weight_nbits == 4 else ops.gemm_w8a8
            y_MN = gemm(
                codes_MK, xscales_MG, self.qweight, self.wscales, low_MR, self.proj_up, self.bias
            )
        return y_MN.to(x.dtype).unflatten(0, x.shape[:-1])

    def _forward_16bit(self, x_MK: Tensor) -> Tensor:
        x_hat_MK = x_MK.float() / self.smooth_factor
        low_MR = x_hat_MK @ self.proj_down.float().T
        return ops.gemm_w4a16(x_hat_MK, self.qweight, self.wscales, low_MR, self.proj_up, self.bias)


def check_runnable(spec: LinearSpec) -> None:
    """Raises: ValueError naming the pair of formats when no op multiplies them."""
    weight, act = spec.weight.format, spec.act.format
    runnable = {("sint4", "sint4"), ("sint4", "sint8"), ("sint4", None), ("sint8", "sint8")}
    if (weight, act) not in runnable:
        pairs = ", ".join(f"{w} x {a or '16 bits'}" for w, a in sorted(runnable, key=str))
        raise ValueError(
            f"weight format {weight} with input format {act or '16 bits'} has no op yet; "
            f"use {pairs}"
        )
    if weight == "sint8" and (spec.weight.group_size, spec.act.group_size) != (WHOLE_ROW,) * 2:
        raise ValueError(
            f"sint8 weights take one scale per row: set both group_size to {WHOLE_ROW}"
        )
    same_groups = spec.act.group_size == spec.weight.group_size
    if (weight, act) == ("sint4", "sint4") and not same_groups:
        raise ValueError(
            f"weight groups of {spec.weight.group_size} and input groups of "
            f"{spec.act.group_size} differ; W4A4 needs the same"
        )
    if (weight, act) == ("sint4", "sint8") and spec.act.group_size != WHOLE_ROW:
        raise ValueError(f"sint8 inputs take one scale per token: set act.group_size={WHOLE_ROW}")


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
    folder: Path, manifest: Manifest, *, dtype: torch.dtype, device: torch.device | str
) -> Infinity:
    """The transformer of an artifact: packed weights as stored, other block tensors in ``dtype``.

    Weights stay packed from the file to the multiplication.
    Raises: ArtifactError naming file and tensor when something does not fit.
    """
    config = config_from_dict(InfinityConfig, manifest.config, f"{folder}: config")
    spec = QuantSpec.from_dict(manifest.spec)
    model = meta_transformer(config, dtype)
    for index, block in enumerate(model.blocks):
        swap_linears(block, linear_specs(spec, block, index))
        _fill(block, folder / block_file(index), device)
    outside = {n: t for n, t in model.state_dict().items() if not n.startswith("blocks.")}
    _fill(model, folder / TRANSFORMER_FILE, device, expected=outside)
    return model.requires_grad_(False).eval()


def _fill(
    module: nn.Module,
    path: Path,
    device: torch.device | str,
    *,
    expected: Mapping[str, Tensor] | None = None,
) -> None:
    expected = module.state_dict() if expected is None else expected
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
    """Shape and, because codes must not be cast, the dtype; all floats count as one."""
    if tensor is None:
        return "missing"
    dtype = "float" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} {list(tensor.shape)}"
