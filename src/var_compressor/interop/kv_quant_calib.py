"""``kv_quant_calib.pt``: the KV ranges as VAR-Compressor's original writes and reads them.

    params       {key: {scale: float32 [H, D], zero_point: int32 [H, D]}}
    percentiles  {key: {lo, hi: float32 [H, D], p: float}}
    diagnostics  {key: {mse_per_channel: float32 [H, D], mse_agg: float}}

with the keys ``block_chunks.{i}.module.{j}.sa.k.cache`` and ``….sa.v.cache``. Its runtime clamps
codes, not zero points, so ranges that exclude 0 work there too.

Source: calibrate_cache_quantization.py of VAR-Compressor, commit a9f224d.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from var_compressor.artifact import (
    KV_FILE,
    artifact_folder,
    is_artifact,
    read_kv,
    read_manifest,
    write_atomically,
)
from var_compressor.layers.kv_params import (
    CacheFormat,
    CacheParams,
    params_from_tensors,
    params_to_tensors,
    whole_layer,
)
from var_compressor.models.checkpoint import block_name
from var_compressor.models.config import InfinityConfig
from var_compressor.models.tensor_files import (
    CheckpointError,
    check_zip,
    is_plain,
    load_torch_zip,
)
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.kv_calibration import KVCalibration
from var_compressor.spec import KVSpec

FILE = "kv_quant_calib.pt"
# as the original's evaluation of the 8B calls it
SPELLINGS = (FILE, "kv_quant_calib_8b.pt")


def check_writable(spec: KVSpec) -> None:
    """Raises: ValueError for a cache that the file cannot describe."""
    if replace(spec, mode="per_channel", weighting="none", max_tokens_per_level=1) != KVSpec(
        weighting="none", max_tokens_per_level=1
    ):
        raise ValueError(
            f"{FILE} holds calibrated int8 ranges alone; use --format safetensors, or leave "
            "quant.kv.format, dynamic, plain_levels, keep and budget as they are"
        )


def write(path: Path, found: KVCalibration) -> None:
    """Write what ``calibrate_kv`` found with a spec that ``check_writable`` takes."""
    write_params(path, found.params, found.config, found.kv, found.mse_HD)


def write_params(
    path: Path,
    params: CacheParams,
    config: InfinityConfig,
    kv: dict[str, Any],
    mse_HD: Sequence[dict[str, Tensor]] | None = None,
) -> None:
    """Write a cache's parameters; ``kv`` is what a manifest says of them.

    Without ``mse_HD``, per layer, the errors of channels are NaN.
    Raises: ValueError for a cache that the file cannot describe.
    """
    if params.format != CacheFormat("int8", False, 0) or any(
        any(layer.dropped) for layer in params.layers
    ):
        raise ValueError(f"{FILE} holds calibrated int8 ranges of every level alone")
    content: dict[str, dict[str, Any]] = {"params": {}, "percentiles": {}, "diagnostics": {}}
    for index, layer in enumerate(params.layers):
        for part in "kv":
            key, told = _key(config, index, part), kv["layers"][index].get(part, {})
            scale_HD = getattr(layer.ranges, f"{part}_scale_HD").cpu()
            zero_HD = getattr(layer.ranges, f"{part}_zero_point_HD").cpu()
            content["params"][key] = {"scale": scale_HD, "zero_point": zero_HD}
            lo_HD, hi_HD = ((code - zero_HD) * scale_HD for code in (-128, 127))
            # the original's one percentile; a bound of our own per channel has none
            p = told.get("percentile", math.nan)
            content["percentiles"][key] = {"lo": lo_HD, "hi": hi_HD, "p": p}
            if mse_HD is None:
                errors_HD, mean = torch.full_like(scale_HD, math.nan), told.get("mse", math.nan)
            else:
                errors_HD = mse_HD[index][part]
                mean = float(errors_HD.median())
            content["diagnostics"][key] = {"mse_per_channel": errors_HD, "mse_agg": mean}
    buffer = BytesIO()
    torch.save(content, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def read(path: Path, config: InfinityConfig) -> CacheParams:
    """The ranges in a file of the original's or of ours.

    Raises: ValueError when it is not such a file, or naming the layer whose ranges cannot be.
    """
    try:
        check_zip(path)
        content = load_torch_zip(path)
    except (CheckpointError, OSError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(
            f"{path}: not a readable {FILE} ({reason}); give the file itself"
        ) from None
    params = content.get("params") if isinstance(content, dict) else None
    if not isinstance(params, dict):
        raise ValueError(f"{path}: holds no params; is it a {FILE}?")
    places = {
        _key(config, index, part): (index, part) for index in range(config.depth) for part in "kv"
    }
    format = CacheFormat("int8", dynamic=False, plain_levels=0)
    whole = whole_layer(None, nbits=8, num_heads=config.num_heads)
    tensors = params_to_tensors(CacheParams(format, (whole,) * config.depth))
    for key, one in params.items():
        index, part = places.get(str(key).strip("[]"), (None, None))
        if index is None or not isinstance(one, dict):
            raise ValueError(
                f"{path}: holds {key}, which a model of {config.depth} layers does not have; is it "
                "from another model?"
            )
        for name, ours in (("scale", "scale_HD"), ("zero_point", "zero_point_HD")):
            if isinstance(one.get(name), Tensor) and is_plain(one[name]):
                tensors[f"{index:03d}.{part}_{ours}"] = _by_head(one[name], config)
    return params_from_tensors(tensors, format, config, str(path))


def use_cache(pipeline: InfinityPipeline, path: Path) -> None:
    """Let a pipeline store its cache as ``calibrate-kv`` found it.

    ``path``: a file of the original's kind, a directory of ours, or an artifact.
    Raises: ValueError when that is missing, damaged, or of another model.
    """
    if path.suffix == ".pt":
        pipeline.kv_params = read(path, pipeline.transformer.config).to(pipeline.device)
        return
    kv = read_manifest(path).kv if is_artifact(path) else read_kv(path)
    if kv is None:
        raise ValueError(f"{path}: has no KV parameters; run `varc calibrate-kv` on it")
    pipeline.use_kv(artifact_folder(path) / KV_FILE, kv)


def _key(config: InfinityConfig, layer: int, part: str) -> str:
    return f"{block_name(config, layer)}.sa.{part}.cache"


def _by_head(tensor: Tensor, config: InfinityConfig) -> Tensor:
    """The original also takes all channels in one row, heads one after the other."""
    if tensor.shape == (config.embed_dim,):
        return tensor.view(config.num_heads, config.head_dim)
    return tensor
