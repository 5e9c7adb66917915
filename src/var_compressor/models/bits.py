"""Bits and latents: binary spherical codes, the residual pyramid, multi-scale quantization.

Shapes: B images, L tokens of a level, Q bits per token, D code channels, (Y, X) a VAE grid.
With ``patchify`` a token holds the codes of 2x2 VAE positions: token channel ``4*k + 2*dy + dx``
is code channel ``k`` at sub-position ``(dy, dx)``.

Everything here is float32; keep autocast away from the recursion.

Source: Infinity (arXiv 2412.04431) with binary spherical quantization (arXiv 2406.07548).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from var_compressor.models.schedule import Level, Schedule


def vae_grid(level: Level, *, patchify: bool) -> tuple[int, int]:
    """The VAE positions (height, width) that a level's tokens cover."""
    factor = 2 if patchify else 1
    return level.height * factor, level.width * factor


def bits_to_codes(bits_BLQ: Tensor, level: Level, *, patchify: bool) -> Tensor:
    """Bits 0/1 to codes -1/sqrt(D), +1/sqrt(D): float32 ``[B, D, Y, X]``."""
    signs_BQYX = (
        (bits_BLQ.float() * 2 - 1).transpose(1, 2).unflatten(2, (level.height, level.width))
    )
    if patchify:
        signs_BQYX = F.pixel_shuffle(signs_BQYX, 2)
    return signs_BQYX / signs_BQYX.shape[1] ** 0.5


def latent_to_tokens(latent_BDYX: Tensor, *, patchify: bool) -> Tensor:
    """Latent to what the transformer embeds: ``[B, L, Q]``."""
    if patchify:
        latent_BDYX = F.pixel_unshuffle(latent_BDYX, 2)
    return latent_BDYX.flatten(2).transpose(1, 2)


def resize(latent_BDYX: Tensor, size: tuple[int, int]) -> Tensor:
    if latent_BDYX.shape[-2:] == size:
        return latent_BDYX
    return F.interpolate(latent_BDYX, size=size, mode="bilinear", align_corners=False)


class Pyramid:
    """The latent as it accumulates: every level adds its codes on the finest grid."""

    def __init__(
        self, schedule: Schedule, *, code_dim: int, patchify: bool, batch: int, device: torch.device
    ) -> None:
        self.schedule = schedule
        self.patchify = patchify
        grid = vae_grid(schedule.levels[-1], patchify=patchify)
        self.latent_BDYX = torch.zeros(batch, code_dim, *grid, device=device)

    def add(self, bits_BLQ: Tensor, level: Level) -> None:
        codes = bits_to_codes(bits_BLQ, level, patchify=self.patchify)
        self.latent_BDYX = self.latent_BDYX + resize(codes, tuple(self.latent_BDYX.shape[-2:]))  # type: ignore[arg-type]

    def tokens_for(self, level: Level) -> Tensor:
        """Input tokens of ``level``, from everything added so far: ``[B, L, Q]``."""
        resized = resize(self.latent_BDYX, vae_grid(level, patchify=self.patchify))
        return latent_to_tokens(resized, patchify=self.patchify)


def teacher_inputs(bits: Sequence[Tensor], pyramid: Pyramid) -> Tensor:
    """Inputs of all levels after the first, given every level's bits: ``[B, L - 1, Q]``.

    No level reads the last level's bits; they may be left out.
    """
    tokens = []
    levels = pyramid.schedule.levels[:-1]
    for level, bits_BLQ in zip(levels, bits[: len(levels)], strict=True):
        pyramid.add(bits_BLQ, level)
        tokens.append(pyramid.tokens_for(pyramid.schedule.after(level)))
    return torch.cat(tokens, dim=1)


def quantize_latent(
    latent_BDYX: Tensor,
    schedule: Schedule,
    *,
    patchify: bool,
    flip: Callable[[Tensor, Level], Tensor] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Multi-scale residual quantization of an encoder's output.

    Each level takes the signs of what is left (area-averaged to its grid) and subtracts its codes.
    ``flip`` may change a level's bits before their codes are subtracted, so that later levels
    learn to correct them (bitwise self-correction); the returned bits are the unflipped targets.

    Returns: the bits of every level, uint8 ``[B, L, Q]``, and the quantized latent.
    """
    residual, quantized = latent_BDYX.float(), torch.zeros_like(latent_BDYX, dtype=torch.float32)
    finest = tuple(latent_BDYX.shape[-2:])
    all_bits = []
    for level in schedule.levels:
        grid = vae_grid(level, patchify=patchify)
        averaged = residual if grid == finest else F.interpolate(residual, grid, mode="area")
        bits_BLQ = (latent_to_tokens(averaged, patchify=patchify) > 0).to(torch.uint8)
        all_bits.append(bits_BLQ)
        kept_BLQ = bits_BLQ if flip is None else flip(bits_BLQ, level)
        codes = resize(bits_to_codes(kept_BLQ, level, patchify=patchify), finest)  # type: ignore[arg-type]
        residual, quantized = residual - codes, quantized + codes
    return all_bits, quantized
