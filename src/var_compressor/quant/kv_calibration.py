"""The KV cache of a whole model: recordings in, ranges, bits and kept levels per layer out."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from var_compressor.layers.kv_cache import num_cache_bytes
from var_compressor.layers.kv_params import (
    CacheFormat,
    CacheParams,
    KVParams,
    LayerParams,
    fingerprint,
    whole_layer,
)
from var_compressor.models.config import InfinityConfig
from var_compressor.models.schedule import Schedule
from var_compressor.models.transformer import Block
from var_compressor.ops.primitives import FORMATS
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.activations import MemoryBounds, activation_store, parse_bytes
from var_compressor.quant.calibration import (
    BlockStream,
    CalibrationTrace,
    Progress,
    one_layer_cache,
)
from var_compressor.quant.kv import (
    KVRange,
    calibrate_channels,
    calibrate_shared_percentile,
    largest_magnitudes,
)
from var_compressor.quant.kv_budget import CacheShape, LayerChoice, LayerNeeds, evict, fit
from var_compressor.quant.kv_measure import cache_noise
from var_compressor.quant.kv_record import LayerRecord, LayerRecorder, RecordPlan
from var_compressor.quant.kv_report import attention_kept, clipping, layer_report, output_snr_db
from var_compressor.quant.recording import Collection, record
from var_compressor.spec import KVSpec


@dataclass(frozen=True)
class KVCalibration:
    """A model's cache, what a manifest says of it, and each layer's error: ``k`` and ``v``, mean
    square per head and channel ``[H, D]``.
    """

    config: InfinityConfig
    params: CacheParams
    kv: dict[str, Any]
    mse_HD: tuple[dict[str, Tensor], ...]


@dataclass(frozen=True)
class LayerFindings:
    """One layer, measured: for every number of bits that may be chosen, ranges and a report."""

    ranges: dict[int, KVParams | None]
    needs: LayerNeeds
    reports: dict[int, dict[str, Any]]
    mse_HD: dict[str, Tensor]


def calibrate_kv(
    pipeline: InfinityPipeline,
    collection: Collection,
    spec: KVSpec,
    *,
    seed: int = 0,
    on_progress: Progress = lambda stage, done, total: None,
) -> KVCalibration:
    """How to store the cache of every layer.

    Streams like ``quantize_model``: all prompts, all levels that are ever stored, both guidance
    rows, a bounded sample of one layer at a time. ``pipeline`` may be compressed already.
    Raises: ValueError for a budget that cannot be met.
    """
    model = pipeline.transformer
    with (
        torch.inference_mode(),
        tempfile.TemporaryDirectory(prefix="varc-") as folder,
        activation_store(pipeline.device, MemoryBounds(), Path(folder)) as store,
    ):
        trace = record(pipeline, collection, store, on_progress=on_progress)
        plan = RecordPlan.of(
            trace,
            max_tokens_per_level=spec.max_tokens_per_level,
            seed=seed,
            device=pipeline.device,
        )
        stream = BlockStream.of_trace(pipeline, trace, store, range(len(trace.recordings)))
        findings, blocks = [], []
        for index, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            seen = record_layer(pipeline, stream, block, plan)
            findings.append(measure_layer(seen, spec, plan.schedule, pipeline))
            blocks.append(fingerprint(block))
            on_progress("calibrating", index + 1, len(model.blocks))
    return choose_cache(pipeline, findings, blocks, spec, trace)


def record_layer(
    pipeline: InfinityPipeline, stream: BlockStream, block: Block, plan: RecordPlan
) -> LayerRecord:
    """Send all recordings through a block, and sample what its attention reads."""
    recorder = LayerRecorder(plan)
    new_cache = one_layer_cache(pipeline, plan.schedule, observe=recorder.observe)
    stream.run(block, new_cache, plan.schedule.levels)
    return recorder.record()


def measure_layer(
    seen: LayerRecord, spec: KVSpec, schedule: Schedule, pipeline: InfinityPipeline
) -> LayerFindings:
    """Ranges and noise in every number of bits that may be chosen."""
    config = pipeline.transformer.config
    ranges, noise_H, reports = {}, {}, {}
    for nbits in candidate_bits(spec):
        found = None if spec.dynamic else find_ranges(seen, spec, nbits=nbits)
        ranges[nbits] = params = None if found is None else params_of(found)
        layer = whole_layer(params, nbits=nbits, num_heads=config.num_heads)
        noise = cache_noise(seen.probe, layer, format_of(spec), config, schedule)
        noise_H[nbits] = noise.share_H.cpu()
        reports[nbits] = layer_report(seen, noise)
        if found is not None and spec.format != "fp8":
            for name, told in clipping(seen, found, nbits=nbits).items():
                reports[nbits][name] |= told
    mse_HD = {"k": noise.k_mse_HD.cpu(), "v": noise.v_mse_HD.cpu()}
    return LayerFindings(ranges, LayerNeeds(noise_H, seen.mass_HS.cpu()), reports, mse_HD)


def candidate_bits(spec: KVSpec) -> tuple[int, ...]:
    if spec.format == "int4":
        return (4,)
    return (8,) if spec.budget is None else (8, 4)


def format_of(spec: KVSpec) -> CacheFormat:
    return CacheFormat(spec.format, spec.dynamic, spec.plain_levels)


def find_ranges(seen: LayerRecord, spec: KVSpec, *, nbits: int) -> dict[str, KVRange]:
    """Affine parameters of keys, ``k``, and of values, ``v``."""
    weight_HT = seen.weight_HT if spec.weighting == "attention" else None

    def find(x_HTD: Tensor) -> KVRange:
        if spec.format == "fp8":
            return largest_magnitudes(x_HTD, highest_code=FORMATS["fp8_e4m3"].qmax)
        if spec.mode == "shared_percentile":
            return calibrate_shared_percentile(x_HTD)
        return calibrate_channels(x_HTD, nbits=nbits, weight_HT=weight_HT)

    return {"k": find(seen.k_HTD), "v": find(seen.v_HTD)}


def params_of(found: dict[str, KVRange]) -> KVParams:
    k, v = found["k"], found["v"]
    return KVParams(k.scale_HD, k.zero_point_HD, v.scale_HD, v.zero_point_HD)


# --- choosing -------------------------------------------------------------------------------------


def choose_cache(
    pipeline: InfinityPipeline,
    findings: Sequence[LayerFindings],
    blocks: Sequence[str],
    spec: KVSpec,
    trace: CalibrationTrace,
) -> KVCalibration:
    """Bits and levels by the spec's budget, and the manifest's words for them."""
    config = pipeline.transformer.config
    rows = 2 if trace.guided else 1
    shape = CacheShape(trace.schedule, config.head_dim, rows, format_of(spec))
    needs = [found.needs for found in findings]
    choices = choose_layers(needs, spec, shape)
    used = {nbits for choice in choices for nbits in choice.nbits}
    name = "fp8" if spec.format == "fp8" else "mixed" if len(used) > 1 else f"int{min(used)}"
    params = CacheParams(
        replace(shape.format, name=name),
        tuple(map(chosen_layer, findings, choices)),
    )
    layers = [
        {
            "layer": index,
            "block": block,
            "nbits": list(choice.nbits),
            "dropped": [list(levels) for levels in choice.dropped],
            "attention_kept": attention_kept(found.needs.mass_HS, choice),
            **found.reports[max(choice.nbits)],
            "output_snr_db": output_snr_db(found.needs, choice.nbits),
        }
        for index, (block, found, choice) in enumerate(zip(blocks, findings, choices, strict=True))
    ]
    kv = {
        "format": asdict(params.format),
        "spec": asdict(spec),
        "bytes_per_image": num_cache_bytes(params, config, trace.schedule, rows=rows),
        "layers": layers,
    }
    return KVCalibration(config, params, kv, tuple(found.mse_HD for found in findings))


def choose_layers(
    needs: Sequence[LayerNeeds], spec: KVSpec, shape: CacheShape
) -> list[LayerChoice]:
    if spec.budget is not None and spec.format == "int8":
        return fit(needs, shape, max_bytes=parse_bytes(spec.budget))
    bits = [(candidate_bits(spec)[0],) * len(need.mass_HS) for need in needs]
    whole = sum(len(nbits) * shape.head_bytes(nbits[0]) for nbits in bits)
    max_bytes = int(spec.keep * whole) if spec.budget is None else parse_bytes(spec.budget)
    return evict(needs, bits, shape, max_bytes=max_bytes)


def chosen_layer(found: LayerFindings, choice: LayerChoice) -> LayerParams:
    """Every head with the ranges of its own number of bits."""
    parts = [found.ranges[nbits] for nbits in choice.nbits]
    ranges = None
    if all(part is not None for part in parts):
        ranges = KVParams(
            **{
                name: torch.stack([getattr(part, name)[head] for head, part in enumerate(parts)])
                for name in KVParams.__dataclass_fields__
            }
        )
    return LayerParams(choice.nbits, choice.dropped, ranges)
