"""Weight rounding. Shapes: N output and K input channels, T tokens."""

import warnings
from dataclasses import replace

import pytest
import torch

from quant_golden import load_golden, tokens
from var_compressor.ops.primitives import (
    FORMATS,
    choose_tensor_scale,
    effective_scales,
    round_trip,
    stored_scales,
)
from var_compressor.quant.gptq import RoundingOptions, gptq, hessian, output_errors, rtn
from var_compressor.spec import WEIGHT_FORMATS

OPTIONS = RoundingOptions(FORMATS["sint4"], group_size=64, scale_dtype=torch.float32)
CLIPPING = tuple(1 - i / 40 for i in range(20))


def options_of(format, **changes):
    group_size = 16 if format == "nvfp4" else 64
    return replace(OPTIONS, format=FORMATS[format], group_size=group_size, **changes)


def correlated_case(*, N, K, T, seed=0):
    rng = torch.Generator().manual_seed(seed)
    mixing_KK = torch.randn(K, K, generator=rng) / K**0.5 + 0.5 * torch.eye(K)
    x_TK = torch.randn(T, K, generator=rng) @ mixing_KK
    return torch.randn(N, K, generator=rng), x_TK * torch.exp(torch.randn(K, generator=rng))


def true_error(weight_NK, quantized, x_TK):
    """Squared output error in float64, without the Hessian."""
    difference_NK = quantized.dequantize().double() - weight_NK.double()
    return float((x_TK.double() @ difference_NK.T).square().sum())


def test_gptq_equals_the_original():
    golden = load_golden("gptq_a")
    weight_NK, x_TK = golden["weight"], tokens(golden)
    found = gptq(weight_NK, hessian(x_TK), OPTIONS)
    assert torch.equal(found.scales_NG.flatten(), golden["scale"].flatten())
    # a code on a rounding boundary may move with the order of a float32 sum
    assert (found.codes_NK != golden["codes"]).sum() <= 6
    # and its error with it, hence a thousandth more than the original's
    error = true_error(weight_NK, found, x_TK)
    assert error <= 12.1125 * 1.001
    nearest = rtn(weight_NK, None, OPTIONS)
    assert true_error(weight_NK, nearest, x_TK) == pytest.approx(38.34732, rel=1e-4)
    assert error < 38.34732


@pytest.mark.parametrize("format", WEIGHT_FORMATS)
@pytest.mark.parametrize("clip_ratios", [(1.0,), CLIPPING])
@pytest.mark.parametrize("act_order", [False, True])
def test_an_identity_hessian_gives_rtn(format, clip_ratios, act_order):
    weight_NK = torch.randn(7, 192, generator=torch.Generator().manual_seed(0))
    options = options_of(format, clip_ratios=clip_ratios, act_order=act_order)
    compensated = gptq(weight_NK, torch.eye(192), options)
    nearest = rtn(weight_NK, torch.ones(192), options)
    assert torch.equal(compensated.codes_NK.float(), nearest.codes_NK.float())
    assert torch.equal(compensated.scales_NG, nearest.scales_NG)


@pytest.mark.parametrize(("N", "K", "T"), [(1, 64, 30), (5, 192, 400), (33, 128, 20)])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("format", WEIGHT_FORMATS)
def test_no_row_is_worse_than_rtn(N, K, T, act_order, format):
    """T < K leaves the Hessian singular."""
    weight_NK, x_TK = correlated_case(N=N, K=K, T=T)
    hessian_KK = hessian(x_TK)
    options = replace(options_of(format), act_order=act_order)
    compensated = gptq(weight_NK, hessian_KK, options)
    nearest = rtn(weight_NK, hessian_KK.diagonal(), options)
    error_N = output_errors(weight_NK, compensated, hessian_KK)
    assert (error_N <= output_errors(weight_NK, nearest, hessian_KK)).all()
    assert true_error(weight_NK, compensated, x_TK) < 0.8 * true_error(weight_NK, nearest, x_TK)


def test_rows_that_compensation_would_harm_keep_their_nearest_codes():
    """Nearly independent inputs: there is little to gain, and in some rows error feedback loses."""
    rng = torch.Generator().manual_seed(0)
    weight_NK, x_TK = torch.randn(400, 64, generator=rng), torch.randn(2000, 64, generator=rng)
    hessian_KK = hessian(x_TK)
    compensated = gptq(weight_NK, hessian_KK, OPTIONS)
    nearest = rtn(weight_NK, hessian_KK.diagonal(), OPTIONS)
    error_N = output_errors(weight_NK, compensated, hessian_KK)
    assert (error_N <= output_errors(weight_NK, nearest, hessian_KK)).all()
    untouched_N = (compensated.codes_NK == nearest.codes_NK).all(-1)
    assert 0 < untouched_N.sum() < 200


@pytest.mark.parametrize("block_size", [1, 17, 64, 1000])
def test_the_block_size_does_not_change_the_result(block_size):
    weight_NK, x_TK = correlated_case(N=6, K=128, T=300)
    expected = gptq(weight_NK, hessian(x_TK), OPTIONS)
    found = gptq(weight_NK, hessian(x_TK), replace(OPTIONS, block_size=block_size))
    assert (found.codes_NK != expected.codes_NK).float().mean() < 0.005


@pytest.mark.parametrize("format", WEIGHT_FORMATS)
def test_range_search_lowers_the_weighted_error_of_every_group(format):
    weight_NK, x_TK = correlated_case(N=8, K=128, T=300)
    importance_K = hessian(x_TK).diagonal().double()
    options = options_of(format)
    clipped = rtn(weight_NK, x_TK.square().sum(0), replace(options, clip_ratios=CLIPPING))
    losses = []
    for quantized in (clipped, rtn(weight_NK, None, options)):
        error_NK = (quantized.dequantize().double() - weight_NK.double()).square() * importance_K
        losses.append(error_NK.view(8, -1, options.group_size).sum(-1))
    assert (losses[0] <= losses[1] * (1 + 1e-5)).all()
    # clipping is worth little where steps are fine
    gain = 0.999 if format == "sint8" else 0.95
    assert losses[0].sum() < gain * losses[1].sum()


@pytest.mark.parametrize("format", WEIGHT_FORMATS)
@pytest.mark.parametrize("rounding", [rtn, gptq])
def test_chosen_scales_survive_storage(format, rounding):
    """bf16, or e4m3 under the tensor scale: with a searched range, too, and for zero groups."""
    weight_NK, x_TK = correlated_case(N=6, K=128, T=300)
    weight_NK[0], weight_NK[1, :64], weight_NK[2, :64] = 0, 0, weight_NK[2, :64] * 1e-6
    options = options_of(format, clip_ratios=CLIPPING, scale_dtype=torch.bfloat16)
    statistic = hessian(x_TK) if rounding is gptq else x_TK.square().sum(0)
    found = rounding(weight_NK, statistic, options)
    dtype = found.format.fixed_scale_dtype or torch.bfloat16
    stored_NG = stored_scales(found.scales_NG, dtype=dtype, tensor_scale=found.tensor_scale)
    assert torch.equal(effective_scales(stored_NG, found.tensor_scale), found.scales_NG)
    assert torch.equal(found.dequantize()[0], torch.zeros(128))


@pytest.mark.parametrize("format", WEIGHT_FORMATS)
@pytest.mark.parametrize("clip_ratios", [(1.0,), CLIPPING])
def test_a_batch_rounds_as_its_matrices_alone(format, clip_ratios):
    cases = [correlated_case(N=5, K=128, T=50, seed=i) for i in range(3)]
    weight_CNK = torch.stack([weight_NK * 10.0**i for i, (weight_NK, _) in enumerate(cases)])
    energy_CK = torch.stack([x_TK.square().sum(0) for _, x_TK in cases])
    options = options_of(format, clip_ratios=clip_ratios, scale_dtype=torch.bfloat16)
    together = rtn(weight_CNK, energy_CK, options).dequantize()
    for weight_NK, energy_K, found_NK in zip(weight_CNK, energy_CK, together, strict=True):
        assert torch.equal(found_NK, rtn(weight_NK, energy_K, options).dequantize())
    if clip_ratios == (1.0,):
        expected_CNK = round_trip(
            weight_CNK,
            format=options.format,
            group_size=options.group_size,
            scale_dtype=torch.bfloat16,
            tensor_scale=choose_tensor_scale(weight_CNK, format=options.format),
        )
        assert torch.equal(together, expected_CNK)


def test_dead_inputs_are_rounded_to_nearest():
    weight_NK, x_TK = correlated_case(N=5, K=128, T=300)
    x_TK[:, 40:50] = 0
    found = gptq(weight_NK, hessian(x_TK), OPTIONS)
    nearest = rtn(weight_NK, None, OPTIONS)
    assert torch.equal(found.codes_NK[:, 40:50], nearest.codes_NK[:, 40:50])
    nothing = gptq(weight_NK, torch.zeros(128, 128), OPTIONS)
    assert torch.equal(nothing.codes_NK, nearest.codes_NK)


@pytest.mark.gpu
@pytest.mark.parametrize("format", WEIGHT_FORMATS)
def test_a_gpu_is_not_waited_for_per_column(format):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    num_waits = []
    for K in (128, 128, 512):
        weight_NK, x_TK = (x.cuda() for x in correlated_case(N=9, K=K, T=600))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            found = gptq(weight_NK, hessian(x_TK), options_of(format))
            torch.cuda.set_sync_debug_mode("default")
        num_waits.append(len(caught))
        nearest = rtn(weight_NK, None, options_of(format))
        assert true_error(weight_NK, found, x_TK) < 0.8 * true_error(weight_NK, nearest, x_TK)
    # the first call makes tables
    assert num_waits[1] == num_waits[2] < 10


def test_misuse_is_named():
    weight_NK = torch.ones(2, 64)
    with pytest.raises(ValueError, match=r"\[64, 64\] Hessian .* None"):
        gptq(weight_NK, None, OPTIONS)
    with pytest.raises(ValueError, match="NaN"):
        gptq(weight_NK, torch.full((64, 64), torch.nan), OPTIONS)
    with pytest.raises(ValueError, match="positive definite"):
        gptq(weight_NK, torch.ones(64, 64) - 1e9 * (1 - torch.eye(64)), OPTIONS)
