"""Bootstrap intervals: how far a mean over images would move with other images.

Shapes: N images, C columns of numbers per image, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CONFIDENCE = 0.95
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
