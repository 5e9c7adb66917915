"""Bootstrap intervals: known standard errors, coverage, pairing, and nothing left to chance."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from var_compressor.evaluation.scores import frechet_distance
from var_compressor.evaluation.statistics import (
    bootstrap_mean,
    bootstrap_ratio,
    centered_estimate,
    paired_difference,
    percentile_estimate,
    resampled_statistic,
    resampled_sums,
)


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def width(estimate):
    return estimate.high - estimate.low


def test_the_interval_of_a_mean_is_the_textbooks():
    x_N = 5 + 3 * normal(400, seed=0)
    found = bootstrap_mean(x_N, num_resamples=10_000, seed=1)
    margin = 1.96 * float(x_N.std(correction=0)) / 400**0.5
    assert found.value == pytest.approx(float(x_N.mean()))
    assert found.low == pytest.approx(found.value - margin, abs=0.05 * margin)
    assert found.high == pytest.approx(found.value + margin, abs=0.05 * margin)


def test_95_of_100_intervals_cover_the_truth():
    runs = [
        bootstrap_mean(normal(80, seed=i), num_resamples=500, seed=1000 + i) for i in range(600)
    ]
    covered = sum(run.low <= 0 <= run.high for run in runs) / len(runs)
    # 80 values: the percentile bootstrap covers about 94 %, 600 runs tell that to +- 1.9 points
    assert 0.915 <= covered <= 0.97


def test_a_ratio_is_of_sums_with_the_error_of_the_delta_method():
    objects_N = 1 + torch.arange(600) % 3
    right_N = (normal(600, 3, seed=2) < 1).cumsum(1).gather(1, objects_N[:, None] - 1)[:, 0]
    found = bootstrap_ratio(right_N, objects_N, num_resamples=10_000, seed=0)
    share = float(right_N.sum() / objects_N.sum())
    residual_N = (right_N - share * objects_N) / objects_N.double().mean()
    margin = 1.96 * float(residual_N.std(correction=0)) / 600**0.5
    assert found.value == pytest.approx(share)
    assert found.high - found.value == pytest.approx(margin, rel=0.08)
    assert found.value - found.low == pytest.approx(margin, rel=0.08)


def test_pairing_removes_what_both_models_share():
    shared_N, a_N, b_N = normal(3, 500, seed=3)
    first_N, second_N = 3 * shared_N + a_N, 3 * shared_N + b_N - 0.5
    how = {"num_resamples": 4000, "seed": 0}
    paired = paired_difference(second_N, first_N, torch.ones(500), **how)
    alone = [width(bootstrap_mean(x_N, **how)) for x_N in (first_N, second_N)]
    assert paired.value == pytest.approx(float((second_N - first_N).mean()))
    assert paired.low < -0.5 < paired.high < 0
    # variances 2 and 2 * (9 + 1)
    unpaired = (alone[0] ** 2 + alone[1] ** 2) ** 0.5
    assert width(paired) / unpaired == pytest.approx((2 / 20) ** 0.5, rel=0.15)


def test_resamples_are_n_rows_each_and_depend_on_the_seed_alone():
    x_NC = torch.stack([torch.ones(7), normal(7, seed=4).float()], dim=1)
    sums_RC = resampled_sums(x_NC, num_resamples=300, seed=5)
    assert sums_RC.shape == (300, 2) and sums_RC.dtype == torch.float64
    assert torch.equal(sums_RC[:, 0], torch.full((300,), 7.0, dtype=torch.float64))
    assert len(sums_RC[:, 1].unique()) > 250
    assert torch.equal(sums_RC, resampled_sums(x_NC, num_resamples=300, seed=5))
    assert not torch.equal(sums_RC, resampled_sums(x_NC, num_resamples=300, seed=6))


def test_statistics_of_two_models_pair_up():
    x_NF = normal(20, 3, seed=7)
    how = {"num_resamples": 50, "seed": 1}
    first_R, second_R = (
        resampled_statistic(lambda part: float(part.sum()), features, **how)
        for features in (x_NF, x_NF + 1)
    )
    assert torch.allclose(second_R - first_R, torch.full((50,), 60.0, dtype=torch.float64))
    assert len(first_R.unique()) == 50


def test_a_distance_is_inside_its_centered_interval_only():
    """Fewer different rows lie further from the reference: the percentiles miss the value."""
    a_NF, b_NF = normal(60, 20, seed=8), normal(60, 20, seed=9)
    value = frechet_distance(a_NF, b_NF)
    distance = partial(frechet_distance, features_b_NF=b_NF)
    distance_R = resampled_statistic(distance, a_NF, num_resamples=100, seed=0)
    raw, centered = percentile_estimate(value, distance_R), centered_estimate(value, distance_R)
    assert raw.low > value
    assert centered.low < value < centered.high
    assert width(centered) == pytest.approx(width(raw))


@pytest.mark.parametrize(("top", "bottom"), [(0, 0), (3, 2)])
def test_a_ratio_needs_a_pair_of_numbers_per_image(top, bottom):
    with pytest.raises(ValueError, match=f"{top} numerators for {bottom} denominators"):
        bootstrap_ratio(torch.ones(top), torch.ones(bottom), num_resamples=10, seed=0)
