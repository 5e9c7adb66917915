"""What an evaluation found, as a model card tells it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from var_compressor.artifact import read_manifest
from var_compressor.evaluation.results import (
    BenchmarkResult,
    Results,
    ResultsError,
    read_results,
)
from var_compressor.layers.kv_params import CacheFormat
from var_compressor.model_card import Measured
from var_compressor.spec import QuantSpec


def measured(results: str | Path, artifact: str | Path | None) -> list[Measured]:
    """Every number of the results in a folder; ``artifact``: the model they must be of, None for
    full precision.

    Raises: ResultsError when they are of another model, as far as its size and format tell.
    """
    found = read_results(results)
    _check_same(found, results, artifact)
    return [
        row
        for benchmark, result in found.benchmarks.items()
        for row in _rows(benchmark, result, found)
    ]


def _check_same(found: Results, where: str | Path, artifact: str | Path | None) -> None:
    subject = found.subject
    if artifact is None or subject.is_full_precision:
        if artifact is None and not subject.is_full_precision:
            raise ResultsError(f"{where}: are of {subject.summary}, this is a full-precision model")
        if artifact is not None:
            raise ResultsError(f"{where}: are of full precision; evaluate with --artifact")
        return
    manifest = read_manifest(artifact)
    words = [QuantSpec.from_dict(manifest.spec).summary()]
    if manifest.kv is not None:
        words.append(f"{CacheFormat.of(manifest.kv, f'{artifact}: ').name.upper()} KV cache")
    expected = (", ".join(words), manifest.num_weight_bytes)
    was = (subject.summary.split("; off: ")[0], subject.weight_bytes)
    if was[0] != expected[0] or (subject.weights and was[1] != expected[1]):
        raise ResultsError(
            f"{where}: are of a model that is {was[0]} with {was[1]} bytes of weights, {artifact} "
            f"is {expected[0]} with {expected[1]}; evaluate it, and give those results"
        )


def _rows(benchmark: str, result: BenchmarkResult, found: Results) -> Iterator[Measured]:
    drawing = found.drawing
    drawn = f"{found.subject.summary}; {drawing.dtype}, {drawing.runs_on}, seed {drawing.seed}"
    for metric, one in result.metrics.items():
        beside = "what it is compared with" if one.compares == "reference" else ""
        if metric in result.reference:
            beside = f"{result.reference[metric].value:.4g}"
        yield Measured(
            benchmark=benchmark,
            metric=metric if not one.backbone else f"{metric} ({one.backbone})",
            value=one.value,
            low=one.low,
            high=one.high,
            num_samples=one.num_samples,
            full_precision=beside,
            drawn=drawn,
        )
