"""What `varc bench` compares: a model as it is given, and the same model at full precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from var_compressor.artifact import find_model, is_artifact, read_manifest
from var_compressor.bench.session import Source
from var_compressor.bench.shapes import CACHES, random_pipeline
from var_compressor.footprint import ModelShape
from var_compressor.models.convert import model_config
from var_compressor.pipeline import InfinityPipeline
from var_compressor.planning import model_shape
from var_compressor.spec import PRESETS

BASELINE = "full precision"
_COMPRESSED = PRESETS["svdquant"]


@dataclass(frozen=True)
class Choice:
    """``model``: an artifact, or what `from_pretrained` opens; ``kv``: its cache's parameters.

    ``compute``: how compressed linears are multiplied, "auto" for the machine's choice;
    ``low_memory``: whether both take the least memory.
    """

    model: str
    kv: str | None
    compute: str
    low_memory: bool
    with_baseline: bool
    device: torch.device
    dtype: torch.dtype


def saved(choice: Choice, use_cache: Callable[[InfinityPipeline, Path], None]) -> list[Source]:
    """The model, and its baseline unless that would be the very same.

    Raises: ValueError when there is no such model.
    """
    folder = find_model(choice.model)
    compressed = is_artifact(folder)
    base = read_manifest(folder).base["source"] if compressed else choice.model
    if compressed and choice.with_baseline:
        _check_base(choice.model, base)

    def opened(model: str, kv: str | None) -> InfinityPipeline:
        pipeline = InfinityPipeline.from_pretrained(
            model,
            dtype=choice.dtype,
            device=choice.device,
            compute=choice.compute,
            low_memory=choice.low_memory,
        )
        if kv is not None:
            use_cache(pipeline, Path(kv))
        return pipeline

    def first() -> InfinityPipeline:
        return opened(choice.model, choice.kv)

    sources = [Source(choice.model, first, lambda: model_shape(choice.model))]
    if choice.with_baseline and (compressed or choice.kv is not None):
        sources.append(Source(BASELINE, lambda: opened(base, None), lambda: model_shape(base)))
    return sources


def _check_base(model: str, base: str) -> None:
    try:
        find_model(base)
    except ValueError as error:
        raise ValueError(
            f"{model}: the full-precision model that it was made of is not here ({error}); "
            "--baseline none goes without"
        ) from None


def random(choice: Choice, *, seed: int) -> list[Source]:
    """Random 4-bit weights in the shapes of a known model; its cache is "int8", "int4" or plain.

    Raises: ValueError for an unknown model or cache.
    """
    config = model_config(choice.model)
    if choice.kv is not None and choice.kv not in CACHES:
        raise ValueError(
            f"--kv is {choice.kv!r}; with --shapes-only it names a format: {' or '.join(CACHES)}"
        )

    def opened(*, full: bool) -> InfinityPipeline:
        pipeline = random_pipeline(
            choice.model,
            spec=None if full else _COMPRESSED,
            kv=None if full else choice.kv,
            dtype=choice.dtype,
            device=choice.device,
            seed=seed,
        )
        packed = choice.low_memory and choice.compute == "auto"
        pipeline.use_kernels("packed" if packed else choice.compute)
        if choice.low_memory:
            pipeline.save_memory()
        return pipeline

    def first() -> InfinityPipeline:
        return opened(full=False)

    def shape(*, full: bool) -> ModelShape:
        spec = None if full else _COMPRESSED
        return ModelShape(choice.model, config.transformer, config.vae, None, spec)

    sources = [Source(f"{choice.model}, random W4", first, lambda: shape(full=False))]
    if choice.with_baseline:
        sources.append(Source(BASELINE, lambda: opened(full=True), lambda: shape(full=True)))
    return sources
