"""The kernel from qkv to q, k, v and codes against torch: codes exactly, floats to their rounding.

Shapes: R rows, L tokens, H heads, D head channels.
"""

import pytest
import torch

from kernels import DEVICE

pytest.importorskip("triton")

from interpreter import true_bf16  # noqa: F401
from var_compressor.models.transformer import split_heads
from var_compressor.ops.packing import join_nibbles
from var_compressor.ops.primitives import quantize_affine
from var_compressor.ops.qkv import CodesOut, normalize_rotate

SHAPES = [(1, 1, 2, 64), (4, 7, 3, 128), (2, 37, 2, 96)]
CODE_DTYPES = {"int8": torch.int8, "int4": torch.uint8, "e4m3": torch.float8_e4m3fn}


@pytest.fixture
def rng():
    return torch.Generator(DEVICE).manual_seed(7)


class Problem:
    """A projection's output whose values have channels of very different ranges, some without 0."""

    def __init__(self, rng, R, L, H, D, dtype):
        def randn(*shape):
            return torch.randn(*shape, generator=rng, device=DEVICE)

        qkv = randn(R, L, 3, H, D)
        spread_D = torch.logspace(-1, 1, D, device=DEVICE)
        qkv[:, :, 2] = qkv[:, :, 2] * spread_D + torch.linspace(-50, 50, D, device=DEVICE)
        self.qkv_RL3HD = qkv.to(dtype)
        self.q_scale_H = randn(H).exp()
        angles_LD = randn(L, D // 2) * 3
        # part of a longer table, as the network hands it over
        table = torch.stack([angles_LD.cos(), angles_LD.sin()])
        self.rope_2LD = torch.cat([table, table], dim=1)[:, :L]

    def heads(self):
        return split_heads(self.qkv_RL3HD.flatten(2), self.q_scale_H, self.rope_2LD)


def some_ranges(x_RHLD, coding):
    """Scales and zero points that clamp a few values."""
    lowest, highest = (x * 0.9 for x in x_RHLD.float().transpose(0, 1).flatten(1, 2).aminmax(dim=1))
    if coding == "e4m3":
        scale_HD = torch.maximum(-lowest, highest).clamp_min(1e-3) / 448
        return scale_HD, torch.zeros_like(scale_HD, dtype=torch.int32)
    steps = 2 ** (8 if coding == "int8" else 4)
    scale_HD = ((highest - lowest) / steps).clamp_min(1e-3)
    return scale_HD, (-steps // 2 - lowest / scale_HD).round().int()


def reference_codes(x_RHLD, scale_HD, zero_point_HD, coding):
    scale, zero_point = scale_HD[:, None], zero_point_HD[:, None]
    if coding == "e4m3":
        return (x_RHLD.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    codes = quantize_affine(x_RHLD, scale, zero_point, nbits=8 if coding == "int8" else 4)
    return codes if coding == "int8" else join_nibbles(codes)


def codes_out(k_ranges, v_ranges, shape, coding):
    """Places inside longer caches, which start as 0."""
    R, H, L, D = shape
    width = D // 2 if coding == "int4" else D
    caches = torch.zeros(2, R, H, L + 5, width, device=DEVICE).to(CODE_DTYPES[coding])
    k_codes, v_codes = caches[:, :, :, 3 : 3 + L]
    return CodesOut(k_codes, v_codes, *k_ranges, *v_ranges), caches


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_q_and_k_are_the_networks(rng, shape, dtype):
    R, L, H, D = shape
    p = Problem(rng, *shape, dtype)
    room = torch.zeros(2, R, H, L + 4, D, dtype=dtype, device=DEVICE)
    k_out, v_out = room[:, :, :, 1 : L + 1]
    q = normalize_rotate(
        p.qkv_RL3HD, p.q_scale_H, p.rope_2LD, k_out_RHLD=k_out, v_out_RHLD=v_out, codes=None
    )
    wanted = p.heads()
    # at most the last place of the dtype, where sums in another order end beside a border
    tolerance = {"rtol": 2.01 * torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(q, wanted[0], **tolerance)
    torch.testing.assert_close(k_out, wanted[1], **tolerance)
    assert torch.equal(v_out, wanted[2])
    assert not room[:, :, :, :1].any() and not room[:, :, :, L + 1 :].any()
    assert q.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("coding", list(CODE_DTYPES))
@pytest.mark.parametrize("keeps_v", [False, True])
def test_codes_equal_the_references(rng, shape, coding, keeps_v):
    R, L, H, D = shape
    p = Problem(rng, *shape, torch.bfloat16)
    _, k, v = p.heads()
    out, caches = codes_out(some_ranges(k, coding), some_ranges(v, coding), k.shape, coding)
    k_out = torch.empty(R, H, L, D, dtype=torch.bfloat16, device=DEVICE)
    v_out = torch.empty_like(k_out) if keeps_v else None
    normalize_rotate(
        p.qkv_RL3HD, p.q_scale_H, p.rope_2LD, k_out_RHLD=k_out, v_out_RHLD=v_out, codes=out
    )
    wanted_k = reference_codes(k_out, out.k_scale_HD, out.k_zero_point_HD, coding)
    wanted_v = reference_codes(v, out.v_scale_HD, out.v_zero_point_HD, coding)
    assert torch.equal(out.k_codes.view(torch.uint8), wanted_k.view(torch.uint8))
    assert torch.equal(out.v_codes.view(torch.uint8), wanted_v.view(torch.uint8))
    rest = caches.view(torch.uint8)
    assert not rest[:, :, :, :3].any() and not rest[:, :, :, 3 + L :].any()
    assert v_out is None or torch.equal(v_out, v)


def test_some_heads_are_those_of_all(rng):
    p = Problem(rng, 2, 5, 4, 64, torch.bfloat16)
    k_out = torch.empty(2, 4, 5, 64, dtype=torch.bfloat16, device=DEVICE)
    found = []
    for heads in (slice(0, 3), slice(3, 4)):
        found.append(
            normalize_rotate(
                p.qkv_RL3HD[:, :, :, heads], p.q_scale_H[heads], p.rope_2LD,
                k_out_RHLD=k_out[:, heads], v_out_RHLD=None, codes=None,
            )
        )  # fmt: skip
    together = torch.empty_like(k_out)
    q = normalize_rotate(
        p.qkv_RL3HD, p.q_scale_H, p.rope_2LD, k_out_RHLD=together, v_out_RHLD=None, codes=None
    )
    assert torch.equal(torch.cat(found, dim=1), q)
    assert torch.equal(k_out, together)


def test_e4m3_rounds_as_torch_does_between_all_its_values():
    values = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (values[1:] + values[:-1]) / 2
    beside = [torch.nextafter(middles, torch.full_like(middles, to)) for to in (0.0, 1e3)]
    tried = torch.cat([values, middles, *beside, torch.tensor([449.0, 1e30])])
    tried = torch.cat([tried, -tried, torch.zeros(2)]).to(DEVICE)
    D = 64
    tried = torch.nn.functional.pad(tried, (0, -len(tried) % D)).view(1, -1, 1, D)
    L = tried.shape[1]
    qkv = torch.ones(1, L, 3, 1, D, device=DEVICE)
    qkv[:, :, 2] = tried
    ones, zeros = (
        torch.ones(1, D, device=DEVICE),
        torch.zeros(1, D, dtype=torch.int32, device=DEVICE),
    )
    out, _ = codes_out((ones, zeros), (ones, zeros), (1, 1, L, D), "e4m3")
    rope = torch.ones(2, L, D // 2, device=DEVICE)
    k_out = torch.empty(1, 1, L, D, device=DEVICE)
    normalize_rotate(qkv, ones[0, :1], rope, k_out_RHLD=k_out, v_out_RHLD=None, codes=out)
    wanted = tried.transpose(1, 2).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(out.v_codes.view(torch.uint8), wanted.view(torch.uint8))
