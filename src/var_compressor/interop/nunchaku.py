"""An artifact in nunchaku's files: one safetensors of its own loader, or a diffusers folder.

    nunchaku        svdq-{precision}_r{rank}.safetensors with string metadata, and config.json
    nunchaku-lite   diffusion_pytorch_model.safetensors and the config.json of diffusers' quantizer

Tensors are called after our modules: ``blocks.0.self_attn.qkv.qweight``. Linears that no layout of
theirs holds without rounding again stay in 16 bits, and are told.

Source: nunchaku/models/transformers/utils.py of github.com/nunchaku-tech/nunchaku;
NunchakuLiteQuantizationConfig of diffusers 0.42.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from var_compressor.artifact import read_manifest, verify_files
from var_compressor.layers.linear import QuantizedLinear, load_compressed
from var_compressor.layers.nunchaku_linear import (
    Fit,
    Kind,
    common_rank,
    fit,
    pack_awq,
    pack_w4a4,
    plain_bias,
)
from var_compressor.models.config import config_to_dict
from var_compressor.models.directory import WEIGHTS
from var_compressor.models.new_directory import new_directory
from var_compressor.models.transformer import Infinity
from var_compressor.ops import nunchaku_layout as layout
from var_compressor.quant.linear import snr_db

CONFIG = "config.json"
_DTYPE_NAMES = {"int4": "int4", "nvfp4": "fp4_e2m1_all"}


@dataclass(frozen=True)
class Packed:
    """What was written: linears by kind ("int4", "nvfp4", "awq", "16 bits").

    ``why`` some are in 16 bits, per name inside a block; ``snr_db`` the lowest that rounding to 16
    bits, of factors, branch and zeros, leaves of a packed linear's weight.
    """

    files: tuple[str, ...]
    counts: Mapping[str, int]
    why: Mapping[str, str]
    snr_db: float


@dataclass
class _Model:
    """Everything that goes into the files."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    kinds: dict[str, Fit] = field(default_factory=dict)
    unsigned: list[str] = field(default_factory=list)
    rank: int = 0
    snr_db: float = 200.0

    def targets(self, *kinds: Kind) -> list[str]:
        return [name for name, found in self.kinds.items() if found.kind in kinds]

    @property
    def precision(self) -> Kind | None:
        """Of the W4A4 linears, which are all alike."""
        kinds: tuple[Kind, ...] = ("int4", "nvfp4")
        return next((kind for kind in kinds if self.targets(kind)), None)


def export_nunchaku(folder: Path, out: Path, *, dtype: torch.dtype, lite: bool) -> Packed:
    """Pack an artifact's transformer; ``dtype`` of everything that is not a code.

    Raises: ValueError when nothing of it has a layout of nunchaku's.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"nunchaku computes in 16 bits, not in {dtype}; use bfloat16 or float16")
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    transformer = load_compressed(folder, manifest, dtype=torch.float32, device="cpu")
    model = _packed(transformer, dtype, lite=lite, where=str(folder))
    config = {"_class_name": "Infinity", **config_to_dict(transformer.config)}
    with new_directory(out, overwrite=False) as target:
        if lite:
            config["quantization_config"] = _lite_config(model, dtype)
            weights = target / f"{WEIGHTS}.safetensors"
            metadata = {"format": "pt"}
        else:
            # the linears that want the fused feed-forward's unsigned inputs
            config["act_unsigned"] = model.unsigned
            precision = "fp4" if model.precision == "nvfp4" else "int4"
            weights = target / f"svdq-{precision}_r{model.rank}.safetensors"
            metadata = _metadata(model, config)
        save_file(model.tensors, weights, metadata=metadata)
        (target / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        # safetensors makes files that nobody else may read
        shutil.copymode(target / CONFIG, weights)
        files = (CONFIG, weights.name)
    return Packed(files, _counts(model), _reasons(model), model.snr_db)


def _packed(transformer: Infinity, dtype: torch.dtype, *, lite: bool, where: str) -> _Model:
    linears = {
        name: module
        for name, module in transformer.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    model = _Model(kinds={name: fit(linear) for name, linear in linears.items()})
    coded = model.targets("int4", "nvfp4")
    if not coded and not model.targets("awq"):
        reason = next(iter(model.kinds.values())).why if model.kinds else "no quantized linear"
        raise ValueError(f"{where}: nunchaku has no layout for any of its linears ({reason})")
    if model.targets("int4") and model.targets("nvfp4"):
        raise ValueError(f"{where}: has int4 and nvfp4 linears; a file of nunchaku's has one kind")
    if coded:
        model.rank = common_rank([linears[name] for name in coded])
    for name, tensor in transformer.state_dict().items():
        if name.rpartition(".")[0] not in linears:
            in_block = name.startswith("blocks.")
            model.tensors[name] = tensor.to(dtype if in_block else torch.float32).contiguous()
    for name, linear in linears.items():
        tensors = _pack(model, name, linear, dtype, lite=lite)
        model.tensors |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
    for name, tensor in model.tensors.items():
        if tensor.dtype == dtype and not bool(tensor.isfinite().all()):
            raise ValueError(f"{where}: {name} is out of the range of {dtype}; use bfloat16")
    return model


def _pack(
    model: _Model, name: str, linear: QuantizedLinear, dtype: torch.dtype, *, lite: bool
) -> dict[str, Tensor]:
    kind = model.kinds[name].kind
    if kind is None:
        weight_NK = linear.weight_on_inputs().to(dtype)
        return {"weight": weight_NK, "bias": plain_bias(linear).to(dtype)}
    if kind == "awq":
        tensors = pack_awq(linear, dtype=dtype)
        model.snr_db = min(model.snr_db, _awq_snr_db(linear, tensors))
        return tensors
    before = name.removesuffix("fc2") + "fc1"
    is_fused = model.kinds.get(before, Fit(None)).kind == kind
    unsigned = bool(linear.shift) and is_fused and not lite
    if unsigned:
        model.unsigned.append(name)
    tensors = pack_w4a4(linear, dtype=dtype, rank=model.rank, unsigned=unsigned)
    model.snr_db = min(model.snr_db, _snr_db(linear, tensors))
    if lite:
        del tensors["smooth_factor_orig"]
        if "wtscale" in tensors:
            tensors["wtscale"] = tensors["wtscale"].to(dtype)
    return tensors


def _snr_db(linear: QuantizedLinear, tensors: Mapping[str, Tensor]) -> float:
    """Of the weight that acts on plain inputs, packed against ours."""
    (N, half), rank = linear.qweight.shape, tensors["proj_up"].shape[1]
    smooth_K = layout.unpack_vector(tensors["smooth_factor"], size=2 * half).double()
    down_RK = layout.unpack_down(tensors["proj_down"], shape=(rank, 2 * half)).double()
    up_NR = layout.unpack_up(tensors["proj_up"], shape=(N, rank)).double()
    return snr_db(linear.weight_on_inputs(), linear.residual() / smooth_K + up_NR @ down_RK)


def _awq_snr_db(linear: QuantizedLinear, tensors: Mapping[str, Tensor]) -> float:
    """The zeros of AWQ, 7 scales each, are rounded; in float16 they are exact."""
    weight_NK = linear.residual()
    wscales, wzeros = (tensors[name].float().T for name in ("wscales", "wzeros"))
    lost_NG = wzeros + layout.AWQ_OFFSET * wscales
    lost_NK = lost_NG.repeat_interleave(weight_NK.shape[1] // lost_NG.shape[1], dim=1)
    return snr_db(weight_NK, weight_NK + lost_NK)


def _metadata(model: _Model, config: Mapping[str, Any]) -> dict[str, str]:
    """What nunchaku's loader reads: strings all of it."""
    quantization: dict[str, Any] = {"method": "svdquant", "rank": model.rank}
    is_nvfp4 = model.precision == "nvfp4"
    dtype = _DTYPE_NAMES[model.precision or "int4"]
    group_size = layout.NVFP4_GROUP if is_nvfp4 else layout.INT4_GROUP
    for part, scale_dtype in (
        ("weight", [None, "fp8_e4m3_nan"] if is_nvfp4 else None),
        ("activation", "fp8_e4m3_nan" if is_nvfp4 else None),
    ):
        quantization[part] = {"dtype": dtype, "scale_dtype": scale_dtype, "group_size": group_size}
    return {
        "config": json.dumps(config),
        "comfy_config": "{}",
        "model_class": "Infinity",
        "quantization_config": json.dumps(quantization),
    }


def _lite_config(model: _Model, dtype: torch.dtype) -> dict[str, Any]:
    """What diffusers' quantizer reads."""
    found: dict[str, Any] = {
        "quant_method": "nunchaku_lite",
        "compute_dtype": str(dtype).removeprefix("torch."),
    }
    if model.precision is not None:
        found["svdq_w4a4"] = {
            "precision": model.precision,
            "group_size": layout.NVFP4_GROUP if model.precision == "nvfp4" else layout.INT4_GROUP,
            "rank": model.rank,
            "targets": model.targets("int4", "nvfp4"),
        }
    if targets := model.targets("awq"):
        found["awq_w4a16"] = {
            "precision": "int4",
            "group_size": layout.INT4_GROUP,
            "targets": targets,
        }
    return found


def _counts(model: _Model) -> dict[str, int]:
    counts: dict[str, int] = {}
    for found in model.kinds.values():
        counts[found.kind or "16 bits"] = counts.get(found.kind or "16 bits", 0) + 1
    return counts


def _reasons(model: _Model) -> dict[str, str]:
    return {name.split(".", 2)[2]: found.why for name, found in model.kinds.items() if found.why}
