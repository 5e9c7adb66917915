"""KV ranges. Shapes: H heads, T tokens, D head channels."""

import pytest
import torch

from quant_golden import joined, load_golden
from var_compressor.ops.primitives import choose_affine, dequantize_affine, quantize_affine
from var_compressor.quant.kv import (
    calibrate_channels,
    calibrate_shared_percentile,
    largest_magnitudes,
)

CASES = ["kvcalib_k_b", "kvcalib_v_a"]


def record(golden):
    """Images joined along the tokens, then the two rows of the batch."""
    cache_BHTD = joined(golden, "cache", dim=2)
    return torch.cat(tuple(cache_BHTD), dim=1)


def mse64(x_HTD, scale_HD, zero_point_HD, *, nbits=8):
    scale_H1D, zero_H1D = scale_HD.double()[:, None], zero_point_HD.double()[:, None]
    lowest = -(2 ** (nbits - 1))
    codes = (x_HTD.double() / scale_H1D + zero_H1D).round().clamp(lowest, -lowest - 1)
    return ((codes - zero_H1D) * scale_H1D - x_HTD.double()).square().mean(1)


def min_max_mse(x_HTD, *, nbits=8):
    scale_HD, zero_HD = choose_affine(x_HTD.amin(1), x_HTD.amax(1), nbits=nbits)
    return mse64(x_HTD, scale_HD, zero_HD, nbits=nbits)


@pytest.mark.parametrize("name", CASES)
def test_shared_percentile_equals_the_original(name):
    golden = load_golden(name)
    found = calibrate_shared_percentile(record(golden))
    assert found.percentile == pytest.approx(golden["p"].item(), abs=1e-12)
    assert torch.equal(found.zero_point_HD, golden["zero_point"])
    torch.testing.assert_close(found.scale_HD, golden["scale"], rtol=1e-6, atol=0)
    torch.testing.assert_close(found.mse_HD, golden["mse_per_channel"], rtol=1e-5, atol=0)
    assert found.mse_HD.median().item() == pytest.approx(golden["score"].item(), rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_own_bounds_beat_the_shared_percentile(name):
    golden = load_golden(name)
    x_HTD = record(golden)
    shared, own = calibrate_shared_percentile(x_HTD), calibrate_channels(x_HTD, nbits=8)
    shared_HD = mse64(x_HTD, shared.scale_HD, shared.zero_point_HD)
    own_HD = mse64(x_HTD, own.scale_HD, own.zero_point_HD)
    assert own_HD.mean() < 0.8 * shared_HD.mean()
    assert own_HD.median() < shared_HD.median()
    # a shared percentile may hit a lucky bound in one channel, by a few percent
    assert (own_HD / shared_HD).max() < 1.05


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("nbits", [4, 8])
def test_no_channel_is_worse_than_min_max(name, nbits):
    x_HTD = record(load_golden(name))
    found = calibrate_channels(x_HTD, nbits=nbits)
    own_HD = mse64(x_HTD, found.scale_HD, found.zero_point_HD, nbits=nbits)
    assert (own_HD <= min_max_mse(x_HTD, nbits=nbits) * (1 + 1e-4)).all()
    torch.testing.assert_close(found.mse_HD.double(), own_HD, rtol=1e-3, atol=0)


def attention_error(x_HTD, scale_HD, zero_HD, *, of_keys, nbits):
    """Mean squared error of attention's output where x are its keys, or its values; float64."""
    rng = torch.Generator().manual_seed(7)
    H, T, D = x_HTD.shape
    scale_H1D, zero_H1D = scale_HD.double()[:, None], zero_HD.double()[:, None]
    lowest = -(2 ** (nbits - 1))
    codes = (x_HTD.double() / scale_H1D + zero_H1D).round().clamp(lowest, -lowest - 1)
    restored = (codes - zero_H1D) * scale_H1D
    q_HND, other_HTD = (torch.randn(H, n, D, generator=rng, dtype=torch.float64) for n in (200, T))
    q_HND = 10 * torch.nn.functional.normalize(q_HND, dim=-1)

    def attend(stored):
        k, v = (stored, other_HTD) if of_keys else (other_HTD / D**0.5, stored)
        return (q_HND @ k.mT).softmax(-1) @ v

    return (attend(restored) - attend(x_HTD.double())).square().mean()


@pytest.mark.parametrize("name", CASES)
def test_attention_loses_less_than_with_the_originals_parameters(name):
    golden = load_golden(name)
    x_HTD, of_keys = record(golden), "_k_" in name
    theirs = (golden["scale"], golden["zero_point"])
    own = calibrate_channels(x_HTD, nbits=8)
    errors = [
        attention_error(x_HTD, *params, of_keys=of_keys, nbits=8)
        for params in ((own.scale_HD, own.zero_point_HD), theirs)
    ]
    assert errors[0] < 0.9 * errors[1]


def test_weights_are_repeated_tokens():
    """A token that counts threefold is three tokens; equal weights change nothing."""
    x_HTD = record(load_golden("kvcalib_v_a"))[:2, :300, :5]
    counts_HT = torch.randint(1, 4, (2, 300), generator=torch.Generator().manual_seed(0))
    weighted = calibrate_channels(x_HTD, nbits=4, weight_HT=2.5 * counts_HT.float())
    equal = calibrate_channels(x_HTD, nbits=4, weight_HT=torch.full((2, 300), 0.3))
    plain = calibrate_channels(x_HTD, nbits=4)
    torch.testing.assert_close(equal.mse_HD, plain.mse_HD, rtol=1e-3, atol=0)
    for h in range(2):
        repeated_TD = x_HTD[h].repeat_interleave(counts_HT[h], dim=0)[None]
        wanted_D = mse64(
            repeated_TD, weighted.scale_HD[h, None], weighted.zero_point_HD[h, None], nbits=4
        )[0]
        torch.testing.assert_close(weighted.mse_HD[h].double(), wanted_D, rtol=1e-3, atol=0)
        unaware_D = mse64(
            repeated_TD, plain.scale_HD[h, None], plain.zero_point_HD[h, None], nbits=4
        )[0]
        ratio_D = wanted_D / unaware_D
        assert ratio_D.max() <= 1.01 and ratio_D.min() < 0.97


def test_magnitudes_reach_the_highest_code():
    x_HTD = record(load_golden("kvcalib_v_a"))
    found = largest_magnitudes(x_HTD, highest_code=448)
    assert (found.zero_point_HD == 0).all()
    highest = (x_HTD / found.scale_HD[:, None]).abs().amax(1)
    torch.testing.assert_close(highest, torch.full_like(highest, 448.0))


def test_bounds_are_near_the_best_of_a_dense_search():
    """Every pair out of 50 x 50 bounds, on symmetric heavy tails and on skewed ones."""
    rng = torch.Generator().manual_seed(0)
    x_HTD = torch.randn(2, 2000, 4, generator=rng) ** 3
    x_HTD[1] = x_HTD[1].exp().clamp_max(50.0)
    best_HD = torch.full((2, 4), torch.inf, dtype=torch.float64)
    for low_share in torch.linspace(0.02, 1, 50):
        for high_share in torch.linspace(0.02, 1, 50):
            scale_HD, zero_HD = choose_affine(
                x_HTD.amin(1) * low_share, x_HTD.amax(1) * high_share, nbits=4
            )
            best_HD = torch.minimum(best_HD, mse64(x_HTD, scale_HD, zero_HD, nbits=4))
    found = calibrate_channels(x_HTD, nbits=4)
    found_HD = mse64(x_HTD, found.scale_HD, found.zero_point_HD, nbits=4)
    assert (found_HD <= 1.01 * best_HD).all()
    # the symmetric head must have been clipped for that; the skewed one is best left whole
    assert (found_HD[0] < 0.95 * min_max_mse(x_HTD, nbits=4)[0]).all()


def test_tails_are_clipped_apart():
    # a few outliers above, none below: four bits should give up the upper end only
    x_HTD = torch.rand(1, 50_000, 4, generator=torch.Generator().manual_seed(0))
    x_HTD[0, :10] = 1.5
    found = calibrate_channels(x_HTD, nbits=4)
    lowest_HD = (-8 - found.zero_point_HD) * found.scale_HD
    highest_HD = (7 - found.zero_point_HD) * found.scale_HD
    assert (lowest_HD.abs() < 0.1).all()
    assert (highest_HD < 1.1).all()


def test_channels_are_searched_independently(monkeypatch):
    x_HTD = record(load_golden("kvcalib_v_a"))
    whole = calibrate_channels(x_HTD, nbits=8)
    monkeypatch.setattr("var_compressor.quant.kv._CHUNK_ELEMENTS", x_HTD.shape[1] * 7)
    chunked = calibrate_channels(x_HTD, nbits=8)
    assert torch.equal(chunked.scale_HD, whole.scale_HD)
    assert torch.equal(chunked.zero_point_HD, whole.zero_point_HD)
    alone = calibrate_channels(x_HTD[2:3, :, 5:6], nbits=8)
    torch.testing.assert_close(alone.mse_HD[0, 0], whole.mse_HD[2, 5], rtol=1e-3, atol=0)


@pytest.mark.parametrize("num_tokens", [1, 2, 3])
def test_constant_channels_and_tiny_records(num_tokens):
    x_HTD = torch.tensor([0.0, 5.0, -0.3]).expand(2, num_tokens, 3)
    found = calibrate_channels(x_HTD, nbits=8)
    scale_H1D, zero_H1D = found.scale_HD[:, None], found.zero_point_HD[:, None]
    codes = quantize_affine(x_HTD, scale_H1D, zero_H1D, nbits=8)
    restored = dequantize_affine(codes, scale_H1D, zero_H1D)
    torch.testing.assert_close(restored, x_HTD, rtol=1e-5, atol=1e-12)


def test_misuse_is_named():
    with pytest.raises(ValueError, match="empty"):
        calibrate_channels(torch.zeros(2, 0, 4), nbits=8)
    with pytest.raises(ValueError, match="NaN"):
        calibrate_channels(torch.full((1, 3, 2), torch.nan), nbits=8)
