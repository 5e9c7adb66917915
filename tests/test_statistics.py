"""Bootstrap intervals: known standard errors, coverage, pairing, and nothing left to chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from var_compressor.evaluation.scores import FittedNormal, frechet_distance
from var_compressor.evaluation.statistics import (
    SizedFrechet,
    bootstrap_mean,
    bootstrap_ratio,
    centered_estimate,
    correlation,
    distance_estimate,
    frechet_by_size,
    frechet_without_bias,
    paired_difference,
    percentile_estimate,
    resampled_frechet,
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
    distance_R = resampled_frechet(a_NF, FittedNormal.of(b_NF), num_resamples=100, seed=0)
    raw, centered = percentile_estimate(value, distance_R), centered_estimate(value, distance_R)
    assert raw.low > value
    assert centered.low < value < centered.high
    assert width(centered) == pytest.approx(width(raw))
    # and none is negative
    near = distance_estimate(0.01, distance_R)
    assert near.low == 0 and near.high == centered_estimate(0.01, distance_R).high > 0.01


@pytest.mark.parametrize(("top", "bottom"), [(0, 0), (3, 2)])
def test_a_ratio_needs_a_pair_of_numbers_per_image(top, bottom):
    with pytest.raises(ValueError, match=f"{top} numerators for {bottom} denominators"):
        bootstrap_ratio(torch.ones(top), torch.ones(bottom), num_resamples=10, seed=0)


# --- Fréchet distances ----------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "others"), [(300, 200), (300, 9), (9, 200), (9, 8)])
def test_the_distance_is_a_float64_definition_of_another_kind(rows, others):
    """By the eigenvalues of A B, in numpy; also with fewer rows than the 24 features."""
    mix = normal(24, 24, seed=1)
    a_NF, b_NF = normal(rows, 24, seed=2) @ mix, 0.5 + 2 * normal(others, 24, seed=3)
    a, b = a_NF.numpy(), b_NF.numpy()
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    roots = np.sqrt(np.clip(np.linalg.eigvals(cov_a @ cov_b).real, 0, None))
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    wanted = means + np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum()
    assert frechet_distance(a_NF, b_NF) == pytest.approx(wanted, rel=1e-6)


def test_resampled_distances_are_those_of_the_rows_drawn_and_pair_up():
    a_NF, b_NF, truth_NF = normal(40, 5, seed=1), normal(40, 5, seed=2), normal(70, 5, seed=3)
    truth, how = FittedNormal.of(truth_NF), {"num_resamples": 20, "seed": 4}
    a_R, b_R = (resampled_frechet(x_NF, truth, **how) for x_NF in (a_NF, b_NF))
    generator = torch.Generator().manual_seed(4)
    for a, b in zip(a_R, b_R, strict=True):
        picked_N = torch.randint(40, (40,), generator=generator)
        assert float(a) == pytest.approx(frechet_distance(a_NF[picked_N], truth_NF), rel=1e-9)
        assert float(b) == pytest.approx(frechet_distance(b_NF[picked_N], truth_NF), rel=1e-9)


def test_intervals_of_a_distance_difference_cover_the_truth():
    """Two models whose images share their noise; the true distances are known in one dimension
    per feature: squared shifts, and squared differences of spreads."""
    truth = FittedNormal.of(normal(20_000, 4, seed=0))
    shift = torch.tensor([0.8, 0, 0, 0], dtype=torch.float64)
    wanted = 0.8**2 - 4 * 0.3**2
    covered, widths, unpaired = 0, [], []
    for run in range(60):
        shared_NF, own_NF = normal(300, 4, seed=2 * run + 1), normal(300, 4, seed=2 * run + 2)
        a_NF = (0.95 * shared_NF + (1 - 0.95**2) ** 0.5 * own_NF) + shift
        b_NF = 1.3 * shared_NF
        how = {"num_resamples": 60, "seed": run}
        a_R, b_R = (resampled_frechet(x_NF, truth, **how) for x_NF in (a_NF, b_NF))
        value = frechet_of(a_NF, truth) - frechet_of(b_NF, truth)
        found = centered_estimate(value, a_R - b_R)
        covered += found.low <= wanted <= found.high
        widths.append(width(found))
        unpaired.append(math.hypot(float(a_R.std()), float(b_R.std())) * 3.92)
    # 60 runs tell 92 to 95 % to +- 6 points
    assert covered >= 51
    assert np.mean(widths) < np.mean(unpaired)


def frechet_of(x_NF, truth):
    return FittedNormal.of(x_NF).frechet_distance(truth)


def test_the_distance_by_size_falls_and_the_line_through_it_finds_the_limit():
    x_NF, truth = normal(4000, 10, seed=1), FittedNormal.of(normal(50_000, 10, seed=2))
    found = frechet_by_size(x_NF, truth, (250, 500, 1000, 4000), max_sets=8, seed=0)
    assert [(one.num_images, one.num_sets) for one in found] == [
        (250, 8),
        (500, 8),
        (1000, 4),
        (4000, 1),
    ]
    values = [one.value for one in found]
    assert values == sorted(values, reverse=True) and found[-1].spread is None
    assert found[-1].value == pytest.approx(frechet_of(x_NF, truth), rel=1e-9)
    # the true distance is 0
    assert abs(frechet_without_bias(found)) < values[-1] / 2
    line = [SizedFrechet(n, 1, 3 + 100 / n, None) for n in (10, 50, 200)]
    assert frechet_without_bias(line) == pytest.approx(3)
    assert frechet_without_bias(line[:2]) is None
    with pytest.raises(ValueError, match="size 5000: give sizes from 2 to 4000"):
        frechet_by_size(x_NF, truth, (5000,), max_sets=1, seed=0)


# --- correlation ----------------------------------------------------------------------------------


def test_correlations_are_scipys_with_ties():
    stats = pytest.importorskip("scipy.stats")
    x = (normal(25, seed=1) * 3).round().tolist()
    y = (normal(25, seed=2) + torch.tensor(x)).tolist()
    found, known = correlation(x, y), stats.pearsonr(x, y)
    assert found.count == 25
    assert found.pearson.value == pytest.approx(known.statistic, rel=1e-12)
    assert found.spearman.value == pytest.approx(stats.spearmanr(x, y).statistic, rel=1e-12)
    interval = known.confidence_interval(0.95)
    assert (found.pearson.low, found.pearson.high) == pytest.approx(tuple(interval), rel=1e-9)
    assert found.spearman.low < found.spearman.value < found.spearman.high


def test_correlation_intervals_cover_the_truth():
    rho, runs = 0.7, 600
    spearman = 6 / math.pi * math.asin(rho / 2)
    hits = np.zeros(2)
    for run in range(runs):
        x_N, other_N = normal(2, 20, seed=run)
        y_N = rho * x_N + (1 - rho**2) ** 0.5 * other_N
        found = correlation(x_N.tolist(), y_N.tolist())
        hits += [
            found.pearson.low <= rho <= found.pearson.high,
            found.spearman.low <= spearman <= found.spearman.high,
        ]
    assert ((hits / runs > 0.92) & (hits / runs < 0.98)).all(), hits / runs


def test_correlations_at_the_ends_and_where_there_are_none():
    up = [1.0, 2.0, 4.0, 8.0, 16.0]
    found = correlation(up, [-x for x in up])
    assert found.pearson.value == pytest.approx(-1) and found.spearman.low == -1
    assert correlation(up, [x**3 for x in up]).spearman.value == pytest.approx(1)
    with pytest.raises(ValueError, match="five pairs"):
        correlation(up[:4], up[:4])
    with pytest.raises(ValueError, match="all values of one side are equal"):
        correlation(up, [2.0] * 5)
