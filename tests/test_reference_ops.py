"""Reference ops against float64. Shapes as in ops/reference.py: M, K, N, G, R and B, H, Q, L, D."""

import pytest
import torch
import torch.nn.functional as F

from var_compressor.ops import primitives, reference
from var_compressor.ops.packing import pack_int4
from var_compressor.ops.primitives import FORMATS

SHAPES = [(1, 64, 1, 64), (3, 96, 5, 32), (17, 320, 33, 64), (257, 192, 40, 16), (2, 128, 7, 128)]


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(7)


def make_linear(rng, *, K, N, group_size, rank, format="sint4"):
    weight_NK = torch.randn(N, K, generator=rng) * 0.1
    codes_NK, wscales_NG = primitives.quantize_dynamic(
        weight_NK, format=FORMATS[format], group_size=group_size, scale_dtype=torch.float32
    )
    smooth_K = torch.rand(K, generator=rng) + 0.5
    down_RK = torch.randn(rank, K, generator=rng) * 0.1
    up_NR = torch.randn(N, rank, generator=rng)
    bias_N = torch.randn(N, generator=rng)
    return codes_NK, wscales_NG, smooth_K, down_RK, up_NR, bias_N


def expected_gemm(codes_MK, xscales_MG, wcodes_NK, wscales_NG, low_MR, up_NR, bias_N):
    """Everything in float64, dequantizing both sides."""
    K = codes_MK.shape[1]
    x_MK = codes_MK.double() * xscales_MG.double().repeat_interleave(
        K // xscales_MG.shape[1], dim=1
    )
    w_NK = wcodes_NK.double() * wscales_NG.double().repeat_interleave(
        K // wscales_NG.shape[1], dim=1
    )
    return x_MK @ w_NK.T + low_MR.double() @ up_NR.double().T + bias_N.double()


@pytest.mark.parametrize(("M", "K", "N", "group_size"), SHAPES)
@pytest.mark.parametrize("rank", [0, 4])
def test_w4a4_equals_float64(rng, M, K, N, group_size, rank):
    wcodes_NK, wscales_NG, smooth_K, down_RK, up_NR, bias_N = make_linear(
        rng, K=K, N=N, group_size=group_size, rank=rank
    )
    codes_MK, xscales_MG, low_MR = reference.quantize_act(
        torch.randn(M, K, generator=rng),
        smooth_K,
        down_RK,
        group_size=group_size,
        format=FORMATS["sint4"],
    )
    y_MN = reference.gemm_w4a4(
        codes_MK, xscales_MG, pack_int4(wcodes_NK), wscales_NG, low_MR, up_NR, bias_N
    )
    wanted_MN = expected_gemm(codes_MK, xscales_MG, wcodes_NK, wscales_NG, low_MR, up_NR, bias_N)
    torch.testing.assert_close(y_MN.double(), wanted_MN, rtol=1e-5, atol=1e-5)


def test_w4a4_adds_exact_integer_dots_group_by_group(rng):
    # with powers of two as scales nothing rounds, so any inexact dot would show
    codes_MK = torch.randint(-7, 8, (300, 192), generator=rng).to(torch.int8)
    wcodes_NK = torch.randint(-7, 8, (9, 192), generator=rng).to(torch.int8)
    xscales_MG = 2.0 ** torch.randint(-2, 3, (300, 3), generator=rng)
    wscales_NG = 2.0 ** torch.randint(-2, 3, (9, 3), generator=rng)
    nothing_MR, nothing_NR, zero_N = torch.empty(300, 0), torch.empty(9, 0), torch.zeros(9)
    y_MN = reference.gemm_w4a4(
        codes_MK, xscales_MG, pack_int4(wcodes_NK), wscales_NG, nothing_MR, nothing_NR, None
    )
    wanted_MN = expected_gemm(
        codes_MK, xscales_MG, wcodes_NK, wscales_NG, nothing_MR, nothing_NR, zero_N
    )
    assert torch.equal(y_MN.double(), wanted_MN)


@pytest.mark.parametrize(("M", "K", "N", "group_size"), SHAPES)
def test_w4a8_with_one_scale_per_token_equals_float64(rng, M, K, N, group_size):
    wcodes_NK, wscales_NG, smooth_K, down_RK, up_NR, bias_N = make_linear(
        rng, K=K, N=N, group_size=group_size, rank=2
    )
    codes_MK, xscales_M1, low_MR = reference.quantize_act(
        torch.randn(M, K, generator=rng), smooth_K, down_RK, group_size=K, format=FORMATS["sint8"]
    )
    y_MN = reference.gemm_w4a4(
        codes_MK, xscales_M1, pack_int4(wcodes_NK), wscales_NG, low_MR, up_NR, bias_N
    )
    wanted_MN = expected_gemm(codes_MK, xscales_M1, wcodes_NK, wscales_NG, low_MR, up_NR, bias_N)
    torch.testing.assert_close(y_MN.double(), wanted_MN, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("M", "K", "N", "group_size"), SHAPES)
def test_unsigned_codes_are_multiplied_exactly(rng, M, K, N, group_size):
    """15 * 7 everywhere, the largest dots there are; powers of two as scales round nothing."""
    codes_MK = torch.full((M, K), 15, dtype=torch.int8)
    wcodes_NK = torch.where(torch.rand(N, K, generator=rng) < 0.5, -7, 7).to(torch.int8)
    scales = [
        2.0 ** torch.randint(-2, 3, (rows, K // group_size), generator=rng) for rows in (M, N)
    ]
    nothing_MR, nothing_NR = torch.empty(M, 0), torch.empty(N, 0)
    y_MN = reference.gemm_w4a4(
        codes_MK, scales[0], pack_int4(wcodes_NK), scales[1], nothing_MR, nothing_NR, None
    )
    wanted_MN = expected_gemm(
        codes_MK, scales[0], wcodes_NK, scales[1], nothing_MR, nothing_NR, torch.zeros(N)
    )
    assert torch.equal(y_MN.double(), wanted_MN)


@pytest.mark.parametrize(("x_groups", "w_groups"), [(1, 6), (6, 1), (3, 6), (6, 2), (1, 1)])
@pytest.mark.parametrize("nbits", [4, 8])
def test_integers_are_exact_whichever_side_has_more_groups(rng, x_groups, w_groups, nbits):
    qmax = 2 ** (nbits - 1) - 1
    codes_MK = torch.randint(-127, 128, (35, 384), generator=rng).to(torch.int8)
    wcodes_NK = torch.randint(-qmax, qmax + 1, (9, 384), generator=rng).to(torch.int8)
    xscales_MG = 2.0 ** torch.randint(-1, 1, (35, x_groups), generator=rng)
    wscales_NG = 2.0 ** torch.randint(-1, 1, (9, w_groups), generator=rng)
    nothing_MR, nothing_NR, zero_N = torch.empty(35, 0), torch.empty(9, 0), torch.zeros(9)
    gemm, qweight = reference.gemm_w8a8, wcodes_NK
    if nbits == 4:
        gemm, qweight = reference.gemm_w4a4, pack_int4(wcodes_NK)
    y_MN = gemm(codes_MK, xscales_MG, qweight, wscales_NG, nothing_MR, nothing_NR, None)
    wanted_MN = expected_gemm(
        codes_MK, xscales_MG, wcodes_NK, wscales_NG, nothing_MR, nothing_NR, zero_N
    )
    assert torch.equal(y_MN.double(), wanted_MN)


@pytest.mark.parametrize(("M", "K", "N", "group_size"), SHAPES)
def test_the_product_of_dequantized_sides_equals_float64(rng, M, K, N, group_size):
    wcodes_NK, wscales_NG, _, down_RK, up_NR, bias_N = make_linear(
        rng, K=K, N=N, group_size=group_size, rank=3
    )
    x_MK = torch.randn(M, K, generator=rng)
    low_MR = x_MK @ down_RK.T
    weight_NK = primitives.dequantize_symmetric(wcodes_NK, wscales_NG, format=FORMATS["sint4"])
    y_MN = reference.gemm_dequantized(x_MK, weight_NK, low_MR, up_NR, bias_N)
    unit_MG = torch.ones(M, 1)
    wanted_MN = expected_gemm(x_MK, unit_MG, wcodes_NK, wscales_NG, low_MR, up_NR, bias_N)
    torch.testing.assert_close(y_MN.double(), wanted_MN, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("M", "K", "N"), [(1, 3, 2), (5, 1024, 3), (258, 2500, 4)])
def test_w8a8_equals_float64_beyond_what_float32_can_sum(rng, M, K, N):
    # all products positive and maximal: a float32 sum over 2500 channels would lose units
    codes_MK = torch.randint(120, 128, (M, K), generator=rng).to(torch.int8)
    wcodes_NK = torch.randint(120, 128, (N, K), generator=rng).to(torch.int8)
    xscales_M1, wscales_N1 = torch.ones(M, 1), torch.ones(N, 1)
    nothing_MR, nothing_NR = torch.empty(M, 0), torch.empty(N, 0)
    y_MN = reference.gemm_w8a8(
        codes_MK, xscales_M1, wcodes_NK, wscales_N1, nothing_MR, nothing_NR, None
    )
    exact_MN = codes_MK.long() @ wcodes_NK.long().T
    assert torch.equal(y_MN, exact_MN.float())


def test_quantize_act_smooths_before_quantizing_and_projects_unquantized(rng):
    x_MK, smooth_K = torch.randn(6, 64, generator=rng), torch.rand(64, generator=rng) + 0.1
    down_RK = torch.randn(3, 64, generator=rng)
    codes_MK, xscales_MG, low_MR = reference.quantize_act(
        x_MK, smooth_K, down_RK, group_size=32, format=FORMATS["sint4"]
    )
    x_hat_MK = x_MK.double() / smooth_K.double()
    torch.testing.assert_close(low_MR.double(), x_hat_MK @ down_RK.double().T, rtol=1e-5, atol=1e-5)
    absmax_MG = x_hat_MK.view(6, 2, 32).abs().amax(-1)
    torch.testing.assert_close(xscales_MG.double(), absmax_MG / 7, rtol=1e-6, atol=0)
    step_MK = xscales_MG.double().repeat_interleave(32, dim=1)
    assert ((codes_MK.double() * step_MK - x_hat_MK).abs() <= step_MK * 0.50001).all()


def test_shift_is_undone_by_the_bias_and_halves_the_step(rng):
    """Unsigned codes for a post-GELU input: same function, finer steps."""
    shift, K, N = 0.171875, 128, 24
    x_MK = F.gelu(torch.randn(50, K, generator=rng) * 2, approximate="tanh")
    wcodes_NK, wscales_NG, smooth_K, down_RK, up_NR, bias_N = make_linear(
        rng, K=K, N=N, group_size=64, rank=4
    )
    residual_NK = primitives.dequantize_symmetric(wcodes_NK, wscales_NG, format=FORMATS["sint4"])
    weight_NK = (residual_NK + up_NR @ down_RK) / smooth_K
    wanted_MN = x_MK.double() @ weight_NK.double().T + bias_N.double()
    errors = {}
    for format, used_shift in (("sint4", 0.0), ("uint4", shift)):
        bias_here_N = reference.shifted_bias(bias_N, weight_NK, shift=used_shift)
        codes_MK, xscales_MG, low_MR = reference.quantize_act(
            x_MK, smooth_K, down_RK, group_size=64, format=FORMATS[format], shift=used_shift
        )
        y_MN = reference.gemm_w4a4(
            codes_MK, xscales_MG, pack_int4(wcodes_NK), wscales_NG, low_MR, up_NR, bias_here_N
        )
        errors[format] = float((y_MN - wanted_MN).square().mean())
    assert codes_MK.amin() >= 0 and codes_MK.amax() == 15
    assert errors["uint4"] < 0.4 * errors["sint4"]
    # unquantized, the shift cancels up to float32 rounding
    y_MN = (x_MK + shift) @ weight_NK.T + reference.shifted_bias(bias_N, weight_NK, shift=shift)
    torch.testing.assert_close(y_MN.double(), wanted_MN, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 0, 8), (2, 3, 5, 0, 16), (1, 2, 1, 9, 8), (2, 3, 7, 40, 16)]
)
@pytest.mark.parametrize("center", [0.0, 5.0])
def test_attention_over_codes_equals_attention_over_dequantized_values(rng, shape, center):
    """center 5: every channel's range excludes 0, so the zero points lie far outside the codes."""
    B, H, Q, L, D = shape
    q, k_now, v_now = (
        torch.randn(B, H, Q, D, generator=rng, dtype=torch.float64) for _ in range(3)
    )
    cached = []
    for _ in ("k", "v"):
        lo_HD = center + torch.randn(H, D, generator=rng)
        scale_HD, zero_HD = primitives.choose_affine(lo_HD, lo_HD + 1.5, nbits=8)
        codes = torch.randint(-128, 128, (B, H, L, D), generator=rng).to(torch.int8)
        real = (codes.double() - zero_HD.double()[:, None]) * scale_HD.double()[:, None]
        cached.append((codes, scale_HD, zero_HD, real))
    (k_codes, k_scale, k_zero, k_real), (v_codes, v_scale, v_zero, v_real) = cached
    scale_1H1D = [scale[None, :, None] for scale in (k_scale, v_scale)]
    offset_1H1D = [
        -scale.double() * zero[None, :, None]
        for scale, zero in zip(scale_1H1D, (k_zero, v_zero), strict=True)
    ]
    # in two parts, which have their parameters in common
    cut = k_codes.shape[2] // 3
    cached = [
        reference.CodedTokens(
            k_codes[:, :, part],
            v_codes[:, :, part],
            scale_1H1D[0],
            offset_1H1D[0],
            scale_1H1D[1],
            offset_1H1D[1],
        )
        for part in (slice(0, cut), slice(cut, None))
    ]
    o = reference.attend_codes(q, cached, k_now, v_now)
    k, v = torch.cat((k_real, k_now), dim=2), torch.cat((v_real, v_now), dim=2)
    wanted = torch.softmax(q @ k.mT, dim=-1) @ v
    torch.testing.assert_close(o, wanted, rtol=1e-10, atol=1e-10)


def random_codes(kind, shape, rng):
    """Codes as they are stored, and as numbers."""
    if kind == "fp8":
        codes = (100 * torch.randn(shape, generator=rng)).to(torch.float8_e4m3fn)
        return codes, codes.double()
    half = 8 if kind == "int4" else 128
    codes = torch.randint(-half, half, shape, generator=rng).to(torch.int8)
    return (pack_int4(codes) if kind == "int4" else codes), codes.double()


@pytest.mark.parametrize("own_parameters_per_row", [False, True])
def test_attention_over_codes_of_every_kind_equals_dequantizing_in_float64(
    rng, own_parameters_per_row
):
    """One part of each kind, one after the other; every channel is far from 0."""
    B, H, Q, D = 3, 2, 5, 8
    q, k_now, v_now = (torch.randn(B, H, Q, D, generator=rng, dtype=torch.float64) for _ in "qkv")
    cached, k_parts, v_parts = [], [k_now], [v_now]
    rows = B if own_parameters_per_row else 1
    for kind, length in (("int8", 7), ("int4", 4), ("fp8", 1), ("int4", 0)):
        stored = {}
        for name, parts in (("k", k_parts), ("v", v_parts)):
            codes, numbers = random_codes(kind, (B, H, length, D), rng)
            scale, offset = (
                torch.rand(rows, H, 1, D, generator=rng, dtype=torch.float64) for _ in range(2)
            )
            scale, offset = (scale + 0.5) / (8 if kind == "int4" else 128), 3 + offset
            parts.append(numbers * scale + offset)
            named = zip(("codes", "scale", "offset"), (codes, scale, offset), strict=True)
            stored |= {f"{name}_{what}": tensor for what, tensor in named}
        cached.append(reference.CodedTokens(**stored))
    k, v = torch.cat(k_parts, dim=2), torch.cat(v_parts, dim=2)
    wanted = (q @ k.mT).softmax(-1) @ v
    o = reference.attend_codes(q, cached, k_now, v_now)
    torch.testing.assert_close(o, wanted, rtol=1e-10, atol=1e-10)


def test_attention_does_not_depend_on_how_queries_are_chunked(rng, monkeypatch):
    B, H, Q, L, D = 2, 2, 9, 11, 4
    tensors = [torch.randn(B, H, Q, D, generator=rng) for _ in range(3)]
    codes = [torch.randint(-128, 128, (B, H, L, D), generator=rng).to(torch.int8) for _ in "kv"]
    scales = [torch.rand(1, H, 1, D, generator=rng) / 100 for _ in range(4)]
    cached = [reference.CodedTokens(*codes, *scales)]
    whole = reference.attend_codes(tensors[0], cached, *tensors[1:])
    monkeypatch.setattr(reference, "_ATTEND_LOGITS", H * (L + Q) * 2)
    chunked = reference.attend_codes(tensors[0], cached, *tensors[1:])
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-6)


def test_misuse_is_named(rng):
    wcodes_NK, wscales_NG, *_, up_NR, bias_N = make_linear(rng, K=64, N=4, group_size=32, rank=1)
    codes_MK, low_MR = torch.zeros(2, 96, dtype=torch.int8), torch.zeros(2, 1)
    with pytest.raises(ValueError, match="96 channels in 3 groups, the weight 64 in 2"):
        reference.gemm_w4a4(
            codes_MK, torch.ones(2, 3), pack_int4(wcodes_NK), wscales_NG, low_MR, up_NR, bias_N
        )
    with pytest.raises(ValueError, match="64 channels in 4 groups, the weight 64 in 3"):
        reference.gemm_w8a8(
            codes_MK[:, :64],
            torch.ones(2, 4),
            wcodes_NK,
            torch.ones(4, 3),
            low_MR,
            up_NR,
            bias_N,
        )
    with pytest.raises(ValueError, match="flatten"):
        reference.quantize_act(
            torch.zeros(1, 2, 64),
            torch.ones(64),
            torch.zeros(1, 64),
            group_size=64,
            format=FORMATS["sint4"],
        )
