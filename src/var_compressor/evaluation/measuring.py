"""Metrics of drawn images: a row per image, computed where the image is, and what rows amount to.

Shapes: N images, F numbers of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from var_compressor.artifact import write_atomically
from var_compressor.evaluation.benchmarks import Sample
from var_compressor.evaluation.gallery import Gallery, read_image
from var_compressor.evaluation.metrics import (
    BIT_METRICS,
    METRICS,
    Metric,
    MetricSpec,
    MetricUnavailable,
    open_metric,
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
    crew: Crew,
    on_progress: Progress,
) -> list[Sides]:
    """Rows of one metric for several benchmarks, in the order of their samples; all get them."""
    metric = open_metric(name, weights_dir=weights_dir, device=crew.device)
    found = []
    for one in drawn:
        owners = owners_of(one, crew)
        stage = f"{name}, {one.prompts.name}"
        sides = {"": _rows(metric, one, "", owners, crew, on_progress, stage)}
        if one.reference is not None and metric.spec.compares != "reference":
            sides[REFERENCE] = _rows(metric, one, REFERENCE, owners, crew, on_progress, stage)
        if metric.spec.compares == "truth":
            sides[TRUTH] = _truth_rows(metric, one.prompts.samples, crew, on_progress, stage)
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


def _rows(
    metric: Metric,
    drawn: Drawn,
    side: str,
    owners: Sequence[int],
    crew: Crew,
    on_progress: Progress,
    stage: str,
) -> Tensor:
    gallery = drawn.gallery if side == "" else drawn.reference
    assert gallery is not None
    with_reference = metric.spec.compares == "reference" and drawn.reference is not None
    mine = [number for number, owner in enumerate(owners) if owner == crew.rank]
    rows = {}
    for done, number in enumerate(mine):
        sample = drawn.prompts.samples[number]
        image_3YX, _ = read_image(gallery.path(drawn.prompts.name, sample))
        reference_B3YX = None
        if with_reference and drawn.reference is not None:
            path = drawn.reference.path(drawn.prompts.name, sample)
            reference_B3YX = read_image(path)[0][None]
        rows[number] = metric.rows(
            image_3YX[None], prompts=[sample.prompt], reference_B3YX=reference_B3YX
        )[0]
        on_progress(f"{stage}{' of full precision' if side else ''}", done + 1, len(mine))
    whole = crew.whole(rows, len(owners))
    assert whole is not None
    return whole


def _truth_rows(
    metric: Metric, samples: Sequence[Sample], crew: Crew, on_progress: Progress, stage: str
) -> Tensor:
    truths = [one.truth for one in samples if one.truth is not None]
    rows = {}
    for number in crew.team.mine(len(truths)):
        rows[number] = metric.rows(truths[number].load()[None], prompts=[])[0]
        on_progress(f"{stage} of real images", number + 1, len(truths))
    whole = crew.whole(rows, len(truths))
    assert whole is not None
    return whole


def median_seconds(drawn: Drawn, crew: Crew) -> float:
    """Of drawing one of the model's images."""
    seconds = {}
    for sample, owner in zip(drawn.prompts.samples, owners_of(drawn, crew), strict=True):
        if owner == crew.rank:
            _, carried = read_image(drawn.gallery.path(drawn.prompts.name, sample))
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
