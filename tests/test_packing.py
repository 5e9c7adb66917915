"""int4 bytes. Shapes: N output channels, K input channels."""

import pytest
import torch

from var_compressor.ops.packing import (
    pack_codes,
    pack_int4,
    pack_nibbles,
    unpack_codes,
    unpack_int4,
    unpack_nibbles,
)
from var_compressor.ops.primitives import FORMATS, quantize_dynamic


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


def test_misuse_is_named():
    with pytest.raises(ValueError, match=r"even.*\(2, 3\)"):
        pack_int4(torch.zeros(2, 3, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"-9\.\.0"):
        pack_int4(torch.tensor([[-9, 0]], dtype=torch.int8))
    with pytest.raises(ValueError, match="int32"):
        pack_int4(torch.zeros(2, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"span 0\.\.16; these four bits hold 0\.\.15"):
        pack_nibbles(torch.tensor([[16, 0]], dtype=torch.uint8))
    for unpack in (unpack_int4, unpack_nibbles):
        with pytest.raises(ValueError, match=r"uint8 bytes, got torch\.int8"):
            unpack(torch.zeros(2, 4, dtype=torch.int8))
