"""Intervals: how far a number would move with other images.

Means and their differences have percentile bootstrap intervals, Fréchet distances the centered
ones of `centered_estimate`, correlations those of Fisher's transformation. A seed fixes them all.

Shapes: N images, F features, C columns of numbers per image, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from var_compressor.evaluation.scores import FittedNormal

CONFIDENCE = 0.95
# of what evaluations report
NUM_RESAMPLES, RESAMPLING_SEED = 10_000, 0
# resamples drawn at once: bounds memory at 256 counts per image
_CHUNK = 256


@dataclass(frozen=True)
class Estimate:
    """A measured value and the ends of its 95 % interval, in the value's own unit."""

    value: float
    low: float
    high: float


def bootstrap_mean(values_N: Tensor, *, num_resamples: int, seed: int) -> Estimate:
    """Mean over images."""
    ones_N = torch.ones_like(values_N)
    return bootstrap_ratio(values_N, ones_N, num_resamples=num_resamples, seed=seed)


def bootstrap_ratio(
    numerators_N: Tensor, denominators_N: Tensor, *, num_resamples: int, seed: int
) -> Estimate:
    """Sum over sum, such as objects right over objects in all images.

    Raises: ValueError without images, or when the two differ in length.
    """
    if numerators_N.shape != denominators_N.shape or not len(numerators_N):
        raise ValueError(
            f"{len(numerators_N)} numerators for {len(denominators_N)} denominators; give one of "
            "each per image, and at least one image"
        )
    columns_NC = torch.stack([numerators_N, denominators_N], dim=1).double()
    sums_RC = resampled_sums(columns_NC, num_resamples=num_resamples, seed=seed)
    top, bottom = columns_NC.sum(0)
    return percentile_estimate(float(top / bottom), sums_RC[:, 0] / sums_RC[:, 1])


def paired_difference(
    found_N: Tensor,
    reference_N: Tensor,
    denominators_N: Tensor,
    *,
    num_resamples: int,
    seed: int,
) -> Estimate:
    """Of two ratios over the same images: a resample draws an image with both of its results."""
    difference_N = found_N.double() - reference_N.double()
    return bootstrap_ratio(difference_N, denominators_N, num_resamples=num_resamples, seed=seed)


def resampled_sums(columns_NC: Tensor, *, num_resamples: int, seed: int) -> Tensor:
    """Sums of every column over N rows drawn with replacement, float64 ``[R, C]``."""
    count = len(columns_NC)
    generator = torch.Generator().manual_seed(seed)
    sums = []
    for start in range(0, num_resamples, _CHUNK):
        rows = min(_CHUNK, num_resamples - start)
        picked_RN = torch.randint(count, (rows, count), generator=generator)
        times_RN = torch.zeros(rows, count, dtype=torch.float64)
        times_RN.scatter_add_(1, picked_RN, torch.ones(rows, count, dtype=torch.float64))
        sums.append(times_RN @ columns_NC.double())
    return torch.cat(sums)


def resampled_statistic(
    statistic: Callable[[Tensor], float], features_NF: Tensor, *, num_resamples: int, seed: int
) -> Tensor:
    """``statistic`` of N rows drawn with replacement, float64 ``[R]``.

    Calls with the same seed and number of rows draw the same rows, so that results pair up.
    """
    count = len(features_NF)
    generator = torch.Generator().manual_seed(seed)
    picks = (torch.randint(count, (count,), generator=generator) for _ in range(num_resamples))
    return torch.tensor([statistic(features_NF[pick_N]) for pick_N in picks], dtype=torch.float64)


def percentile_estimate(value: float, resamples_R: Tensor) -> Estimate:
    """The interval that holds the middle 95 % of the resamples."""
    tail = (1 - CONFIDENCE) / 2
    low, high = (float(resamples_R.quantile(share)) for share in (tail, 1 - tail))
    return Estimate(value, low, high)


def centered_estimate(value: float, resamples_R: Tensor) -> Estimate:
    """The spread of the resamples around their mean, moved to the value.

    For statistics that resampling itself raises, such as distances between distributions: a drawn
    set holds fewer different images, and its percentiles may not even include the value.
    """
    return percentile_estimate(value, resamples_R - resamples_R.mean() + value)


def distance_estimate(value: float, resamples_R: Tensor) -> Estimate:
    """`centered_estimate` of a distance, which is never below 0."""
    found = centered_estimate(value, resamples_R)
    return Estimate(value, max(found.low, 0.0), found.high)


# --- Fréchet distances ----------------------------------------------------------------------------


def num_frechet_resamples(width: int) -> int:
    """Of so many features: 200, or 32 where a distance takes seconds."""
    return 200 if width <= 512 else 32


def resampled_frechet(
    features_NF: Tensor, reference: FittedNormal, *, num_resamples: int, seed: int
) -> Tensor:
    """Distances to the reference of N images drawn with replacement, float64 ``[R]``.

    Two models' distances pair up when images of one prompt have the same row in both.
    """
    return resampled_statistic(
        lambda part_NF: FittedNormal.of(part_NF).frechet_distance(reference),
        features_NF,
        num_resamples=num_resamples,
        seed=seed,
    )


@dataclass(frozen=True)
class SizedFrechet:
    """The distance of ``num_images`` images: the mean of ``num_sets`` sets that share no image.

    ``spread`` is their standard deviation; None for a single set.
    """

    num_images: int
    num_sets: int
    value: float
    spread: float | None


def frechet_by_size(
    features_NF: Tensor, reference: FittedNormal, sizes: Sequence[int], *, max_sets: int, seed: int
) -> list[SizedFrechet]:
    """The distance at several sample sizes, which it falls with: a number needs its size beside it.

    Images are shuffled by ``seed``; all sizes divide the same order.
    Raises: ValueError for a size below 2 or above N.
    """
    count = len(features_NF)
    order_N = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    found = []
    for size in sizes:
        if not 2 <= size <= count:
            raise ValueError(f"size {size}: give sizes from 2 to {count}, the number of images")
        sets = features_NF[order_N].split(size)[: min(max_sets, count // size)]
        values = torch.tensor(
            [FittedNormal.of(part_NF).frechet_distance(reference) for part_NF in sets],
            dtype=torch.float64,
        )
        spread = float(values.std()) if len(values) > 1 else None
        found.append(SizedFrechet(size, len(values), float(values.mean()), spread))
    return found


def frechet_without_bias(found: Sequence[SizedFrechet]) -> float | None:
    """The distance of infinitely many images, by a line through the values over 1 / N; None when
    there are not three sizes.

    Source: M. J. Chong and D. Forsyth, "Effectively Unbiased FID and Inception Score and where to
    find them", arXiv:1911.07023.
    """
    if len({one.num_images for one in found}) < 3:
        return None
    x = torch.tensor([1 / one.num_images for one in found], dtype=torch.float64)
    y = torch.tensor([one.value for one in found], dtype=torch.float64)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return float(y.mean() - slope * x.mean())


# --- correlation ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Correlation:
    """Of two numbers over ``count`` things, with intervals; both from -1 to 1."""

    count: int
    pearson: Estimate
    spearman: Estimate


def correlation(x: Sequence[float], y: Sequence[float]) -> Correlation:
    """Pearson's, of the values, and Spearman's, of their ranks, where ties share a mean rank.

    Raises: ValueError for fewer than five pairs, or when all values of one side are equal.
    Source: intervals by Fisher's transformation; of ranks with the variance of D. G. Bonett and
    T. A. Wright, "Sample size requirements for estimating Pearson, Kendall and Spearman
    correlations", Psychometrika 65, 2000.
    """
    if len(x) != len(y) or len(x) < 5:
        raise ValueError(f"{len(x)} and {len(y)} values; a correlation needs five pairs or more")
    if len(set(x)) == 1 or len(set(y)) == 1:
        raise ValueError("all values of one side are equal: nothing correlates with them")
    values = [torch.tensor(one, dtype=torch.float64) for one in (x, y)]
    pearson, spearman = _pearson(*values), _pearson(*map(_ranks, values))
    return Correlation(
        len(x),
        _fisher_estimate(pearson, 1 / (len(x) - 3)),
        _fisher_estimate(spearman, (1 + spearman**2 / 2) / (len(x) - 3)),
    )


def _pearson(x: Tensor, y: Tensor) -> float:
    x, y = x - x.mean(), y - y.mean()
    return max(-1.0, min(1.0, float(x @ y / (x.norm() * y.norm()))))


def _ranks(x: Tensor) -> Tensor:
    below = (x[None] < x[:, None]).sum(1)
    equal = (x[None] == x[:, None]).sum(1)
    return (below + (equal + 1) / 2).double()


def _fisher_estimate(found: float, variance: float) -> Estimate:
    if abs(found) == 1:
        return Estimate(found, found, found)
    margin = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * variance**0.5
    center = math.atanh(found)
    return Estimate(found, math.tanh(center - margin), math.tanh(center + margin))
