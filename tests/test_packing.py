"""int4 bytes. Shapes: N output channels, K input channels."""

import pytest
import torch

from var_compressor.ops.packing import pack_int4, unpack_int4


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
    with pytest.raises(ValueError, match="int8"):
        unpack_int4(torch.zeros(2, 4, dtype=torch.int8))
