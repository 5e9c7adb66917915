"""A model to evaluate: opened with each kind of quantization on or off, and what tells it apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from var_compressor import __version__
from var_compressor.artifact import KV_FILE, REPORT_FILE, Manifest, flat, read_manifest
from var_compressor.compress import choose_device, choose_dtype, open_pipeline, transformer_config
from var_compressor.evaluation.demo import transformer_bytes
from var_compressor.evaluation.results import Drawing, Subject
from var_compressor.layers.kv_params import CacheFormat
from var_compressor.layers.switches import Switches, switch_linears
from var_compressor.machine import device_kind
from var_compressor.models import directory
from var_compressor.models.inspection import sha256_of, weight_hashes
from var_compressor.models.sampling import Sampling
from var_compressor.models.schedule import Schedule
from var_compressor.models.tensor_files import CheckpointError
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.team import local_device
from var_compressor.recipe import BUILT_IN_DEFAULT, ModelSource, Recipe
from var_compressor.spec import MODULES, QuantSpec

# what calibration measured: inputs as the recipe says, on any machine
AS_CALIBRATED = "w4a4"
OFF = Switches(weights=False, activations=False, kv=False)


@dataclass(frozen=True)
class Model:
    """A model that is not opened yet: full precision, or an artifact with ``switches``.

    ``compute``: how its 4-bit linears are multiplied, one of `layers.compute.COMPUTE`.
    """

    source: ModelSource
    artifact: Path | None
    switches: Switches
    compute: str
    prompt_cache: Path | None = None

    @cached_property
    def manifest(self) -> Manifest | None:
        return None if self.artifact is None else read_manifest(self.artifact)

    @property
    def name(self) -> str:
        return Path(self.source.path or self.source.name).name

    @property
    def label(self) -> str:
        """A few words for file names and bars."""
        kinds = [kind for kind, on in asdict(self.switches).items() if on]
        if self.artifact is None:
            return f"{self.name} full precision"
        return f"{self.artifact.name} {' '.join(kinds)}"

    @cached_property
    def device(self) -> torch.device:
        return local_device(choose_device(self.source.device))

    @property
    def runs_on(self) -> str:
        return device_kind(self.device)

    @property
    def full_precision(self) -> Model:
        return Model(self.source, None, OFF, self.compute, self.prompt_cache)

    def schedule(self, recipe: Recipe) -> Schedule:
        """The levels of its images as the recipe sets them."""
        config = transformer_config(self.source, may_be_absent=False)
        budget = recipe.collect.pixel_budget or config.pixel_budget
        return Schedule.of(recipe.collect.aspect_ratio, budget)

    @cached_property
    def hashes(self) -> dict[str, Any]:
        """Of the files that determine its images; reads all of them."""
        files: dict[str, Any] = {"base": _base_hashes(self.source)}
        if self.manifest is not None:
            quantized = self.switches.weights or self.switches.activations
            files["artifact"] = {
                name: entry["sha256"]
                for name, entry in sorted(self.manifest.files.items())
                if (self.switches.kv if name == KV_FILE else quantized and name != REPORT_FILE)
            }
            files["switches"] = asdict(self.switches)
        return files

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.hashes, sort_keys=True).encode()).hexdigest()

    def identity(self, sampling: Sampling, schedule: Schedule, *, seed: int) -> dict[str, Any]:
        """All that determines its images, next to the prompts."""
        dtype = choose_dtype(self.source.dtype, self.device)
        return {
            "version": __version__,
            "model": self.label,
            "sha256": self.sha256,
            "files": self.hashes,
            "seed": seed,
            "sampling": json.loads(json.dumps(asdict(sampling))),
            "aspect_ratio": schedule.aspect_ratio,
            "pixel_budget": schedule.pixel_budget,
            "compute": self.compute if self.artifact is not None else None,
            "dtype": str(dtype).removeprefix("torch."),
            "runs_on": self.runs_on,
        }

    def open(self) -> InfinityPipeline:
        """Raises: ValueError when a path of 4-bit products is asked for that cannot run here."""
        if self.artifact is None or self.manifest is None:
            pipeline = open_pipeline(self.source)
            pipeline.use_kernels("auto")
        else:
            pipeline = self._opened_artifact(self.artifact, self.manifest)
        if self.prompt_cache is not None and pipeline.text_encoder is not None:
            pipeline.text_encoder.cache_dir = self.prompt_cache
        return pipeline

    def _opened_artifact(self, artifact: Path, manifest: Manifest) -> InfinityPipeline:
        dtype = choose_dtype(self.source.dtype, self.device)
        pipeline = InfinityPipeline.from_pretrained(
            artifact, dtype=dtype, device=self.device, compute="reference"
        )
        base = None
        if not self.switches.weights:
            # the same as the artifact's, which may name one on another machine
            folder = directory.resolve(self.source.path or self.source.name)
            base = directory.load_transformer(folder, dtype=dtype, device=self.device)
        switch_linears(pipeline.transformer, self.switches, base)
        if not self.switches.kv:
            pipeline.kv_params = None
        if self.switches.activations and not self.switches.weights:
            # no kernel multiplies rounded inputs by full-precision weights
            return pipeline
        obstacle = pipeline.use_kernels(self.compute)
        if obstacle is not None and self.compute not in ("auto", AS_CALIBRATED):
            raise ValueError(
                f"--compute {self.compute} runs on kernels, which cannot run here: {obstacle}; "
                f"use {AS_CALIBRATED}"
            )
        return pipeline

    def describe(
        self, pipeline: InfinityPipeline, schedule: Schedule, identity: Mapping[str, Any]
    ) -> tuple[Subject, Drawing]:
        """What it is and how it draws, for the results."""
        rows = 2 if _is_guided(identity["sampling"]["cfg"]) else 1
        cache_bytes = pipeline.new_cache(schedule, rows=rows).num_bytes
        if pipeline.kv_params is None:
            cache_bytes = cache_bytes * 2 // pipeline.transformer.block_dtype.itemsize
        weight_bytes = transformer_bytes(pipeline)
        if self.manifest is not None and self.switches.weights:
            weight_bytes = self.manifest.num_weight_bytes
        report = pipeline.compute_report(schedule, num_images=1, rows=rows)
        paths = sorted({str(row["path"]) for row in report if row["why"] != "not compressed"})
        subject = Subject(
            base=self.source.path or self.source.name,
            artifact=None if self.artifact is None else str(self.artifact),
            sha256=identity["sha256"],
            summary=self.summary,
            **asdict(self.switches),
            weight_bytes=weight_bytes,
            kv_bytes_per_image=cache_bytes,
        )
        named = ("seed", "sampling", "aspect_ratio", "pixel_budget", "dtype", "runs_on")
        drawing = Drawing(
            **{name: identity[name] for name in named},
            compute=self.compute,
            paths=paths or ["reference" if pipeline.is_compressed else "full precision"],
            batch=identity.get("batch", 1),
        )
        return subject, drawing

    @property
    def summary(self) -> str:
        if self.manifest is None:
            return "full precision"
        words = [QuantSpec.from_dict(self.manifest.spec).summary()]
        if self.manifest.kv is not None:
            name = CacheFormat.of(self.manifest.kv, f"{self.artifact}: ").name
            words.append(f"{name.upper()} KV cache")
        off = [kind for kind, on in asdict(self.switches).items() if not on]
        return ", ".join(words) + (f"; off: {', '.join(off)}" if off else "")


def model_of(
    recipe: Recipe,
    artifact: Path | None,
    switches: Switches,
    *,
    compute: str,
    prompt_cache: Path | None,
) -> tuple[Model, list[str]]:
    """The model that was asked for, and what is to be said about it.

    Kinds of quantization that the artifact does not have count as off; with all of them off, it is
    the full-precision model.
    Raises: ArtifactError for no artifact, ValueError when the recipe speaks of another one.
    """
    full = Model(recipe.model, None, OFF, compute, prompt_cache)
    if artifact is None:
        return full, []
    manifest = read_manifest(artifact)
    _check_same(recipe, artifact, manifest)
    spec, notes = QuantSpec.from_dict(manifest.spec), []
    linears = [one for name in MODULES if (one := spec.for_module(name)) is not None]
    has = Switches(
        weights=bool(linears),
        activations=any(one.act.format is not None for one in linears),
        kv=manifest.kv is not None,
    )
    if switches.kv and not has.kv:
        notes.append(
            f"{artifact}: has no parameters for the KV cache, which stays in 16 bits; "
            "`varc calibrate-kv` adds them"
        )
    found = Switches(**{kind: on and getattr(switches, kind) for kind, on in asdict(has).items()})
    if found.is_full_precision:
        return full, [*notes, "nothing is quantized: this is the full-precision model"]
    return Model(recipe.model, artifact, found, compute, prompt_cache), notes


def _is_guided(cfg: float | list[float]) -> bool:
    return any(one != 1 for one in (cfg if isinstance(cfg, list) else [cfg]))


def _base_hashes(source: ModelSource) -> dict[str, str]:
    if source.vae_path is None:
        folder = directory.resolve(source.path or source.name)
        encoder = directory.read_index(folder).text_encoder
        return {**weight_hashes(folder), "text_encoder": encoder or ""}
    paths = [*_files(Path(source.path or "")), *_files(Path(source.vae_path))]
    hashes = {path.name: sha256_of(path) for path in paths}
    return {**hashes, "text_encoder": source.text_encoder_path or ""}


def _files(path: Path) -> Iterator[Path]:
    yield from sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]


def _is_base(folder: Path, manifest: Manifest) -> bool:
    """By its place, or by the hashes of its files where it lies elsewhere."""
    try:
        if directory.resolve(manifest.base["source"]).samefile(folder):
            return True
    except CheckpointError:
        pass
    files = (folder / "transformer").glob("*.safetensors")
    hashes = {path.name: sha256_of(path) for path in files}
    return bool(hashes) and hashes == manifest.base.get("transformer")


def _check_same(recipe: Recipe, artifact: Path, manifest: Manifest) -> None:
    """Whether the recipe is the artifact's, in all that it sets itself."""
    wanted = directory.resolve(recipe.model.path or recipe.model.name)
    if not _is_base(wanted, manifest):
        raise ValueError(
            f"{artifact}: was made from {manifest.base['source']}, the recipe's model is {wanted}; "
            "name the same model"
        )
    asked, made = flat(recipe.to_dict()["quant"]), flat(manifest.spec)
    for key, value in asked.items():
        origin = recipe.provenance.get(f"quant.{key}", BUILT_IN_DEFAULT)
        # how it was calibrated is in no name, and the cache is, by another command
        if origin == BUILT_IN_DEFAULT or key.startswith(("kv.", "calibration.")):
            continue
        if made.get(key) != value:
            raise ValueError(
                f"{origin}: quant.{key} is {value}, {artifact} was made with {made.get(key)}; "
                "give its own recipe, or quantize again"
            )
