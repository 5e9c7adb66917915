"""`varc ablate`: every kind of quantization by itself, by three methods, against full precision.

Weights, inputs and the cache of keys and values are switched on one by one and together, for plain
rounding, SmoothQuant and SVDQuant. Two more runs of full precision with other seeds show how far
numbers go by chance: the noise floor. Each cell is an evaluation of its own, which a killed run
goes on with, and is not repeated once it is finished.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from var_compressor.artifact import write_json
from var_compressor.compress import check_kv, open_pipeline, sampling_of
from var_compressor.evaluation.benchmarks import image_seed, open_benchmarks
from var_compressor.evaluation.bit_rows import LEVELS
from var_compressor.evaluation.bitwise import DrawRequest, group_agreement
from var_compressor.evaluation.compare import ComparedBenchmark, Loaded, compare_results
from var_compressor.evaluation.compressing import make_artifact
from var_compressor.evaluation.evaluate import Request, evaluate
from var_compressor.evaluation.metrics import BIT_METRICS
from var_compressor.evaluation.metrics import METRICS as KNOWN_METRICS
from var_compressor.evaluation.results import RESULTS_FILE, read_results, read_rows, rows_name
from var_compressor.evaluation.statistics import (
    NUM_RESAMPLES,
    RESAMPLING_SEED,
    Correlation,
    Estimate,
    bootstrap_mean,
    correlation,
)
from var_compressor.evaluation.steps import Steps
from var_compressor.evaluation.subject import AS_CALIBRATED
from var_compressor.layers.switches import Switches
from var_compressor.models.agreement import ForcedRows
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.calibration import Progress
from var_compressor.recipe import Recipe, load_recipe

FULL = "full precision"
METRICS = ("psnr", "ssim", "caption_accuracy", "reader_fid", *BIT_METRICS)
OTHER_SEEDS = (10_000, 20_000)
_FORCED = ("bit_agreement", "bit_kl")


@dataclass(frozen=True)
class Method:
    """A way to quantize, by what it sets on top of the recipe."""

    title: str
    overrides: tuple[str, ...]


# as the literature compares them: signed inputs, whole ranges
_PLAIN = ("quant.weight.range_search=false", "quant.act.allow_unsigned=false")
METHODS = {
    "naive": Method("naive", (*_PLAIN, "quant.smooth.enabled=false", "quant.low_rank.rank=0")),
    "smoothquant": Method("SmoothQuant", (*_PLAIN, "quant.low_rank.rank=0")),
    "svdquant": Method("SVDQuant", ()),
}


@dataclass(frozen=True)
class Cell:
    """A line of the grid; full precision for no method. ``seed`` is added to the run's."""

    name: str
    title: str
    method: str | None
    switches: Switches
    seed: int = 0


@dataclass(frozen=True)
class Grid:
    """What is asked for.

    ``group_prompts``: how many prompts tell what each group of layers costs.
    """

    recipes: tuple[str, ...]
    overrides: tuple[str, ...]
    methods: tuple[str, ...]
    benchmark: str
    metrics: tuple[str, ...]
    num_samples: int
    group_prompts: int
    seed: int
    data_root: Path
    metric_weights: Path | None

    def recipe(self, method: str) -> Recipe:
        # the method last: it is what its line is about
        return load_recipe(self.recipes, (*self.overrides, *METHODS[method].overrides))


@dataclass(frozen=True)
class GroupCost:
    """What one group of layers alone does to the next bits: over the prompts, and by level."""

    same_bit: Estimate
    kl_nats: Estimate
    same_bit_by_level: tuple[float, ...]
    kl_nats_by_level: tuple[float, ...]


@dataclass(frozen=True)
class CorrelatedPair:
    """How a metric of bits goes along with one of images over the compressed cells."""

    bits: str
    images: str
    found: Correlation


@dataclass(frozen=True)
class Ablation:
    """The whole grid.

    ``compared``: all cells, the first is full precision. ``levels``: by cell title and metric, the
    mean of each level. ``groups``: by method title and group.
    """

    compared: ComparedBenchmark
    cells: tuple[Cell, ...]
    levels: dict[str, dict[str, list[float]]]
    groups: dict[str, dict[str, GroupCost]]
    correlations: tuple[CorrelatedPair, ...]
    num_group_prompts: int

    def to_dict(self) -> dict[str, Any]:
        return {"format": "var-compressor-ablation/1", **asdict(self)}

    @property
    def noise_floor(self) -> list[str]:
        """Titles of full precision with other seeds."""
        return [one.title for one in self.cells if one.seed]


def cells_of(grid: Grid) -> list[Cell]:
    """Full precision, the noise floor, the cache alone, and every method's combinations.

    Raises: ValueError for an unknown method, or a recipe that leaves a kind at 16 bits.
    """
    off = Switches(weights=False, activations=False, kv=False)
    cells = [Cell("full", FULL, None, off)]
    cells += [Cell(f"full-seeds-{n}", f"{FULL}, seeds + {n}", None, off, n) for n in OTHER_SEEDS]
    for method in grid.methods:
        if method not in METHODS:
            raise ValueError(f"no method is called {method!r}; there are {', '.join(METHODS)}")
        recipe = grid.recipe(method)
        check_kv(recipe.quant.kv)
        kinds = _kinds(recipe)
        if method == grid.methods[-1]:
            # the ranges of the best weights; they hardly differ
            alone = Cell("kv", f"{kinds['kv']} alone", method, replace(off, kv=True))
            cells.insert(1 + len(OTHER_SEEDS), alone)
        for kv in (False, True):
            for weights, activations in ((True, False), (False, True), (True, True)):
                switches = Switches(weights, activations, kv)
                on = [kinds[kind] for kind, is_on in asdict(switches).items() if is_on]
                words = "".join(on).replace("KV", " KV")
                name = "-".join([method, *on]).lower()
                cells.append(Cell(name, f"{METHODS[method].title} {words}", method, switches))
    return cells


def _kinds(recipe: Recipe) -> dict[str, str]:
    """How each kind is called, such as W4, A4 and KV8."""
    found = re.match(r"(W\d+)(A\d+)", recipe.quant.summary())
    if found is None or found[2] == "A16":
        raise ValueError(
            f"the recipe leaves weights or inputs at 16 bits ({recipe.quant.summary()}): there is "
            "nothing to switch; use one like recipes/svdquant/int4.yaml"
        )
    nbits = re.sub(r"\D", "", recipe.quant.kv.format)
    return {"weights": found[1], "activations": found[2], "kv": f"KV{nbits}"}


def ablate(
    grid: Grid, out: Path, *, on_progress: Progress, tell: Callable[[str], None]
) -> Ablation:
    """Make the artifacts, evaluate every cell, and put the results together.

    Raises: ValueError for what cannot be done, before any work where it can be known.
    """
    cells, steps = cells_of(grid), Steps(out, tell=tell)
    requests = _requests(grid)
    if unknown := [name for name in grid.metrics if name not in KNOWN_METRICS]:
        known = ", ".join(KNOWN_METRICS)
        raise ValueError(f"no metric is called {unknown[0]!r}; there are {known}")
    for method in grid.methods:
        folder = _artifact(out, method)
        make_artifact(grid.recipe(method), folder, on_progress=_named(method, on_progress))
    for number, cell in enumerate(cells):
        on_progress("lines of the table", number, len(cells))
        _evaluate(cell, grid, out, steps, on_progress, tell)
    on_progress("lines of the table", len(cells), len(cells))
    groups = {}
    for method in grid.methods:
        groups[METHODS[method].title] = _groups(method, requests, grid, out, steps, on_progress)
    return _put_together(cells, groups, grid, out, on_progress)


def _artifact(out: Path, method: str) -> Path:
    return out / "artifacts" / method


def _named(name: str, on_progress: Progress) -> Progress:
    return lambda stage, done, total: on_progress(f"{name}: {stage}", done, total)


def _cell_folder(out: Path, cell: Cell) -> Path:
    return out / "cells" / cell.name


def _evaluate(
    cell: Cell,
    grid: Grid,
    out: Path,
    steps: Steps,
    on_progress: Progress,
    tell: Callable[[str], None],
) -> None:
    method = cell.method or grid.methods[-1]
    folder, images = _cell_folder(out, cell), out / "images"
    request = Request(
        recipe=grid.recipe(method),
        artifact=None if cell.method is None else _artifact(out, method),
        switches=cell.switches,
        benchmarks=(grid.benchmark,),
        # given the same bits, full precision with other seeds is the very same model
        metrics=tuple(m for m in grid.metrics if not (cell.seed and m in _FORCED)),
        num_samples=grid.num_samples,
        seed=grid.seed + cell.seed,
        subset_seed=grid.seed,
        batch=1,
        compute=AS_CALIBRATED,
        gen_root=images,
        ref_root=images,
        data_root=grid.data_root,
        metric_weights=grid.metric_weights,
        prompt_cache=out / "prompts",
        out=folder,
        ref_seed=grid.seed,
    )
    told = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(request).items()
        if name not in ("recipe", "switches")
    }
    inputs = {**told, "recipe": request.recipe.to_dict(), "switches": asdict(cell.switches)}
    steps.run(
        cell.name,
        inputs,
        [folder / RESULTS_FILE],
        lambda: evaluate(request, on_progress=on_progress, note=tell),
    )


# --- groups of layers -----------------------------------------------------------------------------


def _groups(
    method: str,
    requests: Sequence[DrawRequest],
    grid: Grid,
    out: Path,
    steps: Steps,
    on_progress: Progress,
) -> dict[str, GroupCost]:
    path = out / "groups" / f"{method}.json"
    recipe = grid.recipe(method)
    inputs = {
        "recipe": recipe.to_dict(),
        "benchmark": grid.benchmark,
        "num_prompts": grid.group_prompts,
        "seed": grid.seed,
    }

    def work() -> None:
        found = group_agreement(
            open_pipeline(recipe.model),
            _opened(recipe, _artifact(out, method)),
            requests,
            on_progress=_named(method, on_progress),
        )
        write_json(path, {name: asdict(_cost(rows)) for name, rows in found.items()})

    steps.run(f"groups-{method}", inputs, [path], work)
    return {name: _cost_of(entry) for name, entry in json.loads(path.read_text()).items()}


def _opened(recipe: Recipe, artifact: Path) -> InfinityPipeline:
    return open_pipeline(replace(recipe.model, path=str(artifact)))


def _requests(grid: Grid) -> list[DrawRequest]:
    """The prompts that tell what groups of layers cost, each as it is drawn in the cells.

    Raises: ValueError for a benchmark that cannot be had, or a cfg per level.
    """
    (benchmark,) = open_benchmarks([grid.benchmark], grid.data_root)
    collect = load_recipe(grid.recipes, grid.overrides).collect
    chosen = benchmark.choose(grid.num_samples, seed=grid.seed)
    samples = [one for one in chosen if one.prompt.strip()][: grid.group_prompts]
    return [
        DrawRequest(
            (one.prompt,),
            (image_seed(benchmark.name, one.prompt, grid.seed),),
            sampling_of(collect),
            collect.aspect_ratio,
            collect.pixel_budget,
        )
        for one in samples
    ]


def _cost(rows: ForcedRows) -> GroupCost:
    how = {"num_resamples": NUM_RESAMPLES, "seed": RESAMPLING_SEED}
    level = rows.pooled()
    return GroupCost(
        bootstrap_mean(rows.same_bit_B, **how),
        bootstrap_mean(rows.kl_nats_B, **how),
        level.same_bit,
        level.kl_nats,
    )


def _cost_of(entry: Mapping[str, Any]) -> GroupCost:
    return GroupCost(
        Estimate(**entry["same_bit"]),
        Estimate(**entry["kl_nats"]),
        tuple(entry["same_bit_by_level"]),
        tuple(entry["kl_nats_by_level"]),
    )


# --- putting together -----------------------------------------------------------------------------


def _put_together(
    cells: Sequence[Cell],
    groups: dict[str, dict[str, GroupCost]],
    grid: Grid,
    out: Path,
    on_progress: Progress,
) -> Ablation:
    loaded = [
        Loaded(cell.title, read_results(folder), read_rows(folder))
        for cell in cells
        for folder in [_cell_folder(out, cell)]
    ]
    (compared,) = compare_results(loaded, on_progress=on_progress)
    return Ablation(
        compared=compared,
        cells=tuple(cells),
        levels={one.name: _levels(one, compared.name) for one in loaded},
        groups=groups,
        correlations=tuple(correlated(compared, cells)),
        num_group_prompts=min(grid.group_prompts, grid.num_samples),
    )


def _levels(one: Loaded, benchmark: str) -> dict[str, list[float]]:
    found = {name: one.rows.get(rows_name(benchmark, name, LEVELS)) for name in BIT_METRICS}
    return {name: rows.mean(0).tolist() for name, rows in found.items() if rows is not None}


def correlated(compared: ComparedBenchmark, cells: Sequence[Cell]) -> list[CorrelatedPair]:
    """Every metric of bits with every one of images, over the cells that are quantized.

    KL goes in by its logarithm, of which cells differ by orders of magnitude.
    """
    quantized = {cell.title for cell in cells if cell.method is not None}
    entries = [one for one in compared.entries if one.name in quantized]
    found = []
    for bits in (name for name in compared.metrics if name in BIT_METRICS):
        for images in (name for name in compared.metrics if name not in BIT_METRICS):
            both = [one.metrics for one in entries if {bits, images} <= one.metrics.keys()]
            x = [_scaled(bits, metrics[bits].value) for metrics in both]
            y = [metrics[images].value for metrics in both]
            if len(both) >= 5 and len(set(x)) > 1 and len(set(y)) > 1:
                found.append(CorrelatedPair(bits, images, correlation(x, y)))
    return found


def _scaled(metric: str, value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).log()) if metric == "bit_kl" else value
