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
    dequantized = primitives.dequantize_symmetric(codes, scales, format=FORMATS[format])
    assert torch.equal(dequantized.to(x.dtype), golden["dequant"])
    assert torch.equal(primitives.round_trip(x, **options), dequantized)


NVFP4 = {"format": FORMATS["nvfp4"], "group_size": 16, "scale_dtype": torch.bfloat16}


def test_nvfp4_weight_equals_the_original():
    golden = load_golden("nvfp4_weight_a")
    weight_NK, format = golden["weight"], FORMATS["nvfp4"]
    tensor_scale = primitives.choose_tensor_scale(weight_NK, format=format)
    assert torch.equal(tensor_scale, golden["scale.0"].squeeze())
    scales_NG = primitives.choose_scales(weight_NK, **NVFP4, tensor_scale=tensor_scale)
    stored_NG = primitives.stored_scales(
        scales_NG, dtype=torch.float8_e4m3fn, tensor_scale=tensor_scale
    )
    assert torch.equal(stored_NG.float().flatten(), golden["scale.1"].flatten())
    assert torch.equal(primitives.effective_scales(stored_NG, tensor_scale), scales_NG)
    codes_NK = primitives.quantize_symmetric(weight_NK, scales_NG, format=format)
    values_NK = torch.tensor(primitives.E2M1_VALUES)[codes_NK.int()]
    assert torch.equal(values_NK, golden["fp4_values"])
    dequantized_NK = primitives.dequantize_symmetric(codes_NK, scales_NG, format=format)
    assert torch.equal(dequantized_NK, golden["dequant"])
    found_NK = primitives.round_trip(weight_NK, **NVFP4, tensor_scale=tensor_scale)
    assert torch.equal(found_NK, golden["dequant"])


def test_nvfp4_activation_equals_the_original_even_where_a_scale_underflows():
    golden = load_golden("nvfp4_act_a")
    codes, scales = primitives.quantize_dynamic(golden["x"], **NVFP4)
    assert torch.equal(scales.flatten(), golden["scale"].flatten())
    underflowing = codes.view(*scales.shape, 16)[scales == 1]
    assert len(underflowing) == 1 and not underflowing.any()
    dequantized = primitives.dequantize_symmetric(codes, scales, format=FORMATS["nvfp4"])
    assert torch.equal(dequantized, golden["dequant"])
    assert torch.equal(primitives.round_trip(golden["x"], **NVFP4), golden["dequant"])


def test_e2m1_codes_are_the_hardware_s_and_midpoints_go_up():
    table = {
        0.0: 0, 0.24: 0, 0.25: 1, 0.5: 1, 0.75: 2, 1.25: 3, 1.75: 4, 2.4: 4, 2.5: 5, 3.5: 6,
        4.9: 6, 5.0: 7, 99.0: 7, -0.25: 0, -0.3: 9, -0.75: 9, -1.0: 10, -1.75: 11, -1.8: 12,
        -2.5: 12, -3.5: 13, -5.0: 14, -5.1: 15, -99.0: 15,
    }  # fmt: skip
    x_1K = torch.tensor([list(table)])
    codes_1K = primitives.quantize_symmetric(x_1K, torch.ones(1, 1), format=FORMATS["nvfp4"])
    assert codes_1K.tolist() == [list(table.values())]


@pytest.mark.parametrize(
    ("nbits", "kind", "span", "dtype", "values", "message"),
    [
        (9, "int", (-3, 3), torch.int8, (), "9 bits; codes have 1 to 8"),
        (0, "int", (0, 0), torch.int8, (), "0 bits; codes have 1 to 8"),
        (4, "float", (-6, 6), torch.uint8, (), "floats have 8"),
        (2, "int", (-3, 3), torch.int8, (), "2 bits do not hold -3 to 3"),
        (3, "int", (-3, 3), torch.uint8, (), "are torch.int8, got torch.uint8"),
        (1, "table", (-1, 1), torch.uint8, (-1.0, 0.0, 1.0), "3 values, expected 2"),
        (1, "table", (-1, 1), torch.uint8, (-1.0, 1.0), "0 among them"),
        (1, "table", (0, 2), torch.uint8, (0.0, 1.0), "the values span 0.0 to 1.0"),
        (1, "table", (0, 1), torch.int8, (0.0, 1.0), "are torch.uint8, got torch.int8"),
    ],
)
def test_a_format_that_cannot_be_is_refused(nbits, kind, span, dtype, values, message):
    with pytest.raises(ValueError, match=f"odd: .*{message}"):
        primitives.NumberFormat("odd", nbits, kind, *span, dtype, values=values)


def test_a_table_rounds_to_the_nearest_value_and_back():
    values = (0.0, 1.0, -0.25, 0.5)
    format = primitives.NumberFormat("odd", 2, "table", -0.25, 1, torch.uint8, values=values)
    x_MK = torch.rand(9, 64, generator=torch.Generator().manual_seed(0)) * 4 - 2
    options = {"format": format, "group_size": 16, "scale_dtype": torch.float32}
    codes, scales = primitives.quantize_dynamic(x_MK, **options)
    x_MGE = x_MK.view(9, 4, 16, 1) / scales.view(9, 4, 1, 1)
    expected = (x_MGE - torch.tensor(values)).abs().argmin(-1).view(9, 64)
    assert torch.equal(codes.long(), expected)
    found = primitives.dequantize_symmetric(codes, scales, format=format)
    assert torch.equal(found, primitives.round_to_grid(x_MK, scales, format=format))
    zeros, ones = primitives.quantize_dynamic(torch.zeros(1, 16), **options)
    assert not primitives.dequantize_symmetric(zeros, ones, format=format).any()


def mixed_weights(*batch):
    """Matrices of very different ranges, with a zero group, a tiny one and a zero matrix."""
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(*batch, 5, 96, generator=rng)
    if batch:
        x *= torch.logspace(-4, 3, batch[0]).view(-1, *[1] * (x.ndim - 1))
        x[0] = 0
    x[..., 1, :32] = 0
    x[..., 2, :32] *= 1e-6
    return x


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("batch", [(), (4,), (3, 2)])
def test_a_batch_equals_the_loop_over_its_matrices(format, batch):
    fmt, x = FORMATS[format], mixed_weights(*batch)
    options = {"format": fmt, "group_size": 16, "scale_dtype": torch.bfloat16}
    tensor_scale = primitives.choose_tensor_scale(x, format=fmt)
    scales = primitives.choose_scales(x, **options, tensor_scale=tensor_scale)
    codes = primitives.quantize_symmetric(x, scales, format=fmt)
    found = primitives.round_trip(x, **options, tensor_scale=tensor_scale)
    for i, matrix in enumerate(x.view(-1, 5, 96)):
        scale = primitives.choose_tensor_scale(matrix, format=fmt)
        alone = primitives.choose_scales(matrix, **options, tensor_scale=scale)
        assert torch.equal(scales.view(-1, 5, 6)[i], alone)
        expected = primitives.quantize_symmetric(matrix, alone, format=fmt)
        assert torch.equal(codes.view(-1, 5, 96)[i].float(), expected.float())
        expected = primitives.dequantize_symmetric(expected, alone, format=fmt)
        assert torch.equal(found.view(-1, 5, 96)[i], expected)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_to_the_grid_equals_codes_and_back(format, dtype):
    fmt = FORMATS[format]
    x_MK = mixed_weights()
    scales_MG = primitives.choose_scales(x_MK, format=fmt, group_size=16, scale_dtype=dtype)
    # a smaller range clips
    for scale_MG in (scales_MG, scales_MG * 0.7):
        codes_MK = primitives.quantize_symmetric(x_MK.to(dtype), scale_MG, format=fmt)
        assert codes_MK.dtype == fmt.code_dtype
        assert torch.equal(
            primitives.round_to_grid(x_MK.to(dtype), scale_MG, format=fmt),
            primitives.dequantize_symmetric(codes_MK, scale_MG, format=fmt),
        )


@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 3e4])
def test_scales_survive_storage(magnitude):
    """Groups that are zero or underflow beside the largest have an effective scale of 1."""
    weight_NK, format = mixed_weights() * magnitude, FORMATS["nvfp4"]
    tensor_scale = primitives.choose_tensor_scale(weight_NK, format=format)
    scales_NG = primitives.choose_scales(weight_NK, **NVFP4, tensor_scale=tensor_scale)
    assert (scales_NG == 1).sum() >= 4
    stored_NG = primitives.stored_scales(
        scales_NG, dtype=torch.float8_e4m3fn, tensor_scale=tensor_scale
    )
    assert torch.equal(primitives.effective_scales(stored_NG, tensor_scale), scales_NG)


def test_formats_with_one_level_of_scales_have_no_tensor_scale():
    for name, format in FORMATS.items():
        found = primitives.choose_tensor_scale(torch.ones(2, 16), format=format)
        assert (found is None) == (name != "nvfp4")


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
def test_a_gpu_rounds_alike_and_is_never_waited_for(format):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    fmt, x = FORMATS[format], mixed_weights(4)
    options = {"format": fmt, "group_size": 16, "scale_dtype": torch.bfloat16}

    def rounded(x):
        tensor_scale = primitives.choose_tensor_scale(x, format=fmt)
        scales = primitives.choose_scales(x, **options, tensor_scale=tensor_scale)
        codes = primitives.quantize_symmetric(x, scales, format=fmt)
        back = primitives.dequantize_symmetric(codes, scales, format=fmt)
        return back, primitives.round_trip(x, **options, tensor_scale=tensor_scale)

    on_gpu = x.cuda()
    # the first call makes the tables
    rounded(on_gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = rounded(on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, expected in zip(found, rounded(x), strict=True):
        assert torch.equal(ours.cpu(), expected)


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
    with pytest.raises(ValueError, match="nvfp4 has groups of 16, got group size 10"):
        primitives.choose_scales(
            x_MK, format=FORMATS["nvfp4"], group_size=10, scale_dtype=torch.float32
        )
    with pytest.raises(ValueError, match="3 scales per row do not divide 10 channels"):
        primitives.quantize_symmetric(x_MK, torch.ones(2, 3), format=FORMATS["sint4"])
