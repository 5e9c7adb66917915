"""Codes as bytes. Shapes: N output channels, K input channels."""

import pytest
import torch

from var_compressor.ops.packing import (
    pack_codes,
    pack_int4,
    pack_nibbles,
    packed_columns,
    unpack_codes,
    unpack_int4,
    unpack_nibbles,
)
from var_compressor.ops.primitives import FORMATS, NumberFormat, quantize_dynamic


def test_low_nibble_is_the_even_channel_in_twos_complement():
    codes_NK = torch.tensor([[1, -1, 7, -8, 0, -7]], dtype=torch.int8)
    assert pack_int4(codes_NK).tolist() == [[0xF1, 0x87, 0x90]]


@pytest.mark.parametrize("shape", [(1, 2), (3, 6), (7, 130), (0, 4), (5, 0), (2, 3, 8)])
def test_unpacking_inverts_packing(shape):
    codes_NK = torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(0))
    codes_NK = codes_NK.to(torch.int8)
    packed_NJ = pack_int4(codes_NK)
    assert packed_NJ.numel() * 2 == codes_NK.numel()
    assert torch.equal(unpack_int4(packed_NJ), codes_NK)


def test_every_byte_survives_unpacking_and_packing():
    packed_NJ = torch.arange(256, dtype=torch.uint8).view(4, 64)
    assert torch.equal(pack_int4(unpack_int4(packed_NJ)), packed_NJ)
    assert torch.equal(pack_nibbles(unpack_nibbles(packed_NJ)), packed_NJ)


def test_unsigned_nibbles_are_the_codes_themselves():
    codes_NK = torch.tensor([[1, 15, 0, 8]], dtype=torch.uint8)
    assert pack_nibbles(codes_NK).tolist() == [[0xF1, 0x80]]
    assert unpack_nibbles(pack_nibbles(codes_NK)).tolist() == codes_NK.tolist()


@pytest.mark.parametrize("format", ["sint4", "sint8", "fp8_e4m3", "nvfp4"])
def test_codes_of_every_weight_format_survive_storage(format):
    fmt = FORMATS[format]
    weight_NK = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    codes_NK, _ = quantize_dynamic(weight_NK, format=fmt, group_size=16, scale_dtype=torch.float32)
    stored_NJ = pack_codes(codes_NK, format=fmt)
    assert stored_NJ.nbytes * 8 == weight_NK.numel() * fmt.nbits
    unpacked_NK = unpack_codes(stored_NJ, format=fmt)
    assert unpacked_NK.dtype == codes_NK.dtype
    assert torch.equal(unpacked_NK.float(), codes_NK.float())


def test_a_view_with_strides_packs_like_its_copy():
    codes_KN = torch.randint(-8, 8, (6, 5), generator=torch.Generator().manual_seed(0))
    codes_NK = codes_KN.to(torch.int8).T
    assert torch.equal(pack_int4(codes_NK), pack_int4(codes_NK.contiguous()))
    packed_NJ = pack_int4(codes_NK)[:, 1:]
    assert torch.equal(unpack_int4(packed_NJ), codes_NK[:, 2:])


@pytest.mark.parametrize("nbits", [1, 2, 3, 5, 6, 7])
@pytest.mark.parametrize("kind", ["int", "table"])
def test_codes_of_any_width_are_a_row_s_binary_digits(nbits, kind):
    """Against Python's own integers: the first code is the lowest."""
    low = -(2 ** (nbits - 1)) if kind == "int" else 0
    high = low + 2**nbits - 1
    values = tuple(float(i) for i in range(2**nbits)) if kind == "table" else ()
    dtype = torch.int8 if kind == "int" else torch.uint8
    fmt = NumberFormat("odd", nbits, kind, low, high, dtype, values=values)
    generator = torch.Generator().manual_seed(nbits)
    codes_NK = torch.randint(low, high + 1, (7, 24), generator=generator).to(dtype)
    codes_NK[0, :2] = torch.tensor([low, high])
    stored_NJ = pack_codes(codes_NK, format=fmt)
    assert stored_NJ.shape == (7, packed_columns(24, format=fmt)) == (7, 3 * nbits)
    for row, stored in zip(codes_NK.tolist(), stored_NJ.tolist(), strict=True):
        number = sum((code % 2**nbits) << (nbits * k) for k, code in enumerate(row))
        assert int.from_bytes(bytes(stored), "little") == number
    unpacked_NK = unpack_codes(stored_NJ, format=fmt)
    assert unpacked_NK.dtype == dtype and torch.equal(unpacked_NK, codes_NK)


def test_codes_of_four_bits_are_no_exception():
    codes_NK = torch.randint(-8, 8, (5, 16), generator=torch.Generator().manual_seed(0))
    number = sum((int(code) % 16) << (4 * k) for k, code in enumerate(codes_NK[0]))
    stored_NJ = pack_int4(codes_NK.to(torch.int8))
    assert int.from_bytes(bytes(stored_NJ[0].tolist()), "little") == number


def test_misuse_of_other_widths_is_named():
    fmt = NumberFormat("sint3", 3, "int", -3, 3, torch.int8)
    with pytest.raises(ValueError, match=r"12 input channels of 3 bits.*multiple of 8"):
        pack_codes(torch.zeros(2, 12, dtype=torch.int8), format=fmt)
    with pytest.raises(ValueError, match=r"span 0\.\.4; 3 bits hold -4\.\.3"):
        pack_codes(torch.tensor([[4] + [0] * 7], dtype=torch.int8), format=fmt)
    with pytest.raises(ValueError, match=r"uint8 bytes, got torch\.int8"):
        unpack_codes(torch.zeros(2, 3, dtype=torch.int8), format=fmt)


def test_misuse_is_named():
    with pytest.raises(ValueError, match=r"even.*\(2, 3\)"):
        pack_int4(torch.zeros(2, 3, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"-9\.\.0"):
        pack_int4(torch.tensor([[-9, 0]], dtype=torch.int8))
    with pytest.raises(ValueError, match="int32"):
        pack_int4(torch.zeros(2, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"span 0\.\.16; 4 bits hold 0\.\.15"):
        pack_nibbles(torch.tensor([[16, 0]], dtype=torch.uint8))
    for unpack in (unpack_int4, unpack_nibbles):
        with pytest.raises(ValueError, match=r"uint8 bytes, got torch\.int8"):
            unpack(torch.zeros(2, 4, dtype=torch.int8))
