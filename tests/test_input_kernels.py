"""The fused input kernel against the reference ops and torch."""

import pytest
import torch
import torch.nn.functional as F

from kernels import DEVICE, assert_rounded

pytest.importorskip("triton")

from interpreter import true_bf16  # noqa: F401
from var_compressor.ops import reference
from var_compressor.ops.inputs import (
    FP8_TOKEN,
    GELU,
    INT8_TOKEN,
    INT_GROUPS,
    PLAIN,
    SMOOTHED,
    UNSMOOTHED,
    Coding,
    Norm,
    add_update,
    prepare,
)
from var_compressor.ops.primitives import FORMATS

# rows, tokens of each, channels; 140 tokens are projected by dots, of 1088 channels in two parts;
# 1030 take the tiled variant
SHAPES = [(1, 1, 64), (2, 3, 320), (2, 70, 1088)]
GROUP_SHAPES = [*SHAPES[:2], (2, 515, 192)]
BF16 = torch.bfloat16


@pytest.fixture
def rng():
    return torch.Generator(DEVICE).manual_seed(5)


def linear_input(rng, K, rank=32):
    smooth_K = torch.rand(K, generator=rng, device=DEVICE) + 0.5
    down_NK = (torch.randn(rank, K, generator=rng, device=DEVICE) * 0.1).bfloat16()
    return smooth_K, down_NK


@pytest.mark.parametrize(("R", "L", "K"), GROUP_SHAPES)
@pytest.mark.parametrize("format", ["sint4", "uint4"])
@pytest.mark.parametrize("as_fp8", [False, True])
def test_groups_of_codes_are_the_references(rng, R, L, K, format, as_fp8):
    smooth_K, down_NK = linear_input(rng, K)
    x_MK = torch.randn(R * L, K, generator=rng, device=DEVICE).bfloat16()
    x_MK[0, :64] = 0  # a group without a range
    shift = 0.17 if format == "uint4" else 0.0
    if shift:
        x_MK = F.gelu(x_MK)
    fmt = FORMATS[format]
    coding = Coding(INT_GROUPS, 64, int(fmt.qmin), int(fmt.qmax), as_fp8=as_fp8, shift=shift)
    found = prepare(x_MK, coding, smooth_K=smooth_K, down_NK=down_NK, dtype=BF16)
    codes_MK, xscales_MG, low_MN = reference.quantize_act(
        x_MK, smooth_K, down_NK, group_size=64, format=fmt, shift=shift
    )
    assert torch.equal(found.xscales_GM.T, xscales_MG)
    assert torch.equal(found.values_MK.float(), codes_MK.float())
    torch.testing.assert_close(found.low_MN.float(), low_MN, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("R", "L", "K"), SHAPES)
def test_int8_codes_per_token_are_the_references(rng, R, L, K):
    smooth_K, down_NK = linear_input(rng, K)
    x_MK = torch.randn(R * L, K, generator=rng, device=DEVICE).bfloat16()
    found = prepare(x_MK, Coding(INT8_TOKEN), smooth_K=smooth_K, down_NK=down_NK, dtype=BF16)
    codes_MK, xscales_M1, _ = reference.quantize_act(
        x_MK, smooth_K, down_NK, group_size=K, format=FORMATS["sint8"]
    )
    torch.testing.assert_close(found.xscales_GM.T, xscales_M1, rtol=1e-6, atol=0)
    exact_MK = x_MK.float() / smooth_K / xscales_M1
    assert ((found.values_MK.float() - exact_MK).abs() <= 0.5 + 1e-4).all()
    assert (found.values_MK != codes_MK).float().mean() < 1e-3
    low_MN = found.values_MK.float() * found.xscales_GM.T @ down_NK.float().T
    torch.testing.assert_close(found.low_MN.float(), low_MN, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("R", "L", "K"), SHAPES)
def test_e4m3_codes_per_token(rng, R, L, K):
    x_MK = torch.randn(R * L, K, generator=rng, device=DEVICE).bfloat16()
    x_MK[-1] = 0  # a token without a range
    found = prepare(x_MK, Coding(FP8_TOKEN), smooth_K=None, down_NK=None, dtype=BF16)
    xscales_M1 = x_MK.float().abs().amax(1, keepdim=True) / 448
    xscales_M1[xscales_M1 == 0] = 1
    torch.testing.assert_close(found.xscales_GM.T, xscales_M1, rtol=1e-6, atol=0)
    assert_rounded(found.values_MK, x_MK.float() / xscales_M1, off_by_one=1e-3)


@pytest.mark.parametrize(("R", "L", "K"), SHAPES)
def test_smoothed_inputs_in_16_bits(rng, R, L, K):
    smooth_K, down_NK = linear_input(rng, K)
    x_MK = torch.randn(R * L, K, generator=rng, device=DEVICE).bfloat16()
    found = prepare(x_MK, Coding(SMOOTHED), smooth_K=smooth_K, down_NK=down_NK, dtype=BF16)
    assert_rounded(found.values_MK, x_MK.float() / smooth_K, off_by_one=1e-3)
    low_MN = found.values_MK.float() @ down_NK.float().T
    torch.testing.assert_close(found.low_MN.float(), low_MN, rtol=1e-2, atol=1e-2)
    assert found.xscales_GM is None


def test_gelu_is_torchs(rng):
    x_MK = torch.randn(9, 192, generator=rng, device=DEVICE).mul_(8).bfloat16()
    x_MK[0, :2] = torch.tensor([1e4, -1e4])
    found = prepare(
        x_MK, Coding(UNSMOOTHED), smooth_K=None, down_NK=None, source=GELU, dtype=torch.float32
    )
    wanted_MK = F.gelu(x_MK.float(), approximate="tanh")
    torch.testing.assert_close(found.values_MK, wanted_MK, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("R", "L", "K"), SHAPES)
@pytest.mark.parametrize("with_update_gain", [False, True])
@pytest.mark.parametrize("coding", [Coding(UNSMOOTHED), Coding(INT_GROUPS, 64, -127, 127)])
def test_norm_after_an_update_of_the_stream(rng, R, L, K, with_update_gain, coding):
    def randn(*shape):
        return torch.randn(*shape, generator=rng, device=DEVICE)

    x_MK = randn(R * L, K) * 3 + 50  # far from 0: what a sum of squares would lose
    update_MK = randn(R * L, K).bfloat16()
    update_gain_RK = randn(R, K) if with_update_gain else None
    gain_RK, bias_RK = randn(R, K), randn(R, K)
    norm = Norm(gain_RK, bias_RK, update_MK, update_gain_RK)
    per_token = 1 if update_gain_RK is None else update_gain_RK.repeat_interleave(L, 0)
    updated_MK = x_MK + per_token * update_MK.float()
    wanted_MK = F.layer_norm(updated_MK, (K,), eps=1e-6)
    wanted_MK = wanted_MK * gain_RK.repeat_interleave(L, 0) + bias_RK.repeat_interleave(L, 0)
    only_added_MK = x_MK.clone()
    smooth_K = torch.ones(K, device=DEVICE)
    found = prepare(
        x_MK, coding, smooth_K=smooth_K, down_NK=None, source=norm,
        tokens_per_row=L, dtype=torch.float32,
    )  # fmt: skip
    torch.testing.assert_close(x_MK, updated_MK, rtol=1e-6, atol=1e-6)
    if coding.kind == UNSMOOTHED:
        torch.testing.assert_close(found.values_MK, wanted_MK, rtol=1e-4, atol=1e-4)
    else:
        step_MK = found.xscales_GM.T.repeat_interleave(64, 1)
        error_MK = found.values_MK.float() * step_MK - wanted_MK
        assert (error_MK.abs() <= 0.5 * step_MK + 1e-4).all()
    add_update(only_added_MK, norm, tokens_per_row=L)
    torch.testing.assert_close(only_added_MK, updated_MK, rtol=1e-6, atol=1e-6)


def test_norm_with_one_gain_for_all_rows(rng):
    x_MK = torch.randn(6, 64, generator=rng, device=DEVICE)
    gain_1K, bias_1K = torch.randn(2, 1, 64, generator=rng, device=DEVICE)
    found = prepare(
        x_MK, Coding(UNSMOOTHED), smooth_K=None, down_NK=None, source=Norm(gain_1K, bias_1K),
        tokens_per_row=3, dtype=torch.float32,
    )  # fmt: skip
    wanted_MK = F.layer_norm(x_MK, (64,), gain_1K[0], bias_1K[0], 1e-6)
    torch.testing.assert_close(found.values_MK, wanted_MK, rtol=1e-5, atol=1e-5)
    assert PLAIN == 0
