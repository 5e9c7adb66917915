"""Post-training quantization: a pipeline and prompts in, an artifact out, block after block.

The only file that knows the order of steps: record one generation per prompt, stream the blocks,
and for every linear smooth, split off the low-rank branch, round, and commit the block to disk.

Shapes: N output and K input channels, R rank, T sampled tokens.
Source: SVDQuant, Li et al. 2024 (arXiv 2411.05007).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from var_compressor.artifact import TRANSFORMER_FILE, Manifest, artifact_writer
from var_compressor.layers.kv_cache import KVParams, PlainCache
from var_compressor.layers.linear import (
    QuantizedLinear,
    check_runnable,
    linear_specs,
    resolved_group,
)
from var_compressor.models import directory
from var_compressor.models.config import config_to_dict
from var_compressor.models.inspection import sha256_of
from var_compressor.models.sampling import Sampling
from var_compressor.models.schedule import Level, Schedule
from var_compressor.ops.packing import pack_int4
from var_compressor.ops.primitives import FORMATS, round_trip
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.calibration import (
    BlockStream,
    CalibrationTrace,
    InputStats,
    Progress,
    record_trace,
)
from var_compressor.quant.gptq import QuantizedWeight, RoundingOptions, gptq, hessian, rtn
from var_compressor.quant.kv import KVRange, calibrate_channels, calibrate_shared_percentile
from var_compressor.quant.lowrank import projection_error, split_low_rank
from var_compressor.quant.smooth import search_smoothing, smooth_candidates
from var_compressor.spec import KVSpec, LinearSpec, QuantSpec

CLIP_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
WSCALE_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Collection:
    """What to calibrate on: prompts by id, the seed of the first image, and how they are drawn."""

    prompts: Mapping[str, str]
    seed: int
    sampling: Sampling
    aspect_ratio: float = 1.0
    pixel_budget: str | None = None

    def to_dict(self) -> dict[str, Any]:
        text = json.dumps(sorted(self.prompts.items()))
        return {
            "prompts_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "num_prompts": len(self.prompts),
            "seed": self.seed,
            "sampling": json.loads(json.dumps(asdict(self.sampling))),
            "aspect_ratio": self.aspect_ratio,
            "pixel_budget": self.pixel_budget,
        }


@dataclass(frozen=True)
class LinearReport:
    """What was chosen for one linear and what it cost, on the sampled calibration tokens.

    SNR in dB of the linear's output: ``snr_db`` of the result, ``rtn_snr_db`` of plain rounding in
    the same formats without smoothing and branch. ``outlier_ratio`` is the largest over the median
    channel absmax of the input.
    """

    name: str
    snr_db: float
    rtn_snr_db: float
    alpha: float
    beta: float
    low_rank_steps: int
    outlier_ratio: float


def quantize_model(
    pipeline: InfinityPipeline,
    collection: Collection,
    spec: QuantSpec,
    *,
    base: str,
    out: str | Path,
    on_progress: Progress = lambda stage, done, total: None,
) -> Manifest:
    """Compress the transformer of ``pipeline`` into the directory ``out``.

    ``base`` is where the pipeline came from (a name or directory), which the artifact refers to
    for VAE and text encoder. A killed run is continued by the same call; ``on_progress`` gets
    (stage, done, total).
    Raises: ArtifactError when ``out`` holds something else, ValueError for a pipeline that is
    compressed already, formats without an op, or a group size or rank that does not fit a linear.
    """
    if pipeline.is_compressed:
        raise ValueError(f"{base}: is compressed already; give the full-precision model")
    model = pipeline.transformer
    num_blocks = len(model.blocks)
    specs = [linear_specs(spec, block, index) for index, block in enumerate(model.blocks)]
    for block, block_specs in zip(model.blocks, specs, strict=True):
        for name, linear_spec in block_specs.items():
            check_fits(name, block.get_submodule(name), linear_spec)
    manifest = Manifest(
        config=config_to_dict(model.config),
        base=describe_base(base),
        spec=spec.to_dict(),
        calibration={**collection.to_dict(), "dtype": str(model.block_dtype).split(".")[1]},
        files={},
    )
    sample_per_call = max(1, spec.calibration.max_tokens_per_level // len(collection.prompts))
    with artifact_writer(out, manifest.to_json()) as writer, torch.inference_mode():
        trace = record(pipeline, collection, on_progress)
        stream = BlockStream(pipeline, trace)
        new_cache = one_layer_cache(pipeline, trace.schedule)
        for index, block in enumerate(model.blocks):
            generator = torch.Generator().manual_seed(spec.calibration.seed + index)
            is_done = writer.has_block(index)
            wanted = {} if is_done else specs[index]
            stats = {name: InputStats(sample_per_call, generator) for name in wanted}
            stream.run(
                block,  # type: ignore[arg-type]
                new_cache,
                observe=lambda name, x, stats=stats: stats[name].add(x),  # type: ignore[misc]
                names=list(wanted),
            )
            if not is_done:
                tensors, reports = quantize_block(block, wanted, stats, generator=generator)
                writer.put_block(index, tensors, {"linears": [asdict(r) for r in reports]})
            on_progress("quantizing", index + 1, num_blocks)
        outside = {n: t for n, t in model.state_dict().items() if not n.startswith("blocks.")}
        writer.put_tensors(TRANSFORMER_FILE, outside)
        return writer.finish(manifest, num_blocks)


def check_fits(name: str, linear: nn.Module, spec: LinearSpec) -> None:
    """Raises: ValueError naming the linear when formats, groups or rank cannot be had."""
    assert isinstance(linear, nn.Linear)
    check_runnable(spec)
    smaller_side = min(linear.weight.shape)
    if spec.low_rank.rank > smaller_side:
        raise ValueError(
            f"{name}: low_rank.rank {spec.low_rank.rank} does not fit a weight of shape "
            f"{tuple(linear.weight.shape)}; use 0 to {smaller_side}"
        )
    for part in (spec.weight, spec.act):
        try:
            resolved_group(part.group_size, linear.in_features)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def record(
    pipeline: InfinityPipeline, collection: Collection, on_progress: Progress
) -> CalibrationTrace:
    """The collection's generations."""
    return record_trace(
        pipeline,
        list(collection.prompts.values()),
        seed=collection.seed,
        sampling=collection.sampling,
        aspect_ratio=collection.aspect_ratio,
        pixel_budget=collection.pixel_budget,
        on_progress=on_progress,
    )


def one_layer_cache(
    pipeline: InfinityPipeline,
    schedule: Schedule,
    *,
    keep: Callable[[Tensor, Tensor], None] = lambda k, v: None,
) -> Callable[[int], RecordingCache]:
    """Makes caches for a single block, in the dtype that the pipeline computes in."""
    model = pipeline.transformer
    config = replace(model.config, depth=1, num_chunks=1)

    def new_cache(rows: int) -> RecordingCache:
        cache = RecordingCache(
            config, schedule, rows=rows, dtype=model.block_dtype, device=pipeline.device
        )
        cache.keep = keep
        return cache

    return new_cache


class RecordingCache(PlainCache):
    """A one-layer cache that hands every key and value it stores to ``keep(k, v)``."""

    keep: Callable[[Tensor, Tensor], None]

    def attend_level(self, layer: int, level: Level, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not level.is_last:
            self.keep(k, v)
        return super().attend_level(layer, level, q, k, v)


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
    trace = record(pipeline, collection, on_progress)
    model, params, reports = pipeline.transformer, [], []
    with torch.inference_mode():
        stream = BlockStream(pipeline, trace)
        for index, block in enumerate(model.blocks):
            kept: list[tuple[Tensor, Tensor]] = []
            new_cache = one_layer_cache(pipeline, trace.schedule, keep=lambda *kv: kept.append(kv))  # noqa: B023
            stream.run(block, new_cache)  # type: ignore[arg-type]
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


def describe_base(base: str) -> dict[str, Any]:
    """Where the base model is and the hashes of its VAE and transformer files."""
    folder, given = directory.resolve(base), Path(base).expanduser()
    source = str(given.absolute()) if folder == given else base
    parts = {
        part: {path.name: sha256_of(path) for path in sorted((folder / part).glob("*.safetensors"))}
        for part in ("transformer", "vae")
    }
    return {"source": source, **parts}


def quantize_block(
    block: nn.Module,
    specs: Mapping[str, LinearSpec],
    stats: Mapping[str, InputStats],
    *,
    generator: torch.Generator,
) -> tuple[dict[str, Tensor], list[LinearReport]]:
    """Every tensor of the compressed block, and a report per quantized linear."""
    tensors = dict(block.state_dict())
    reports = []
    for name, spec in specs.items():
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        del tensors[f"{name}.weight"]
        quantized, report = quantize_linear(
            name, linear, spec, stats[name].x_TK, stats[name].absmax_K, generator=generator
        )
        tensors |= {f"{name}.{key}": value for key, value in quantized.state_dict().items()}
        reports.append(report)
    return tensors, reports


def quantize_linear(
    name: str,
    linear: nn.Linear,
    spec: LinearSpec,
    x_TK: Tensor,
    absmax_K: Tensor | None,
    *,
    generator: torch.Generator,
) -> tuple[QuantizedLinear, LinearReport]:
    """Smooth, split, round; measured against the linear it replaces on ``x_TK``."""
    assert absmax_K is not None
    weight_NK = linear.weight.float()
    round_weight = partial(rounded, spec=spec)
    round_act = partial(act_round_trip, spec=spec)
    candidates = smooth_candidates(spec.smooth.num_grids) if spec.smooth.enabled else [(0.0, 0.0)]
    smoothing = search_smoothing(
        [weight_NK],
        x_TK,
        absmax_K,
        candidates=candidates,
        rank=spec.low_rank.rank,
        quantize_weight=lambda w: round_weight(w, None).dequantize(),
        quantize_act=round_act,
        output_fn=None,
        generator=generator,
    )
    smoothed_NK, x_hat_TK = weight_NK * smoothing.factors_K, x_TK / smoothing.factors_K
    split = split_low_rank(
        smoothed_NK,
        rank=spec.low_rank.rank,
        quantize_residual=lambda w: round_weight(w, None).dequantize(),
        evaluate_error=partial(projection_error, smoothed_NK, x_hat_TK, round_act(x_hat_TK)),
        max_iters=spec.low_rank.max_iters,
        patience=spec.low_rank.patience,
        generator=generator,
    )
    up_NR, down_RK = split.up_NR.bfloat16(), split.down_RK.bfloat16()
    # the codes absorb what rounding the branch to bf16 left over
    residual_NK = smoothed_NK - up_NR.float() @ down_RK.float()
    gram_KK = hessian(round_act(x_hat_TK)) if spec.weight.rounding == "gptq" else None
    codes = round_weight(residual_NK, gram_KK)

    quantized = QuantizedLinear(
        linear.in_features, linear.out_features, spec, bias_dtype=linear.bias.dtype
    )
    packed = pack_int4(codes.codes_NK) if FORMATS[spec.weight.format].nbits == 4 else codes.codes_NK
    quantized.load_state_dict(
        {
            "qweight": packed,
            "wscales": codes.scales_NG.to(WSCALE_DTYPE),
            "smooth_factor": smoothing.factors_K,
            "proj_down": down_RK,
            "proj_up": up_NR,
            "bias": linear.bias,
        }
    )
    quantized.to(linear.weight.device)
    wanted_TN = nn.functional.linear(x_TK, weight_NK)
    got_TN = quantized(x_TK) - linear.bias.float()
    plain_TN = round_act(x_TK) @ round_weight(weight_NK, None).dequantize().T
    report = LinearReport(
        name,
        snr_db=snr_db(wanted_TN, got_TN),
        rtn_snr_db=snr_db(wanted_TN, plain_TN),
        alpha=smoothing.alpha,
        beta=smoothing.beta,
        low_rank_steps=len(split.errors),
        outlier_ratio=float(absmax_K.max() / absmax_K.median().clamp_min(1e-12)),
    )
    return quantized, report


def rounded(weight_NK: Tensor, hessian_KK: Tensor | None, *, spec: LinearSpec) -> QuantizedWeight:
    """Codes and scales of a weight; GPTQ where a Hessian is given, else to nearest."""
    options = RoundingOptions(
        format=FORMATS[spec.weight.format],
        group_size=resolved_group(spec.weight.group_size, weight_NK.shape[1]),
        scale_dtype=WSCALE_DTYPE,
        clip_ratios=CLIP_RATIOS if spec.weight.range_search else (1.0,),
    )
    return (rtn if hessian_KK is None else gptq)(weight_NK, hessian_KK, options)


def act_round_trip(x_TK: Tensor, *, spec: LinearSpec) -> Tensor:
    """The input as the quantized linear sees it, dequantized; unchanged for 16 bits."""
    if spec.act.format is None:
        return x_TK
    group_size = resolved_group(spec.act.group_size, x_TK.shape[1])
    return round_trip(
        x_TK,
        format=FORMATS[spec.act.format],
        group_size=group_size,
        scale_dtype=torch.float32,
    )


def snr_db(wanted: Tensor, got: Tensor) -> float:
    """Signal-to-noise ratio in dB; 200 stands for no measurable error."""
    signal, noise = wanted.double().square().sum(), (wanted - got).double().square().sum()
    # a linear whose input is zero throughout has neither
    return 200.0 if noise == 0 else float((10 * torch.log10(signal / noise)).clamp(-200, 200))
