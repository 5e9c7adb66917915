"""A whole profile: recordings, one pass over the blocks, sensitivity, and a report in a directory.

    profile.json               everything measured, with its method; written last
    infinity_stats.json        the same under the keys of Henvezz95/VAR-Compressor
    report.html, pictures/     for people
    blocks/000.safetensors …   channel profiles of one block: lowest, highest, mean, std, skewness
    timing.json                seconds by stage

A run that was cut off is continued by the same call, block by block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch

from var_compressor import __version__
from var_compressor.artifact import (
    TRACE_FILE,
    ArtifactError,
    ArtifactWriter,
    artifact_writer,
    write_json,
)
from var_compressor.compress import collection_of, open_pipeline, transformer_config
from var_compressor.layers.linear import linear_specs
from var_compressor.machine import machine_of
from var_compressor.models.config import config_to_dict
from var_compressor.models.inspection import sha256_of
from var_compressor.models.schedule import Schedule
from var_compressor.models.transformer import Block
from var_compressor.pipeline import InfinityPipeline
from var_compressor.profiling import findings, original, sensitivity
from var_compressor.profiling.block import Sampled, block_report, observe_block
from var_compressor.profiling.moments import MEDIAN_ERROR
from var_compressor.profiling.report import write_report
from var_compressor.quant.activations import ActivationStore, MemoryBounds, activation_store
from var_compressor.quant.calibration import (
    BlockStream,
    CalibrationTrace,
    Progress,
    one_layer_cache,
)
from var_compressor.quant.ptq import describe_base, specs_by_block
from var_compressor.quant.recording import (
    Collection,
    check_recordable,
    record,
    trace_of_cut_off_run,
    write_trace,
)
from var_compressor.quant.report import TIMING_FILE
from var_compressor.recipe import ModelSource, Recipe
from var_compressor.spec import QuantSpec

FORMAT = "var-compressor-profile/1"
PROFILE_FILE = "profile.json"
NUM_WORST = 10
# multiplications up to which "auto" probes every layer: some ten seconds
_CHEAP = {"cpu": 1e12, "cuda": 2e15}

Sensitivity = Literal["auto", "all", "worst", "none"]


def profile_model(
    pipeline: InfinityPipeline,
    collection: Collection,
    spec: QuantSpec,
    *,
    source: Mapping[str, Any],
    out: str | Path,
    probe: Sensitivity = "auto",
    on_progress: Progress = lambda stage, done, total: None,
    memory: MemoryBounds = MemoryBounds(),  # noqa: B008 - frozen
) -> dict[str, Any]:
    """Measure a full-precision model on a collection, and write the report to ``out``.

    ``spec`` says which rounding is judged; ``source`` where the model came from, with its hashes.
    ``probe``: of which layers the bits are told when they alone are rounded, "worst" the ten that
    disturb the hidden state most, "auto" all of a small model. Only one block at a time is on the
    device if the pipeline streams them.
    Raises: ArtifactError when ``out`` holds something else, ValueError for a compressed
    pipeline or groups that do not fit a linear.
    """
    if pipeline.is_compressed:
        raise ValueError("the model is compressed already; profile the full-precision model")
    check_recordable(collection.sampling)
    specs_by_block(spec, pipeline.transformer.config)
    out = Path(out)
    if (out / PROFILE_FILE).is_file():
        raise ArtifactError(f"{out}: holds a finished profile; give another --out, or delete it")
    identity = {
        "format": FORMAT,
        "source": dict(source),
        "config": config_to_dict(pipeline.transformer.config),
        "spec": spec.to_dict(),
        "calibration": {
            **collection.to_dict(),
            "dtype": str(pipeline.transformer.block_dtype).split(".")[1],
        },
    }
    with artifact_writer(out, identity) as writer, torch.inference_mode():
        run = _Run(pipeline, collection, spec, writer, memory, on_progress)
        trace = run.observe()
        profile = {**identity, **run.described(trace), "blocks": run.blocks()}
        profile["sensitivity"] = run.sensitivity(trace, probe)
        profile["bytes"] = findings.expected_bytes(
            spec, pipeline.transformer.config, trace.schedule
        )
        profile["findings"] = [asdict(one) for one in findings.find(profile)]
        with run.timed("report"):
            write_json(out / original.FILE, original.stats_of(profile))
            write_report(profile, out)
        write_json(out / TIMING_FILE, {"machine": machine_of(run.device), "stages": run.seconds})
        write_json(out / PROFILE_FILE, profile)
        writer.end_run(len(profile["blocks"]))
    return profile


@dataclass
class _Run:
    pipeline: InfinityPipeline
    collection: Collection
    spec: QuantSpec
    writer: ArtifactWriter
    memory: MemoryBounds
    on_progress: Progress

    def __post_init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.device = self.pipeline.device

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        began = perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[stage] = round(perf_counter() - began, 3)

    def observe(self) -> CalibrationTrace:
        """Record or read the generations, and bring every block's report to disk."""
        bounds, folder = self.memory, self.writer.folder
        with activation_store(self.device, bounds, folder) as store:
            with self.timed("recording"):
                trace = self._trace(store)
            with self.timed("statistics"):
                self._observe_blocks(trace, store)
        return trace

    def _trace(self, store: ActivationStore) -> CalibrationTrace:
        path = self.writer.folder / TRACE_FILE
        if path.exists():
            return trace_of_cut_off_run(path, self.pipeline, self.collection)
        trace = record(self.pipeline, self.collection, store, on_progress=self.on_progress)
        write_trace(path, trace)
        return trace

    def _observe_blocks(self, trace: CalibrationTrace, store: ActivationStore) -> None:
        kept, blocks = self.spec.calibration, self.pipeline.transformer.blocks
        sampled = Sampled.of(
            trace,
            max_tokens_per_level=kept.max_tokens_per_level,
            seed=kept.seed,
            device=self.device,
        )
        stream = BlockStream.of_trace(self.pipeline, trace, store, range(len(trace.recordings)))
        new_cache = one_layer_cache(self.pipeline, trace.schedule)
        for index, block in enumerate(blocks):
            assert isinstance(block, Block)
            if self.writer.has_block(index):
                stream.run(block, new_cache, trace.schedule.levels)
            else:
                observer = observe_block(self.pipeline, stream, block, sampled)
                specs = linear_specs(self.spec, block, index)
                self.writer.put_block(index, *block_report(block, observer, specs, kept.seed))
            self.on_progress("statistics", index + 1, len(blocks))

    def blocks(self) -> list[dict[str, Any]]:
        return [self.writer.report(index) for index in range(len(self.pipeline.transformer.blocks))]

    def described(self, trace: CalibrationTrace) -> dict[str, Any]:
        """How the numbers were come by."""
        dtype = self.pipeline.transformer.block_dtype
        return {
            "created_by": f"var-compressor {__version__}",
            "levels": [
                {"height": level.height, "width": level.width} for level in trace.schedule.levels
            ],
            "guided": trace.guided,
            "method": {
                "moments": "every value, float64, merged part by part",
                "median": "every value, by ranks in a histogram of magnitudes",
                "median_relative_error": MEDIAN_ERROR[dtype],
                "snr": "a sample of each level's tokens, weighted by what they stand for",
                "max_tokens_per_level": self.spec.calibration.max_tokens_per_level,
            },
        }

    def sensitivity(self, trace: CalibrationTrace, probe: Sensitivity) -> dict[str, Any] | None:
        layers = sensitivity.layers_of(self.spec, self.pipeline.transformer.config)
        if probe == "none" or not layers:
            return None
        if probe == "auto":
            probe = "all" if self._is_cheap(trace.schedule, len(layers)) else "worst"
        with (
            self.timed("sensitivity"),
            activation_store(self.device, self.memory, self.writer.folder) as store,
        ):
            found = sensitivity.measure(
                self.pipeline,
                trace,
                store,
                self.spec,
                num_followed=None if probe == "all" else NUM_WORST,
                sampling=self.collection.sampling,
                on_progress=self.on_progress,
            )
        return {"num_recordings": 1, "layers": sensitivity.to_json(found)}

    def _is_cheap(self, schedule: Schedule, num_layers: int) -> bool:
        """Whether following every layer takes seconds: by the multiplications of their blocks."""
        config = self.pipeline.transformer.config
        per_token = config.embed_dim * (8 * config.embed_dim + 2 * config.ffn_dim)
        passes = num_layers * (config.depth + 1) // 2
        return 2 * passes * schedule.num_tokens * per_token < _CHEAP[self.device.type]


# --- of a recipe ----------------------------------------------------------------------------------


def profile_recipe(
    recipe: Recipe, out: Path, *, probe: Sensitivity, on_progress: Progress
) -> dict[str, Any]:
    """Profile the recipe's model on its collection, one block in memory at a time.

    Raises: ValueError for a model that is compressed already.
    """
    source = recipe.model
    transformer_config(source, may_be_absent=False)
    return profile_model(
        open_pipeline(source, stream_blocks=source.vae_path is None),
        collection_of(recipe.collect),
        recipe.quant,
        source=described_source(source),
        out=out,
        probe=probe,
        on_progress=on_progress,
    )


def described_source(source: ModelSource) -> dict[str, Any]:
    """Where the model is, and the hashes of its transformer's files."""
    if source.vae_path is None:
        return describe_base(source.path or source.name)
    path = Path(str(source.path)).expanduser().absolute()
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    hashes = {file.name: sha256_of(file) for file in files if file.is_file()}
    return {"source": str(path), "transformer": hashes}
