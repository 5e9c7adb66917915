"""``kv_quant_calib.pt``: the KV ranges as VAR-Compressor's original writes and reads them.

    params       {key: {scale: float32 [H, D], zero_point: int32 [H, D]}}
    percentiles  {key: {lo, hi: float32 [H, D], p: float}}
    diagnostics  {key: {mse_per_channel: float32 [H, D], mse_agg: float}}

with the keys ``block_chunks.{i}.module.{j}.sa.k.cache`` and ``….sa.v.cache``. Its runtime clamps
codes, not zero points, so ranges that exclude 0 work there too.

Source: calibrate_cache_quantization.py of VAR-Compressor, commit a9f224d.
"""

from __future__ import annotations

import pickle
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from var_compressor.artifact import KV_FILE, is_artifact, read_kv, read_manifest, write_atomically
from var_compressor.layers.kv_params import (
    CacheFormat,
    CacheParams,
    params_from_tensors,
    params_to_tensors,
    whole_layer,
)
from var_compressor.models.checkpoint import block_name
from var_compressor.models.config import InfinityConfig
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.kv_calibration import KVCalibration
from var_compressor.spec import KVSpec

FILE = "kv_quant_calib.pt"


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
    content: dict[str, dict[str, Any]] = {"params": {}, "percentiles": {}, "diagnostics": {}}
    for index, (layer, mse) in enumerate(zip(found.params.layers, found.mse_HD, strict=True)):
        for part in "kv":
            key = _key(found.config, index, part)
            scale_HD = getattr(layer.ranges, f"{part}_scale_HD").cpu()
            zero_HD = getattr(layer.ranges, f"{part}_zero_point_HD").cpu()
            content["params"][key] = {"scale": scale_HD, "zero_point": zero_HD}
            lo_HD, hi_HD = ((code - zero_HD) * scale_HD for code in (-128, 127))
            # the original's one percentile; a bound of our own per channel has none
            p = found.kv["layers"][index][part].get("percentile", float("nan"))
            content["percentiles"][key] = {"lo": lo_HD, "hi": hi_HD, "p": p}
            content["diagnostics"][key] = {
                "mse_per_channel": mse[part],
                "mse_agg": float(mse[part].median()),
            }
    buffer = BytesIO()
    torch.save(content, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def read(path: Path, config: InfinityConfig) -> CacheParams:
    """The ranges in a file of the original's or of ours.

    Raises: ValueError when it is not such a file, or naming the layer whose ranges cannot be.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0]
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
            if isinstance(one.get(name), Tensor):
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
    pipeline.use_kv(path / KV_FILE, kv)


def _key(config: InfinityConfig, layer: int, part: str) -> str:
    return f"{block_name(config, layer)}.sa.{part}.cache"


def _by_head(tensor: Tensor, config: InfinityConfig) -> Tensor:
    """The original also takes all channels in one row, heads one after the other."""
    if tensor.shape == (config.embed_dim,):
        return tensor.view(config.num_heads, config.head_dim)
    return tensor
