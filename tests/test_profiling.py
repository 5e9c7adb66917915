"""Streaming statistics against numpy, scipy and the original; a whole profile against the model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from quant_golden import load_golden
from var_compressor.profiling.moments import MEDIAN_ERROR, Magnitudes, Moments, merged
from var_compressor.profiling.rounding import robust_variation, rounding_snr, weight_report
from var_compressor.profiling.tensor_stats import PartStats

# relative; of moments, as the profile promises
EXACT = 1e-6


def normal(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SAMPLES = {
    "normal": lambda: normal((1037, 24)),
    "heavy tails": lambda: normal((1037, 24)) * normal((1037, 24), seed=1).exp() ** 2,
    "lopsided": lambda: normal((1037, 24)).exp(),
    "huge offset": lambda: 3e6 + 50 * normal((1037, 24)),
    "tiny variance": lambda: 1 + 1e-5 * normal((1037, 24)),
    "tiny values": lambda: 1e-30 * normal((1037, 24)).exp(),
    "unlike channels": lambda: normal((1037, 24)) * torch.logspace(-6, 6, 24) + torch.arange(24),
    "one channel": lambda: normal((331, 1)),
    "two tokens": lambda: normal((2, 24)),
}
SPLITS = {"whole": [1037], "odd parts": [1, 2, 500, 534], "tokens": [1] * 137 + [900]}


def in_parts(x_TK: Tensor, sizes: list[int]) -> PartStats:
    """As a profile gathers it: tokens in parts, parts in two groups that are merged."""
    sizes = sizes if sum(sizes) == len(x_TK) else [1, len(x_TK) - 1]
    parts = list(x_TK.split(sizes))
    halves = [parts[: len(parts) // 2], parts[len(parts) // 2 :]]
    groups = []
    for half in halves:
        if half:
            group = PartStats()
            for part in half:
                group.add(part)
            groups.append(group)
    return PartStats.merged(groups)


def expected_stats(x_TK: Tensor) -> dict[str, float | None]:
    """By scipy and numpy in float64; None for what is undefined."""
    x = x_TK.double().numpy()
    ranges_K, ranges_T = np.ptp(x, axis=0), np.ptp(x, axis=1)
    varying = x[:, ranges_K > 0]
    skew = np.abs(stats.skew(varying, axis=0)) if varying.size else np.array([math.nan])
    step = ranges_K / (255 + 1e-6)
    zero_point = np.where(step > 1e-9, -128 - x.min(0) / np.where(step > 0, step, 1), 0)
    numbers = {
        "kurtosis": stats.kurtosis(x, axis=None) if np.ptp(x) else math.nan,
        "max": np.abs(x).max(),
        "mean": x.mean(),
        "std": x.std(),
        "cv_channel": ranges_K.std(ddof=1) / (ranges_K.mean() + 1e-6)
        if len(ranges_K) > 1
        else math.nan,
        "cv_token": ranges_T.std(ddof=1) / (ranges_T.mean() + 1e-6),
        "skewness": skew.mean(),
        "max_skew": skew.max(),
        "ideal_zero_point": np.abs(zero_point).mean(),
        "global_min": x.min(),
        "global_max": x.max(),
    }
    return {key: float(value) if math.isfinite(value) else None for key, value in numbers.items()}


def assert_agrees(found: dict, x_TK: Tensor) -> None:
    for key, value in expected_stats(x_TK).items():
        # a symmetric channel's third moment is next to 0: its error is told in deviations
        abs_error = 1e-9 if "skew" in key else 0
        is_same = found[key] is None if value is None else None
        if is_same is None:
            is_same = found[key] == pytest.approx(value, rel=EXACT, abs=abs_error)
        assert is_same, (key, found[key], value)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("sample", SAMPLES)
def test_statistics_agree_with_scipy(sample, split):
    x_TK = SAMPLES[sample]().float()
    found = in_parts(x_TK, SPLITS[split]).summary()
    assert_agrees(found, x_TK)
    magnitudes = x_TK.abs().double().numpy()
    bound = MEDIAN_ERROR[torch.float32]
    assert found["median"] == pytest.approx(np.median(magnitudes), rel=bound)
    assert found["p999"] == pytest.approx(np.quantile(magnitudes, 0.999), rel=bound)
    ratio = magnitudes.max() / (np.median(magnitudes) + 1e-6)
    assert found["max_median_ratio"] == pytest.approx(ratio, rel=1.01 * bound)
    assert (found["num_tokens"], found["num_channels"]) == tuple(x_TK.shape)
    assert found["dominance"] == (
        "Channel" if (found["cv_channel"] or 0) > found["cv_token"] else "Token"
    )


@pytest.mark.parametrize("sample", SAMPLES)
def test_of_bfloat16_medians_are_exact(sample):
    x_TK = SAMPLES[sample]().bfloat16()
    found = in_parts(x_TK, SPLITS["odd parts"]).summary()
    magnitudes = x_TK.abs().double().numpy()
    assert found["median"] == np.median(magnitudes)
    assert found["p999"] == pytest.approx(np.quantile(magnitudes, 0.999), rel=1e-12)
    assert_agrees(found, x_TK)


def test_constant_channels_are_counted_and_left_out():
    x_TK = normal((200, 6)).float()
    x_TK[:, 1], x_TK[:, 4] = 0.1, 0.0
    found = in_parts(x_TK, [7, 193])
    summary = found.summary()
    assert summary["num_constant_channels"] == 2
    assert_agrees(summary, x_TK)
    assert found.channel_profile()["skewness"].isnan().tolist() == [False, True, False] * 2


def test_nothing_but_one_value():
    found = in_parts(torch.full((5, 4), 2.0), [2, 3]).summary()
    assert found["kurtosis"] is None and found["skewness"] is None and found["max_skew"] is None
    assert found["max"] == 2 and found["std"] == 0 and found["cv_token"] == 0
    assert found["median"] == pytest.approx(2, rel=MEDIAN_ERROR[torch.float32])
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers_are_told_of(broken):
    x_TK = normal((50, 4)).float()
    x_TK[3, 2] = broken
    found = in_parts(x_TK, [10, 40]).summary()
    assert not found["is_finite"]
    assert found["max"] is None and found["kurtosis"] is None and found["max_median_ratio"] is None
    json.dumps(found, allow_nan=False)


def test_moments_of_a_million_values_far_from_zero():
    x = (1e4 + normal((1_000_000, 1), seed=3)).float()
    parts = merged([Moments.of(part) for part in x.split(999)])
    x = x.double().numpy()
    assert parts.std.item() == pytest.approx(x.std(), rel=1e-10)
    assert parts.kurtosis.item() == pytest.approx(stats.kurtosis(x).item(), rel=EXACT)
    # where it is next to nothing, in standard deviations
    assert parts.skewness.item() == pytest.approx(stats.skew(x).item(), abs=1e-9)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 4096, 4097])
def test_quantiles_of_few_and_even_counts(count):
    x = normal((count,), seed=count).bfloat16()
    magnitudes = Magnitudes(x.dtype, x.device)
    magnitudes.add(x)
    shares = (0.0, 0.25, 0.5, 0.999, 1.0)
    wanted = np.quantile(x.abs().double().numpy(), shares)
    np.testing.assert_allclose(magnitudes.quantiles(shares), wanted, rtol=1e-12)


def test_the_original_finds_the_same():
    tensors = load_golden("diag_a")
    recorded = json.loads((Path(__file__).parent / "golden/quant/diag_a.json").read_text())
    cache_RHLD = tensors["cache"]
    of_original = {
        "blk.ffn_down": tensors["linear_input"].flatten(0, 1),
        "blk.attn_k": cache_RHLD.transpose(1, 2).flatten(2).flatten(0, 1),
    }
    for name, x_TK in of_original.items():
        found = in_parts(x_TK, [13, len(x_TK) - 13]).summary()
        (wanted,) = recorded["result"][name]
        for key, value in wanted.items():
            # it computes in float32, and has medians of values instead of bins
            rel = 2e-3 if key == "max_median_ratio" else 2e-5
            if isinstance(value, str):
                assert found[key] == value, (name, key)
            else:
                assert found[key] == pytest.approx(value, rel=rel), (name, key)


# --- rounding -------------------------------------------------------------------------------------


def test_rounding_noise_of_known_distributions():
    """A step of d leaves noise of d^2 / 12: exactly what uniform values must show."""
    x_TK = torch.rand(4000, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ones_T = torch.ones(4000, dtype=torch.float64)
    found = rounding_snr(x_TK, ones_T, x_TK.amin(0), x_TK.amax(0))
    signal = 1 / 3
    for nbits in (4, 8):
        symmetric = 10 * math.log10(signal / ((2 / (2**nbits - 2)) ** 2 / 12))
        asymmetric = 10 * math.log10(signal / ((2 / (2**nbits - 1)) ** 2 / 12))
        by_way = found[f"int{nbits}"]["channel"]
        assert by_way["symmetric"] == pytest.approx(symmetric, abs=0.05)
        assert by_way["asymmetric"] == pytest.approx(asymmetric, abs=0.05)
    # a positive tensor wastes a bit without a zero point
    found = rounding_snr(x_TK + 1, ones_T, (x_TK + 1).amin(0), (x_TK + 1).amax(0))
    gain = found["int8"]["channel"]["asymmetric"] - found["int8"]["channel"]["symmetric"]
    assert gain == pytest.approx(20 * math.log10(255 / 127), abs=0.1)


def test_rounding_ranges_are_those_of_the_granularity():
    """Each way of sharing a range is exact where only that way separates large from small."""
    spread = torch.logspace(-3, 3, 100)
    ones_T = torch.ones(100, dtype=torch.float64)
    signs_TK = torch.ones(100, 128)
    signs_TK[::2, ::2] = -1
    by_token, by_channel = signs_TK * spread[:, None], signs_TK * torch.logspace(-3, 3, 128)

    def snr(x_TK: Tensor, way: str) -> float:
        return rounding_snr(x_TK, ones_T, x_TK.amin(0), x_TK.amax(0))["int8"][way]["symmetric"]

    assert snr(by_token, "token") > 120 and snr(by_token, "group") > 120
    assert snr(by_channel, "channel") > 120
    assert snr(by_channel, "token") < 60 and snr(by_token, "channel") < 60
    blocks = signs_TK.clone()
    blocks[:, 64:] *= 1e3
    assert snr(blocks, "group") > 120 > snr(blocks, "token")


def test_sampled_tokens_count_as_what_they_stand_for():
    x_TK = normal((64, 128), seed=5).float() * torch.linspace(0.1, 3, 64)[:, None]
    weight_T = torch.randint(1, 9, (64,), generator=torch.Generator().manual_seed(1))
    repeated = x_TK.repeat_interleave(weight_T, dim=0)
    ones = torch.ones(len(repeated), dtype=torch.float64)
    bounds = (x_TK.amin(0), x_TK.amax(0))
    weighted, whole = (
        rounding_snr(x_TK, weight_T.double(), *bounds),
        rounding_snr(repeated, ones, *bounds),
    )
    for nbits in ("int4", "int8"):
        for way, kinds in whole[nbits].items():
            assert weighted[nbits][way] == pytest.approx(kinds, abs=1e-3)
    variation = robust_variation(x_TK, weight_T.double())
    assert variation["cv_token_p98"] == pytest.approx(
        robust_variation(repeated, ones)["cv_token_p98"], rel=1e-6
    )


def test_robust_variation_does_not_see_a_single_outlier():
    x_TK = normal((2000, 200), seed=6).float()
    ones = torch.ones(2000, dtype=torch.float64)
    plain = robust_variation(x_TK, ones)
    x_TK[17, 3] = 1e6
    spoiled = robust_variation(x_TK, ones)
    assert spoiled["cv_channel_p98"] == pytest.approx(plain["cv_channel_p98"], rel=0.05)
    assert in_parts(x_TK, [2000]).summary()["cv_channel"] > 5


def test_energy_in_rank_is_that_of_the_svd():
    weight_NK = normal((96, 80), seed=7).float() * torch.linspace(0.1, 5, 80)
    smooth_K = 1 / torch.linspace(0.1, 5, 80)
    found = weight_report(weight_NK, smooth_K, 32, seed=0)
    for name, matrix in (("plain", weight_NK), ("smoothed", weight_NK * smooth_K)):
        squares = torch.linalg.svdvals(matrix.double()).square()
        share = float(squares[:32].sum() / squares.sum())
        assert found["energy_in_rank"][name] == pytest.approx(share, rel=1e-4)
    assert found["kurtosis"] == pytest.approx(stats.kurtosis(weight_NK, axis=None), rel=EXACT)
    ones_N = torch.ones(96, dtype=torch.float64)
    by_row = rounding_snr(weight_NK, ones_N, weight_NK.amin(0), weight_NK.amax(0))["int4"]["token"]
    assert found["snr_db"]["int4"]["channel"] == by_row
