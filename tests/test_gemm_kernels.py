"""GEMM kernels against the reference ops, at one token, odd and real shapes; integers exactly."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels import DEVICE, HALF, IS_INTERPRETED, assert_rounded

pytest.importorskip("triton")

from interpreter import true_bf16  # noqa: F401
from var_compressor.ops import primitives, reference
from var_compressor.ops.gemm import (
    Tiles,
    expand_codes,
    gemm_groups,
    gemm_rows,
    gemm_w4a16,
    merge_weight,
)
from var_compressor.ops.packing import from_tile_order, pack_int4, to_tile_order, unpack_int4
from var_compressor.ops.primitives import FORMATS

TILES = Tiles(m=32, n=32, k=128, num_warps=4, num_stages=2)
SHAPES = [(1, 64, 32, 0), (3, 192, 48, 4), (67, 320, 100, 32)]
GROUP = 64


@pytest.fixture
def rng():
    return torch.Generator(DEVICE).manual_seed(3)


class Problem:
    """A linear and inputs whose codes use the whole range; low and up hold only bf16 values."""

    def __init__(self, rng, M, K, N, rank, *, lowest=-7, highest=7):
        def randn(*shape):
            return torch.randn(*shape, generator=rng, device=DEVICE)

        def integers(low, high, *shape):
            return torch.randint(low, high + 1, shape, generator=rng, device=DEVICE)

        G = K // GROUP
        self.codes_MK = integers(lowest, highest, M, K).to(torch.int8)
        self.xscales_MG = randn(M, G).abs() + 0.1
        self.wcodes_NK = integers(-7, 7, N, K).to(torch.int8)
        self.qweight = pack_int4(self.wcodes_NK)
        self.tiled = to_tile_order(self.qweight, group_size=GROUP)
        self.wscales_NG = (randn(N, G).abs() + 0.1).bfloat16()
        self.low_MR = randn(M, rank).bfloat16()
        self.up_NR = randn(N, rank).bfloat16()
        self.bias_N = randn(N)

    @property
    def branch(self):
        has_rank = self.low_MR.shape[1] > 0
        return (self.low_MR if has_rank else None, self.up_NR if has_rank else None, self.bias_N)

    def weight_NK(self):
        return primitives.dequantize_symmetric(
            self.wcodes_NK, self.wscales_NG.float(), format=FORMATS["sint4"]
        )

    def wscales_GN(self):
        return self.wscales_NG.T.contiguous()

    def reference(self, xscales_MG):
        return reference.gemm_w4a4(
            self.codes_MK, xscales_MG, self.qweight, self.wscales_NG, self.low_MR, self.up_NR,
            self.bias_N,
        )  # fmt: skip


def test_tile_order_keeps_every_code(rng):
    packed = torch.randint(0, 256, (5, 96), generator=rng, device=DEVICE, dtype=torch.uint8)
    tiled = to_tile_order(packed, group_size=64)
    assert torch.equal(from_tile_order(tiled, group_size=64), packed)
    first = unpack_int4(packed)[:, :64]
    signed = tiled.view(torch.int8)[:, :32]
    assert torch.equal((signed << 4) >> 4, first[:, :32])
    assert torch.equal(signed >> 4, first[:, 32:])


@pytest.mark.parametrize(("M", "K", "N", "rank"), SHAPES)
@pytest.mark.parametrize("bounds", [(-7, 7), (0, 15)])
@pytest.mark.parametrize("as_fp8", [False, True])
def test_w4a4_equals_the_reference(rng, M, K, N, rank, bounds, as_fp8):
    p = Problem(rng, M, K, N, rank, lowest=bounds[0], highest=bounds[1])
    codes, weight = p.codes_MK, p.tiled
    if as_fp8:
        codes = codes.to(torch.float8_e4m3fn)
        scratch = torch.empty(N, K, dtype=torch.float8_e4m3fn, device=DEVICE)
        weight = expand_codes(p.tiled, group_size=GROUP, out_NK=scratch)
        assert torch.equal(weight.float(), p.wcodes_NK.float())
    y_MN = gemm_groups(
        codes, p.xscales_MG.T.contiguous(), weight, p.wscales_GN(), *p.branch,
        tiles=TILES, dtype=torch.float32,
    )  # fmt: skip
    torch.testing.assert_close(y_MN, p.reference(p.xscales_MG), rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize(("M", "K", "N", "rank"), SHAPES)
def test_w4a8_with_a_scale_per_token_equals_the_reference(rng, M, K, N, rank):
    p = Problem(rng, M, K, N, rank, lowest=-127, highest=127)
    xscales_M1 = p.xscales_MG[:, :1].contiguous()
    y_MN = gemm_groups(
        p.codes_MK, xscales_M1.T.contiguous(), p.tiled, p.wscales_GN(), *p.branch,
        tiles=TILES, dtype=torch.float32,
    )  # fmt: skip
    torch.testing.assert_close(y_MN, p.reference(xscales_M1), rtol=2e-5, atol=4e-3)


@pytest.mark.parametrize(("M", "K", "N", "rank"), SHAPES)
@pytest.mark.parametrize("splits", [1, 3])
def test_rows_of_e4m3_equal_float64(rng, M, K, N, rank, splits):
    p = Problem(rng, M, K, N, rank)
    codes_MK, weight_NK = (x.to(torch.float8_e4m3fn) for x in (p.codes_MK, p.wcodes_NK))
    xscales_M, wscales_N = p.xscales_MG[:, 0].contiguous(), p.wscales_NG[:, 0].float().contiguous()
    tiles = replace(TILES, splits=splits)
    y_MN = gemm_rows(
        codes_MK, xscales_M, weight_NK, wscales_N, p.bias_N, tiles=tiles, dtype=torch.float32
    )
    wanted_MN = (codes_MK.double() @ weight_NK.double().T) * xscales_M[:, None].double()
    wanted_MN = wanted_MN * wscales_N.double() + p.bias_N.double()
    torch.testing.assert_close(y_MN.double(), wanted_MN, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("rank", [0, 4, 32])
def test_the_whole_weight_in_16_bits(rng, rank):
    p = Problem(rng, 1, 640, 72, rank)
    down_RK = torch.randn(rank, 640, generator=rng, device=DEVICE).bfloat16()
    wanted_NK = p.weight_NK() + p.up_NR.float() @ down_RK.float()
    found_NK = merge_weight(
        p.tiled, p.wscales_GN(), down_RK if rank else None, p.up_NR if rank else None, None,
        out_NK=torch.empty(72, 640, dtype=HALF, device=DEVICE),
    )  # fmt: skip
    assert_rounded(found_NK, wanted_NK, off_by_one=2e-2)


@pytest.mark.parametrize("rank", [0, 4, 32])
def test_the_whole_weight_in_e4m3(rng, rank):
    p = Problem(rng, 1, 640, 72, rank)
    down_RK = torch.randn(rank, 640, generator=rng, device=DEVICE).bfloat16()
    exact_NK = p.weight_NK() + p.up_NR.float() @ down_RK.float()
    row_scales_N = exact_NK.abs().amax(1) / 448
    found_NK = merge_weight(
        p.tiled, p.wscales_GN(), down_RK if rank else None, p.up_NR if rank else None, row_scales_N,
        out_NK=torch.empty(72, 640, dtype=torch.float8_e4m3fn, device=DEVICE),
    )  # fmt: skip
    exact_NK = exact_NK / row_scales_N[:, None]
    # half a unit of e4m3, and what the branch loses in bf16; twice that where both are truncated
    sloppy = 2 if IS_INTERPRETED else 1
    terms_NK = (p.up_NR.float().abs() @ down_RK.float().abs()) / row_scales_N[:, None]
    rounding_NK = exact_NK.abs().clamp_min(2.0**-6) * 2.0**-4
    bound_NK = sloppy * (1.01 * rounding_NK + 2.0**-8 * terms_NK) + 2.0**-10 * 448
    found_NK = found_NK.float()
    close = (found_NK - exact_NK).abs() <= bound_NK
    if IS_INTERPRETED:
        # it loses the carry on the way up to a power of two
        halved = found_NK.abs().frexp().mantissa == 0.5
        close |= halved & ((2 * found_NK - exact_NK).abs() <= bound_NK)
    assert close.all()


@pytest.mark.parametrize(("M", "K", "N", "rank"), SHAPES)
@pytest.mark.parametrize("splits", [1, 3])
def test_w4a16_equals_float64(rng, M, K, N, rank, splits):
    p = Problem(rng, M, K, N, rank)
    x_MK = torch.randn(M, K, generator=rng, device=DEVICE).to(HALF)
    tiles = replace(TILES, splits=splits)
    y_MN = gemm_w4a16(x_MK, p.tiled, p.wscales_GN(), *p.branch, tiles=tiles, dtype=torch.float32)
    wanted_MN = x_MK.double() @ p.weight_NK().double().T
    wanted_MN = wanted_MN + p.low_MR.double() @ p.up_NR.double().T + p.bias_N.double()
    torch.testing.assert_close(y_MN.double(), wanted_MN, rtol=1e-5, atol=2e-3)


def test_kernels_of_linears_compile_for_ampere_and_hopper():
    # another process, because this one may have made them to be interpreted
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
