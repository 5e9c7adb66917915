"""Bits, codes and the residual pyramid against the recursion written out in 5-D, as published."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from var_compressor.models.bits import (
    Pyramid,
    bits_to_codes,
    latent_to_tokens,
    quantize_latent,
    teacher_inputs,
    vae_grid,
)
from var_compressor.models.schedule import Level, Schedule

CODE_DIM = 6


def random_latent(schedule: Schedule, *, patchify: bool) -> Tensor:
    grid = vae_grid(schedule.levels[-1], patchify=patchify)
    return torch.randn(2, CODE_DIM, *grid, generator=torch.Generator().manual_seed(0))


def published_quantizer(
    latent: Tensor, grids: list[tuple[int, int]]
) -> tuple[list[Tensor], Tensor]:
    """Residual quantization on [B, D, 1, Y, X]: unit-norm signs, trilinear back to the finest."""
    residual, total = latent[:, :, None], torch.zeros_like(latent[:, :, None])
    all_bits = []
    for grid in grids:
        averaged = F.interpolate(residual, size=(1, *grid), mode="area")
        bits = F.normalize(averaged, dim=1) > 0
        codes = (bits.float() * 2 - 1) / CODE_DIM**0.5
        codes = F.interpolate(codes, size=(1, *grids[-1]), mode="trilinear")
        residual, total = residual - codes, total + codes
        all_bits.append(bits[:, :, 0])
    return all_bits, total[:, :, 0]


@pytest.mark.parametrize("patchify", [False, True])
@pytest.mark.parametrize("aspect_ratio", [1.0, 0.5, 1.333])
def test_quantizer_equals_the_published_recursion(aspect_ratio: float, patchify: bool) -> None:
    schedule = Schedule.of(aspect_ratio, "0.06M")
    latent = random_latent(schedule, patchify=patchify)
    bits, quantized = quantize_latent(latent, schedule, patchify=patchify)
    grids = [vae_grid(level, patchify=patchify) for level in schedule.levels]
    wanted_bits, wanted = published_quantizer(latent, grids)
    for level, bits_BLQ, wanted_BDYX in zip(schedule.levels, bits, wanted_bits, strict=True):
        codes = bits_to_codes(bits_BLQ, level, patchify=patchify)
        assert torch.equal(codes > 0, wanted_BDYX)
    torch.testing.assert_close(quantized, wanted, atol=2e-6, rtol=0)


@pytest.mark.parametrize("patchify", [False, True])
def test_pyramid_of_the_bits_is_the_quantized_latent(patchify: bool) -> None:
    schedule = Schedule.of(1.5, "0.06M")
    latent = random_latent(schedule, patchify=patchify)
    bits, quantized = quantize_latent(latent, schedule, patchify=patchify)
    pyramid = Pyramid(
        schedule, code_dim=CODE_DIM, patchify=patchify, batch=2, device=torch.device("cpu")
    )
    for level, bits_BLQ in zip(schedule.levels, bits, strict=True):
        pyramid.add(bits_BLQ, level)
    torch.testing.assert_close(pyramid.latent_BDYX, quantized, atol=1e-6, rtol=0)


def test_patchified_token_channels_are_sub_positions() -> None:
    level = Level(0, 1, 1, 0, is_last=True)
    for k in range(CODE_DIM):
        for dy in range(2):
            for dx in range(2):
                bits = torch.zeros(1, 1, 4 * CODE_DIM, dtype=torch.uint8)
                bits[0, 0, 4 * k + 2 * dy + dx] = 1
                codes = bits_to_codes(bits, level, patchify=True)
                assert (codes > 0).nonzero().tolist() == [[0, k, dy, dx]]
                assert torch.equal(latent_to_tokens(codes, patchify=True) > 0, bits > 0)


def test_flips_reach_later_levels_but_not_the_targets_of_their_own() -> None:
    schedule = Schedule.of(1.0, "0.06M")
    latent = random_latent(schedule, patchify=False)
    plain, _ = quantize_latent(latent, schedule, patchify=False)

    def flip_level_1(bits_BLQ: Tensor, level: Level) -> Tensor:
        return 1 - bits_BLQ if level.index == 1 else bits_BLQ

    flipped, quantized = quantize_latent(latent, schedule, patchify=False, flip=flip_level_1)
    assert torch.equal(flipped[0], plain[0]) and torch.equal(flipped[1], plain[1])
    assert not torch.equal(flipped[2], plain[2])
    kept = [1 - bits if i == 1 else bits for i, bits in enumerate(flipped)]
    pyramid = Pyramid(
        schedule, code_dim=CODE_DIM, patchify=False, batch=2, device=torch.device("cpu")
    )
    teacher_inputs(kept, pyramid)
    pyramid.add(kept[-1], schedule.levels[-1])
    torch.testing.assert_close(pyramid.latent_BDYX, quantized, atol=1e-6, rtol=0)
