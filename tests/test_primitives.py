"""Number formats. Shapes: M rows, K channels, G groups."""

import pytest
import torch

from quant_golden import load_golden
from var_compressor.ops import primitives
from var_compressor.ops.primitives import FORMATS


@pytest.mark.parametrize(
    ("name", "source", "format", "group_size"),
    [
        ("wquant_a", "weight", "sint4", 64),
        ("wquant_b", "weight", "sint4", 64),
        ("wquant_int8pc", "weight", "sint8", 256),
        ("actquant_signed_a", "x", "sint4", 64),
        ("actquant_signed_b", "x", "sint4", 64),
        ("actquant_unsigned_a", "x", "uint4", 64),
    ],
)
def test_symmetric_codes_and_scales_equal_the_original(name, source, format, group_size):
    golden = load_golden(name)
    x = golden[source]
    options = {"format": FORMATS[format], "group_size": group_size, "scale_dtype": x.dtype}
    codes, scales = primitives.quantize_dynamic(x, **options)
    assert torch.equal(codes, golden["codes"])
    assert torch.equal(scales.flatten(), golden["scale"].flatten())
    dequantized = primitives.dequantize_symmetric(codes, scales)
    assert torch.equal(dequantized.to(x.dtype), golden["dequant"])
    assert torch.equal(primitives.round_trip(x, **options), dequantized)


def test_nvfp4_weight_equals_the_original():
    golden = load_golden("nvfp4_weight_a")
    weight_NK = golden["weight"]
    scale = primitives.choose_nvfp4_tensor_scale(weight_NK, scale_dtype=weight_NK.dtype)
    codes_NK, scales_NG = primitives.quantize_nvfp4(weight_NK, tensor_scale=scale)
    assert torch.equal(scale, golden["scale.0"].squeeze())
    assert torch.equal(scales_NG.float().flatten(), golden["scale.1"].flatten())
    values = torch.tensor(primitives.E2M1_VALUES)[codes_NK.int()]
    assert torch.equal(values, golden["fp4_values"])
    dequantized = primitives.dequantize_nvfp4(codes_NK, scales_NG, tensor_scale=scale)
    assert torch.equal(dequantized, golden["dequant"])


def test_nvfp4_activation_equals_the_original_even_where_a_scale_underflows():
    golden = load_golden("nvfp4_act_a")
    codes, scales = primitives.quantize_nvfp4(golden["x"], tensor_scale=None)
    assert (scales.float() == 0).sum() == 1
    dequantized = primitives.dequantize_nvfp4(codes, scales, tensor_scale=None)
    assert torch.equal(dequantized, golden["dequant"])


@pytest.mark.parametrize("format", ["sint4", "sint8", "fp8_e4m3"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_error_is_within_half_a_step_of_the_float64_value(format, scale_dtype):
    fmt = FORMATS[format]
    x_MK = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    scales_MG = primitives.choose_scales(x_MK, format=fmt, group_size=32, scale_dtype=scale_dtype)
    codes_MK = primitives.quantize_symmetric(x_MK, scales_MG, format=fmt)
    scale_MK = scales_MG.double().repeat_interleave(32, dim=-1)
    error_MK = (codes_MK.double() * scale_MK - x_MK.double()).abs()
    # e4m3 has 3 mantissa bits; a scale rounded down may clip the largest value a little more
    relative = x_MK.double().abs() / 16 + scale_MK * 2**-10
    allowed = scale_MK / 2 if fmt.kind == "int" else relative
    clipped = x_MK.double().abs() - scale_MK * fmt.qmax
    assert (error_MK <= torch.maximum(allowed, clipped) + 1e-6).all()


def test_rounding_is_half_to_even_and_symmetric():
    scales = torch.ones(1, 1)
    x_MK = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 6.5, 100.0]])
    codes_MK = primitives.quantize_symmetric(x_MK, scales, format=FORMATS["sint4"])
    assert codes_MK.tolist() == [[0, 2, 2, 0, -2, -2, 6, 7]]
    negated = primitives.quantize_symmetric(-x_MK, scales, format=FORMATS["sint4"])
    assert torch.equal(negated, -codes_MK)


def test_an_all_zero_group_has_scale_one_and_stays_zero():
    x_MK = torch.zeros(1, 8)
    x_MK[0, 4:] = 3.0
    codes_MK, scales_MG = primitives.quantize_dynamic(
        x_MK, format=FORMATS["sint4"], group_size=4, scale_dtype=torch.float32
    )
    assert scales_MG[0, 0] == 1
    assert codes_MK.tolist() == [[0, 0, 0, 0, 7, 7, 7, 7]]


@pytest.mark.parametrize("nbits", [4, 8])
@pytest.mark.parametrize(("lo", "hi"), [(-1.0, 3.0), (5.0, 6.0), (-40.0, -39.5), (1000.0, 1000.1)])
def test_affine_covers_ranges_that_exclude_zero(lo, hi, nbits):
    x = torch.linspace(lo, hi, 1001)
    scale, zero_point = primitives.choose_affine(x.amin(), x.amax(), nbits=nbits)
    codes = primitives.quantize_affine(x, scale, zero_point, nbits=nbits)
    exact = (codes.double() - zero_point.double()) * scale.double()
    # half a step, and as much again at the ends, which the rounded zero point may cut
    assert (exact - x.double()).abs().max() <= 1.1 * scale.double()
    assert scale <= max((hi - lo) / (2**nbits - 1), abs(hi) * 2**-20) * 1.01
    torch.testing.assert_close(
        primitives.dequantize_affine(codes, scale, zero_point), exact.float()
    )


def test_affine_keeps_a_constant_channel():
    for value in (0.0, 1.0, -123.456, 1e-4):
        x = torch.full((3,), value)
        scale, zero_point = primitives.choose_affine(x.amin(), x.amax(), nbits=8)
        codes = primitives.quantize_affine(x, scale, zero_point, nbits=8)
        restored = primitives.dequantize_affine(codes, scale, zero_point)
        assert (restored - x).abs().max() <= abs(value) * 2e-6


def test_affine_takes_a_float_offset():
    x = torch.linspace(7.0, 9.0, 256)
    scale = (x.amax() - x.amin()) / 255
    offset = -128 - x.amin() / scale
    codes = primitives.quantize_affine(x, scale, offset, nbits=8)
    assert torch.equal(codes, torch.arange(-128, 128).to(torch.int8))


def test_misuse_is_named():
    x_MK = torch.ones(2, 10)
    with pytest.raises(ValueError, match=r"10 channels .* groups of 4"):
        primitives.split_groups(x_MK, group_size=4)
    with pytest.raises(ValueError, match="use quantize_nvfp4"):
        primitives.choose_scales(
            x_MK, format=FORMATS["nvfp4"], group_size=10, scale_dtype=torch.float32
        )
