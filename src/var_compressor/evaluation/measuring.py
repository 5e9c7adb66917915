"""Metrics of drawn images: a row per image, computed where the image is, and what rows amount to.

Shapes: N images, F numbers of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from var_compressor.artifact import write_atomically
from var_compressor.evaluation.benchmarks import Sample
from var_compressor.evaluation.gallery import Gallery, read_carried, read_content, read_image
from var_compressor.evaluation.kept_rows import KeptRows, Row, row_key
from var_compressor.evaluation.metrics import (
    BIT_METRICS,
    METRICS,
    Metric,
    MetricSpec,
    MetricUnavailable,
    open_metric,
    weights_sha256,
)
from var_compressor.evaluation.metrics.scenes import scene_of
from var_compressor.evaluation.results import REFERENCE, TRUTH, Change, MetricResult
from var_compressor.evaluation.runner import PromptSet, who_sees
from var_compressor.evaluation.scores import FittedNormal
from var_compressor.evaluation.sharding import Crew
from var_compressor.evaluation.statistics import (
    NUM_RESAMPLES,
    RESAMPLING_SEED,
    Estimate,
    bootstrap_mean,
    centered_estimate,
    distance_estimate,
    frechet_by_size,
    num_frechet_resamples,
    paired_difference,
    resampled_frechet,
)
from var_compressor.quant.calibration import Progress

# what metrics compare each image with that full precision has to draw
NEEDS_REFERENCE = ("reference", "bits")
_MAX_SETS = 8
# images that go from one disk to another at a time
_SENT_TOGETHER = 16

Sides = dict[str, Tensor]


@dataclass(frozen=True)
class Drawn:
    """A benchmark's images: the model's, and full precision's if they were drawn."""

    prompts: PromptSet
    gallery: Gallery
    reference: Gallery | None

    @property
    def galleries(self) -> list[Gallery]:
        return [one for one in (self.gallery, self.reference) if one is not None]


@dataclass(frozen=True)
class Measured:
    """Rows of a benchmark by metric and side ("" for the model's own), and what they amount to."""

    rows: dict[str, Sides]
    metrics: dict[str, MetricResult]
    reference: dict[str, MetricResult]
    changes: dict[str, Change]


def check_metrics(
    names: Sequence[str], *, weights_dir: Path | None, crew: Crew, on_progress: Progress
) -> dict[str, str]:
    """Metrics that cannot be had, and why; opened once, so that it is known before the work.

    Raises: ValueError for an unknown metric, or for weights that are not what they should be.
    """
    missing = {}
    for number, name in enumerate(names):
        on_progress("looking for metrics", number, len(names))
        if name in BIT_METRICS:
            continue
        try:
            open_metric(name, weights_dir=weights_dir, device="cpu")
        except MetricUnavailable as error:
            missing[name] = " ".join(str(error).split())
    on_progress("looking for metrics", len(names), len(names))
    return {name: why for one in crew.gathered(missing) for name, why in one.items()}


def why_not(spec: MetricSpec, drawn: Drawn) -> str | None:
    """Why a metric has no meaning for a benchmark; None if it has."""
    if spec.compares in NEEDS_REFERENCE and drawn.reference is None:
        return "compares with full precision, and this is the full-precision model"
    num_truths = sum(one.truth is not None for one in drawn.prompts.samples)
    if spec.compares == "truth" and num_truths < 2:
        return f"{drawn.prompts.name} has no real images to compare with"
    if spec.compares == "caption" and any(
        scene_of(sample.prompt) is None for sample in drawn.prompts.samples
    ):
        return f"the prompts of {drawn.prompts.name} are no captions of Infinity-Tiny's test scenes"
    return None


def measure_rows(
    name: str,
    drawn: Sequence[Drawn],
    *,
    weights_dir: Path | None,
    rows_root: Path,
    crew: Crew,
    on_progress: Progress,
) -> list[Sides]:
    """Rows of one metric for several benchmarks, in the order of their samples; all get them.

    They are kept below ``rows_root``, and what is there is not measured again.
    """
    metric = open_metric(name, weights_dir=weights_dir, device=crew.device)
    judge = {"metric": name, "weights": weights_sha256(name, weights_dir=weights_dir)}
    found = []
    with KeptRows(rows_root, judge, crew.device) as kept:
        measure = _Measure(metric, kept, crew, on_progress)
        for one in drawn:
            owners = owners_of(one, crew)
            sides = {"": measure.drawn(one, one.gallery, owners)}
            if one.reference is not None and metric.spec.compares != "reference":
                sides[REFERENCE] = measure.drawn(one, one.reference, owners)
            if metric.spec.compares == "truth":
                sides[TRUTH] = measure.truths(one.prompts)
            found.append(sides)
    return found


def owners_of(drawn: Drawn, crew: Crew) -> list[int]:
    """Which process measures each sample: one that sees all of its images.

    Where the images of a sample are on different disks, full precision's is copied to the model's.
    """
    samples = drawn.prompts.samples
    seen = [who_sees(one, drawn.prompts, crew) for one in drawn.galleries]
    owners, moves = [], []
    for number, sample in enumerate(samples):
        ranks = seen[0][sample.id]
        both = [rank for rank in ranks if all(rank in one[sample.id] for one in seen)]
        if both:
            owners.append(both[number % len(both)])
            continue
        owners.append(ranks[number % len(ranks)])
        moves.append((sample, seen[-1][sample.id][0], owners[-1]))
    assert drawn.reference is not None or not moves
    for start in range(0, len(moves), _SENT_TOGETHER):
        _send(moves[start : start + _SENT_TOGETHER], drawn, crew)
    return owners


def _send(moves: Sequence[tuple[Sample, int, int]], drawn: Drawn, crew: Crew) -> None:
    gallery = drawn.galleries[-1]
    paths = {sample.id: gallery.path(drawn.prompts.name, sample) for sample, _, _ in moves}
    mine = {
        sample.id: paths[sample.id].read_bytes()
        for sample, sender, _ in moves
        if sender == crew.rank
    }
    sent = crew.merged(mine)
    for sample, _, taker in moves:
        if taker == crew.rank:
            write_atomically(paths[sample.id], sent[sample.id])


@dataclass(frozen=True)
class _Measure:
    """One metric, by one of the processes that all do the same."""

    metric: Metric
    kept: KeptRows
    crew: Crew
    on_progress: Progress

    def drawn(self, drawn: Drawn, gallery: Gallery, owners: Sequence[int]) -> Tensor:
        """Of the images in one of a benchmark's galleries."""
        name = drawn.prompts.name
        stage = f"{self.metric.spec.name}, {name}"
        if gallery is drawn.reference:
            stage += " of full precision"
        reference = drawn.reference if self.metric.spec.compares == "reference" else None

        def row(number: int) -> Tensor:
            sample = drawn.prompts.samples[number]
            path = gallery.path(name, sample)
            other = None if reference is None else reference.path(name, sample)
            prompt = sample.prompt if self.metric.spec.reads_prompts else ""
            compared = b"" if other is None else read_content(other)
            return self._row(
                row_key(read_content(path), prompt.encode(), compared),
                lambda: read_image(path),
                [sample.prompt],
                None if other is None else lambda: read_image(other),
            )

        mine = [number for number, owner in enumerate(owners) if owner == self.crew.rank]
        return self._whole(mine, row, len(owners), stage)

    def truths(self, prompts: PromptSet) -> Tensor:
        """Of the real images of a benchmark."""
        truths = [one.truth for one in prompts.samples if one.truth is not None]

        def row(number: int) -> Tensor:
            truth = truths[number]
            return self._row(row_key(truth.content()), truth.load, [], None)

        stage = f"{self.metric.spec.name}, {prompts.name} of real images"
        return self._whole(self.crew.team.mine(len(truths)), row, len(truths), stage)

    def _row(
        self,
        key: str,
        load: Callable[[], Tensor],
        prompts: list[str],
        load_reference: Callable[[], Tensor] | None,
    ) -> Tensor:
        def measured() -> Row:
            reference_B3YX = None if load_reference is None else load_reference()[None]
            rows = self.metric.rows(load()[None], prompts=prompts, reference_B3YX=reference_B3YX)
            return {"row": rows[0]}

        return self.kept.get(key, measured)["row"]

    def _whole(
        self, mine: Sequence[int], row: Callable[[int], Tensor], num_rows: int, stage: str
    ) -> Tensor:
        rows = {}
        for done, number in enumerate(mine):
            rows[number] = row(number)
            self.on_progress(stage, done + 1, len(mine))
        whole = self.crew.whole(rows, num_rows)
        assert whole is not None
        return whole


def median_seconds(drawn: Drawn, crew: Crew) -> float:
    """Of drawing one of the model's images."""
    seconds = {}
    for sample, owner in zip(drawn.prompts.samples, owners_of(drawn, crew), strict=True):
        if owner == crew.rank:
            carried = read_carried(drawn.gallery.path(drawn.prompts.name, sample))
            seconds[sample.id] = float(carried["seconds"])
    return median(crew.merged(seconds).values())


# --- numbers --------------------------------------------------------------------------------------


def summarize(rows: Mapping[str, Sides], device: torch.device) -> Measured:
    """Values and intervals of a benchmark's rows; ``device`` computes the Fréchet distances."""
    metrics, reference, changes = {}, {}, {}
    for name, sides in rows.items():
        spec, own, full = METRICS[name], sides[""], sides.get(REFERENCE)
        if own.ndim == 1:
            metrics[name] = _result(spec, _mean(own), len(own))
            if full is not None:
                reference[name] = _result(spec, _mean(full), len(full))
                changes[name] = _change(
                    paired_difference(
                        own,
                        full,
                        torch.ones_like(own),
                        num_resamples=NUM_RESAMPLES,
                        seed=RESAMPLING_SEED,
                    )
                )
            continue
        truth = FittedNormal.of(sides[TRUTH].to(device))
        found = _distance(spec, own.to(device), truth)
        metrics[name] = found[0]
        if full is not None:
            other = _distance(spec, full.to(device), truth)
            reference[name] = other[0]
            difference = found[0].value - other[0].value
            changes[name] = _change(centered_estimate(difference, found[1] - other[1]))
    return Measured(dict(rows), metrics, reference, changes)


def _mean(rows_N: Tensor) -> Estimate:
    return bootstrap_mean(rows_N, num_resamples=NUM_RESAMPLES, seed=RESAMPLING_SEED)


def _distance(
    spec: MetricSpec, rows_NF: Tensor, truth: FittedNormal
) -> tuple[MetricResult, Tensor]:
    count, width = rows_NF.shape
    distances_R = resampled_frechet(
        rows_NF,
        truth,
        num_resamples=num_frechet_resamples(width),
        seed=RESAMPLING_SEED,
    )
    value = FittedNormal.of(rows_NF).frechet_distance(truth)
    sizes = [size for size in (count // 8, count // 4, count // 2, count) if size >= 2]
    by_size = frechet_by_size(
        rows_NF, truth, sorted(set(sizes)), max_sets=_MAX_SETS, seed=RESAMPLING_SEED
    )
    result = _result(spec, distance_estimate(value, distances_R), count)
    return MetricResult(**{**vars(result), "by_size": by_size}), distances_R


def _result(spec: MetricSpec, estimate: Estimate, num_samples: int) -> MetricResult:
    return MetricResult(
        value=estimate.value,
        low=estimate.low,
        high=estimate.high,
        num_samples=num_samples,
        backbone=spec.backbone,
        compares=spec.compares,
        higher_is_better=spec.higher_is_better,
    )


def _change(estimate: Estimate) -> Change:
    return Change(**vars(estimate))
