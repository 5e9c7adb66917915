"""Several results over the same prompts: values, paired differences, bytes and latency.

Differences are between rows of the same images, so that what makes one prompt harder than another
does not count. A resample draws images, each with the rows of both models.

Shapes: N images, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from var_compressor.evaluation.metrics import METRICS
from var_compressor.evaluation.results import (
    TRUTH,
    BenchmarkResult,
    MetricResult,
    Results,
    read_results,
    read_rows,
    rows_name,
)
from var_compressor.evaluation.scores import FittedNormal
from var_compressor.evaluation.statistics import (
    NUM_RESAMPLES,
    RESAMPLING_SEED,
    Estimate,
    centered_estimate,
    num_frechet_resamples,
    paired_difference,
    resampled_frechet,
)

METHOD = (
    f"Brackets are 95 % intervals over the images: percentiles of {NUM_RESAMPLES:,} bootstrap "
    "resamples; of Fréchet distances, which resampling itself raises, the spread of 200 resamples "
    "(32 of more than 512 features) around their mean, moved to the value. Differences are paired: "
    "a resample draws an image with the results of both models. ▲ is better and ▼ worse than the "
    "first model where the interval excludes 0."
)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Loaded:
    """A result by the name that tables call it."""

    name: str
    results: Results
    rows: Mapping[str, Tensor]


@dataclass(frozen=True)
class Entry:
    """One model on one benchmark.

    ``num_bytes`` is of the transformer and one image's KV cache. ``differences`` are its metrics
    minus the first model's, where both have rows.
    """

    name: str
    summary: str
    num_bytes: int
    seconds_per_image: float
    metrics: dict[str, MetricResult]
    differences: dict[str, Estimate]


@dataclass(frozen=True)
class ComparedBenchmark:
    """All models on one benchmark; ``notes`` say what is not the same for all of them."""

    name: str
    num_samples: int
    entries: tuple[Entry, ...]
    notes: tuple[str, ...]

    @property
    def metrics(self) -> list[str]:
        """Those that any model has, in the order of METRICS."""
        there = dict.fromkeys(name for one in self.entries for name in one.metrics)
        return [
            *(name for name in METRICS if name in there),
            *(n for n in there if n not in METRICS),
        ]

    def higher_is_better(self, metric: str) -> bool:
        return next(
            one.metrics[metric] for one in self.entries if metric in one.metrics
        ).higher_is_better


@dataclass(frozen=True)
class Comparison:
    """What `varc compare` shows; ``sources`` are the directories by name."""

    sources: dict[str, str]
    benchmarks: tuple[ComparedBenchmark, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        how = {"num_resamples": NUM_RESAMPLES, "seed": RESAMPLING_SEED}
        return {"format": "var-compressor-comparison/1", "resampling": how, **asdict(self)}


def compare_all(sources: Sequence[str | Path], *, on_progress: Progress) -> Comparison:
    """Read results and compare them: with the first one, on every benchmark that all of them have.

    Raises: ValueError when that is not possible, ResultsError for one that cannot be read.
    """
    if len(sources) < 2:
        raise ValueError("a comparison needs two results or more; name their directories")
    loaded = load_all(sources)
    names = {one.name: str(source) for one, source in zip(loaded, sources, strict=True)}
    return Comparison(names, tuple(compare_results(loaded, on_progress=on_progress)))


def load_all(sources: Sequence[str | Path]) -> list[Loaded]:
    """Results and rows, called by their folder, or by their whole path where folders share a name.

    Raises: ValueError for a source given twice, ResultsError for one that cannot be read.
    """
    paths = [Path(source) for source in sources]
    folders = [(path if path.is_dir() else path.parent).resolve() for path in paths]
    if twice := [str(path) for i, path in enumerate(paths) if folders[i] in folders[:i]]:
        raise ValueError(f"{twice[0]}: is given twice; name each result once")
    short = [folder.name for folder in folders]
    names = short if len(set(short)) == len(short) else [str(path) for path in paths]
    return [
        Loaded(name, read_results(path), read_rows(path))
        for name, path in zip(names, paths, strict=True)
    ]


def compare_results(loaded: Sequence[Loaded], *, on_progress: Progress) -> list[ComparedBenchmark]:
    """Every benchmark that all of the results have.

    Raises: ValueError when there is none, or the prompts of one differ.
    """
    first, *others = loaded
    shared = [
        name
        for name in first.results.benchmarks
        if all(name in other.results.benchmarks for other in others)
    ]
    if not shared:
        had = "; ".join(f"{one.name} has {', '.join(one.results.benchmarks)}" for one in loaded)
        raise ValueError(f"no benchmark is in all of the results: {had}")
    return [_compare_benchmark(name, loaded, on_progress) for name in shared]


def _compare_benchmark(
    benchmark: str, loaded: Sequence[Loaded], on_progress: Progress
) -> ComparedBenchmark:
    first = loaded[0]
    found = {one.name: one.results.benchmarks[benchmark] for one in loaded}
    for name, other in found.items():
        _check_prompts(benchmark, (first.name, found[first.name]), (name, other))
    common = set(found[first.name].ids).intersection(*(one.ids for one in found.values()))
    if len(common) < 2:
        raise ValueError(f"{benchmark}: {len(common)} images are in all of the results; two needed")
    ids = [one for one in found[first.name].ids if one in common]
    paired, entries = _Paired(benchmark, first, ids), []
    for done, one in enumerate(loaded):
        entries.append(
            _entry(found[one.name], one, {} if one is first else paired.differences(one))
        )
        on_progress(f"comparing, {benchmark}", done + 1, len(loaded))
    return ComparedBenchmark(benchmark, len(ids), tuple(entries), _notes(benchmark, loaded, ids))


def _check_prompts(
    benchmark: str, first: tuple[str, BenchmarkResult], other: tuple[str, BenchmarkResult]
) -> None:
    """Raises: ValueError when the prompts differ: two models' difference would be the prompts'."""
    (name_a, a), (name_b, b) = first, other
    if a.prompts_sha256 != b.prompts_sha256:
        raise ValueError(
            f"{benchmark}: {name_b} is over other prompts than {name_a} ({b.num_samples} of subset "
            f"seed {b.subset_seed}, sha256 {b.prompts_sha256[:8]}; {a.num_samples} of subset seed "
            f"{a.subset_seed}, sha256 {a.prompts_sha256[:8]}); evaluate both with the same "
            "--num-samples and --seed"
        )


def _entry(found: BenchmarkResult, one: Loaded, differences: dict[str, Estimate]) -> Entry:
    subject = one.results.subject
    return Entry(
        name=one.name,
        summary=subject.summary,
        num_bytes=subject.weight_bytes + subject.kv_bytes_per_image,
        seconds_per_image=found.seconds_per_image,
        metrics=found.metrics,
        differences=differences,
    )


class _Paired:
    """Differences to ``first`` on the images ``ids`` of one benchmark."""

    def __init__(self, benchmark: str, first: Loaded, ids: Sequence[str]) -> None:
        self.benchmark, self.first, self.ids = benchmark, first, ids
        # of the first, by metric: the same for every other model
        self._frechet: dict[str, tuple[float, Tensor]] = {}

    def differences(self, other: Loaded) -> dict[str, Estimate]:
        """By metric, of those that have rows of both."""
        return {
            metric: self._difference(metric, other)
            for metric in other.results.benchmarks[self.benchmark].metrics
            if all(rows_name(self.benchmark, metric) in one.rows for one in (other, self.first))
        }

    def _difference(self, metric: str, other: Loaded) -> Estimate:
        found = self._rows(metric, other)
        if found.ndim == 1:
            how = {"num_resamples": NUM_RESAMPLES, "seed": RESAMPLING_SEED}
            return paired_difference(
                found, self._rows(metric, self.first), torch.ones_like(found), **how
            )
        if metric not in self._frechet:
            self._frechet[metric] = self._distance(metric, self.first)
        value, resamples_R = self._distance(metric, other)
        first_value, first_R = self._frechet[metric]
        return centered_estimate(value - first_value, resamples_R - first_R)

    def _distance(self, metric: str, one: Loaded) -> tuple[float, Tensor]:
        """Fréchet distance to the first's real images, and those of resampled images."""
        truth = FittedNormal.of(self.first.rows[rows_name(self.benchmark, metric, TRUTH)])
        rows_NF = self._rows(metric, one)
        return FittedNormal.of(rows_NF).frechet_distance(truth), resampled_frechet(
            rows_NF,
            truth,
            num_resamples=num_frechet_resamples(rows_NF.shape[1]),
            seed=RESAMPLING_SEED,
        )

    def _rows(self, metric: str, one: Loaded) -> Tensor:
        place = {id: i for i, id in enumerate(one.results.benchmarks[self.benchmark].ids)}
        rows = one.rows[rows_name(self.benchmark, metric)]
        return rows[[place[id] for id in self.ids]]


def _notes(benchmark: str, loaded: Sequence[Loaded], ids: Sequence[str]) -> tuple[str, ...]:
    """Settings that are not the same for all, one line each."""
    notes = []
    told: dict[str, Callable[[Loaded], Any]] = {
        "seeds": lambda one: one.results.drawing.seed,
        "sampling": lambda one: one.results.drawing.sampling,
        "base model": lambda one: one.results.subject.base,
        "dtype": lambda one: one.results.drawing.dtype,
        "machine": lambda one: one.results.machine.get("name"),
    }
    for what, value_of in told.items():
        names: dict[str, list[str]] = {}
        for one in loaded:
            names.setdefault(str(value_of(one)), []).append(one.name)
        if len(names) > 1:
            notes.append(f"{what} differ: {_by_value(names)}")
    for one in loaded:
        found = one.results.benchmarks[benchmark]
        if len(found.ids) > len(ids):
            missing = len(found.ids) - len(ids)
            notes.append(
                f"{one.name}: {missing} of its images have no counterpart in all others; "
                "differences leave them out"
            )
    return (*notes, *_skipped(benchmark, loaded))


def _by_value(names: Mapping[str, Sequence[str]]) -> str:
    """Whose a value is; a value that more than three share is that of all others."""
    most = max(names, key=lambda value: len(names[value]))
    shared = {value: len(names[value]) > 3 and value == most for value in names}
    order = sorted(names, key=lambda value: shared[value])
    return "; ".join(
        f"{value} {'all others' if shared[value] else ', '.join(names[value])}" for value in order
    )


def _skipped(benchmark: str, loaded: Sequence[Loaded]) -> list[str]:
    """Metrics that are missing, a line per reason and models."""
    by_metric: dict[tuple[str, str], list[str]] = {}
    for one in loaded:
        for metric, why in one.results.benchmarks[benchmark].skipped.items():
            by_metric.setdefault((metric, why), []).append(one.name)
    lines: dict[tuple[str, str], list[str]] = {}
    for (metric, why), names in by_metric.items():
        who = "" if len(names) == len(loaded) else f"{', '.join(names)}: "
        lines.setdefault((who, why), []).append(metric)
    return [f"{who}skipped {', '.join(metrics)}: {why}" for (who, why), metrics in lines.items()]
