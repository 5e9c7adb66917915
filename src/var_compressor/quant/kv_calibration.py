"""The KV cache's parameters of a whole model: recordings in, affine int8 ranges per layer out.

Shapes: H heads, T recorded tokens, D head channels.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from var_compressor.layers.kv_cache import KVParams
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.activations import MemoryBounds, activation_store
from var_compressor.quant.calibration import BlockStream, Progress, one_layer_cache
from var_compressor.quant.kv import KVRange, calibrate_channels, calibrate_shared_percentile
from var_compressor.quant.recording import Collection, record
from var_compressor.spec import KVSpec


def calibrate_kv(
    pipeline: InfinityPipeline,
    collection: Collection,
    spec: KVSpec,
    *,
    on_progress: Progress = lambda stage, done, total: None,
) -> tuple[list[KVParams], list[dict[str, Any]]]:
    """Affine int8 parameters of every layer's cache, and a report per layer.

    Streams like ``quantize_model``: all prompts, all levels that are ever stored, both guidance
    rows, one layer's keys and values at a time. ``pipeline`` may be compressed already.
    """
    model, params, reports = pipeline.transformer, [], []
    with (
        torch.inference_mode(),
        tempfile.TemporaryDirectory(prefix="varc-") as folder,
        activation_store(pipeline.device, MemoryBounds(), Path(folder)) as store,
    ):
        trace = record(pipeline, collection, store, on_progress=on_progress)
        levels, everyone = trace.schedule.levels, range(len(trace.recordings))
        stream = BlockStream.of_trace(pipeline, trace, store, everyone)
        for index, block in enumerate(model.blocks):
            kept: list[tuple[Tensor, Tensor]] = []
            new_cache = one_layer_cache(pipeline, trace.schedule, keep=lambda *kv: kept.append(kv))  # noqa: B023
            stream.run(block, new_cache, levels)  # type: ignore[arg-type]
            k_HTD, v_HTD = (
                torch.cat([x.float().transpose(0, 1).flatten(1, 2) for x in tensors], dim=1)
                for tensors in zip(*kept, strict=True)
            )
            k_range, v_range = find_range(k_HTD, spec), find_range(v_HTD, spec)
            params.append(
                KVParams(
                    k_range.scale_HD, k_range.zero_point_HD, v_range.scale_HD, v_range.zero_point_HD
                )
            )
            reports.append(
                {
                    "layer": index,
                    "k_snr_db": range_snr_db(k_HTD, k_range),
                    "v_snr_db": range_snr_db(v_HTD, v_range),
                    "num_tokens": k_HTD.shape[1],
                }
            )
            on_progress("calibrating", index + 1, len(model.blocks))
    return params, reports


def find_range(x_HTD: Tensor, spec: KVSpec) -> KVRange:
    if spec.mode == "shared_percentile":
        return calibrate_shared_percentile(x_HTD)
    return calibrate_channels(x_HTD, nbits=8)


def range_snr_db(x_HTD: Tensor, found: KVRange) -> float:
    signal = x_HTD.double().square().mean()
    return float(10 * torch.log10(signal / found.mse_HD.double().mean().clamp_min(1e-30)))
