"""`varc reproduce`: a published table, measured again by one command.

Quantize, calibrate the KV cache, evaluate full precision and W4A4 with the cache, time both, and
put it all beside the published numbers. What stands finished is not done again. Timing is given
from outside: this package knows nothing of `bench`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from var_compressor.artifact import write_json
from var_compressor.compress import check_kv, transformer_config
from var_compressor.evaluation.benchmarks import BenchmarkError, open_benchmarks
from var_compressor.evaluation.compare import ComparedBenchmark, Loaded, compare_results
from var_compressor.evaluation.compressing import make_artifact
from var_compressor.evaluation.evaluate import Request, evaluate
from var_compressor.evaluation.metrics import (
    BIT_METRICS,
    METRICS,
    MetricUnavailable,
    find_weights,
)
from var_compressor.evaluation.results import RESULTS_FILE, read_results, read_rows
from var_compressor.evaluation.steps import Steps
from var_compressor.evaluation.subject import AS_CALIBRATED
from var_compressor.layers.switches import Switches
from var_compressor.models.convert import model_config
from var_compressor.models.directory import read_index, resolve, text_encoder_folders
from var_compressor.models.tensor_files import CheckpointError
from var_compressor.quant.calibration import Progress
from var_compressor.recipe import Recipe, RecipeError, located, read_yaml
from var_compressor.spec import SpecError, from_mapping

FULL, COMPRESSED = "full precision", "W4A4 + KV8"
PEAK_GB, SECONDS = "peak_gb", "seconds"
GB = 1e9


@dataclass(frozen=True)
class PublishedRow:
    """A published quantity: a metric's name, PEAK_GB or SECONDS, of both models."""

    quantity: str
    full: float
    compressed: float


@dataclass(frozen=True)
class Published:
    """What somebody measured, if anybody did: ``machine`` is that of memory and time."""

    source: str = ""
    machine: str = ""
    num_samples: int = 0
    rows: tuple[PublishedRow, ...] = ()


@dataclass(frozen=True)
class BenchSpec:
    """What is drawn to take the time, and how often."""

    prompt: str
    runs: int


@dataclass(frozen=True)
class Reproduction:
    """The content of ``recipes/reproduce/*.yaml``; ``recipes`` are merged as `load_recipe` does."""

    recipes: tuple[str, ...]
    benchmark: str
    metrics: tuple[str, ...]
    num_samples: int
    bench: BenchSpec
    seed: int = 0
    published: Published = Published()


@dataclass(frozen=True)
class Places:
    """Where things are read from; None for the metrics' own places."""

    data_root: Path
    metric_weights: Path | None


@dataclass(frozen=True)
class Timed:
    """What bench found, by model name: median seconds of an image from prompt to PNG, and bytes at
    the peak. ``columns`` and ``rows`` are its table.
    """

    machine: str
    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Reproduced:
    """Everything that the page shows."""

    asked: Reproduction
    model: str
    compared: ComparedBenchmark
    timed: Timed
    machine: dict[str, Any]
    summary: str

    def to_dict(self) -> dict[str, Any]:
        return {"format": "var-compressor-reproduction/1", **asdict(self)}


# times an artifact and its full-precision model, and writes details into a folder
Bench = Callable[[Path, Recipe, BenchSpec, Path], Timed]


def read_reproduction(path: Path) -> Reproduction:
    """Raises: RecipeError naming the file and the key that cannot be used."""
    found = located(path)
    try:
        asked = from_mapping(Reproduction, read_yaml(found))
    except SpecError as error:
        raise RecipeError(f"{path}: {error}") from None
    if unknown := [name for name in asked.metrics if name not in METRICS]:
        raise RecipeError(f"{path}: metrics: no metric is called {unknown[0]!r}")
    if asked.num_samples < 2 or asked.bench.runs < 1:
        raise RecipeError(f"{path}: expected num_samples of 2 or more and bench.runs of 1 or more")
    return asked


def missing(asked: Reproduction, recipe: Recipe, places: Places) -> list[str]:
    """All that this machine lacks, a line each with where to put it; empty if nothing."""
    found = [*_missing_model(recipe)]
    try:
        (benchmark,) = open_benchmarks([asked.benchmark], places.data_root)
        first = benchmark.choose(1, seed=asked.seed)[0]
        if first.truth is not None and any(METRICS[m].compares == "truth" for m in asked.metrics):
            first.truth.load()
    except BenchmarkError as error:
        found.append(f"data set: {error}")
    for name in asked.metrics:
        if name in BIT_METRICS:
            continue
        try:
            find_weights(name, weights_dir=places.metric_weights)
        except MetricUnavailable as error:
            found.append(f"metric {error}")
    return found


def _missing_model(recipe: Recipe) -> list[str]:
    """What of the model is not there; hub ids of text encoders count as there."""
    name, found = recipe.model.name, []
    try:
        folder = resolve(recipe.model.path or name)
        text_encoder_folders(folder, read_index(folder))
        transformer_config(recipe.model, may_be_absent=False)
    except (CheckpointError, OSError) as error:
        config = model_config(name)
        where = f" ({' '.join(str(error).split())})" if recipe.model.path else ""
        found.append(
            f"model {recipe.model.path or name}: not here{where}; get the official {name} "
            f"transformer, its VAE of {config.vae.code_dim} channels and {config.text_encoder}, "
            "make a directory of them with `varc convert`, and give model.path=DIR"
        )
    return found


def reproduce(
    asked: Reproduction,
    recipe: Recipe,
    out: Path,
    places: Places,
    *,
    bench: Bench,
    on_progress: Progress,
    tell: Callable[[str], None],
) -> Reproduced:
    """All steps in their order; nothing may be ``missing``.

    Raises: ValueError for what cannot be done.
    """
    check_kv(recipe.quant.kv)
    steps, artifact = Steps(out, tell=tell), out / "artifact"
    tell("quantize and calibrate the KV cache")
    make_artifact(recipe, artifact, on_progress=on_progress)
    folders = {}
    for name, source in ((FULL, None), (COMPRESSED, artifact)):
        folders[name] = out / ("full" if source is None else "compressed")
        _evaluate(asked, recipe, source, folders[name], places, steps, on_progress, tell)
    timed = _timed(asked, recipe, artifact, out, steps, bench)
    loaded = [Loaded(name, read_results(one), read_rows(one)) for name, one in folders.items()]
    (compared,) = compare_results(loaded, on_progress=on_progress)
    return Reproduced(
        asked=asked,
        model=recipe.model.name,
        compared=compared,
        timed=timed,
        machine=loaded[1].results.machine,
        summary=loaded[1].results.subject.summary,
    )


def _evaluate(
    asked: Reproduction,
    recipe: Recipe,
    artifact: Path | None,
    folder: Path,
    places: Places,
    steps: Steps,
    on_progress: Progress,
    tell: Callable[[str], None],
) -> None:
    images = steps.out / "images"
    request = Request(
        recipe=recipe,
        artifact=artifact,
        switches=Switches(),
        benchmarks=(asked.benchmark,),
        metrics=asked.metrics,
        num_samples=asked.num_samples,
        seed=asked.seed,
        subset_seed=asked.seed,
        batch=1,
        compute=AS_CALIBRATED,
        gen_root=images,
        ref_root=images,
        data_root=places.data_root,
        metric_weights=places.metric_weights,
        prompt_cache=steps.out / "prompts",
        out=folder,
    )
    inputs = {"asked": asdict(asked), "recipe": recipe.to_dict()}
    steps.run(
        f"evaluate-{folder.name}",
        inputs,
        [folder / RESULTS_FILE],
        lambda: evaluate(request, on_progress=on_progress, note=tell),
    )


def _timed(
    asked: Reproduction, recipe: Recipe, artifact: Path, out: Path, steps: Steps, bench: Bench
) -> Timed:
    folder = out / "bench"
    path = folder / "timed.json"

    def work() -> None:
        write_json(path, asdict(bench(artifact, recipe, asked.bench, folder)))

    inputs = {"bench": asdict(asked.bench), "recipe": recipe.to_dict()}
    steps.run("bench", inputs, [path], work)
    return Timed(**json.loads(path.read_text(encoding="utf-8")))
