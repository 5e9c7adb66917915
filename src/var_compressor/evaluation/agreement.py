"""How far a compressed model is from full precision, teacher-forced, drawing freely, and image by
image.

Teacher-forced: both models get the full-precision model's bits of all levels before, so one level's
differences do not add up, and no chance of sampling comes in. Drawing freely with the same seed,
they do add up: the level where the first bit differs, and the latents' distance from there on.

Shapes: B images, S levels, L tokens of a level, Q bits per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp

import torch
from torch import Tensor

from var_compressor.models.agreement import BitAgreement, compare_logits
from var_compressor.models.bits import Pyramid
from var_compressor.models.transformer import TextFeatures
from var_compressor.pipeline import InfinityPipeline

# SSIM's window, in pixels, and the constants that keep its quotients finite, of values 0 to 1
SSIM_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


def bit_agreement(
    full: InfinityPipeline,
    compressed: InfinityPipeline,
    text: TextFeatures,
    bits: Sequence[Tensor],
    *,
    cfg: float,
    aspect_ratio: float = 1.0,
    pixel_budget: str | None = None,
) -> BitAgreement:
    """Compare both models on the given bits of every level; guidance on if cfg is not 1."""
    wanted, found = (
        one.teacher_logits(
            text, bits, cfg=cfg, aspect_ratio=aspect_ratio, pixel_budget=pixel_budget
        )
        for one in (full, compressed)
    )
    return compare_logits(wanted, found).pooled()


def pooled(parts: Sequence[BitAgreement]) -> BitAgreement:
    """Of several batches of one schedule: per level, the mean over the bits of all of them."""
    num_bits = torch.tensor([part.num_bits for part in parts], dtype=torch.float64)
    shares = num_bits / num_bits.sum(0)
    same_bit, kl_nats = (
        (torch.tensor(rows, dtype=torch.float64) * shares).sum(0).tolist()
        for rows in ([part.same_bit for part in parts], [part.kl_nats for part in parts])
    )
    total_bits = [int(count) for count in num_bits.sum(0)]
    return BitAgreement(tuple(same_bit), tuple(kl_nats), tuple(total_bits))


def first_divergence(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> Tensor:
    """The first level at which any bit of two drawings differs, int64 ``[B]``; S where none does.

    Both as `Trace.bits`, uint8 ``[B, L, Q]`` per level, drawn freely with the same seeds.
    """
    equal_BS = torch.stack(
        [(a == b).flatten(1).all(1) for a, b in zip(wanted, found, strict=True)], dim=1
    )
    return equal_BS.long().cumprod(1).sum(1)


def latent_errors(
    wanted: Sequence[Tensor], found: Sequence[Tensor], pyramids: tuple[Pyramid, Pyramid]
) -> Tensor:
    """How far apart the latents of two drawings are after each level, float64 ``[B, S]``: the norm
    of the difference over the norm of the first one's. ``pyramids`` are empty ones.
    """
    first, second = pyramids
    errors = []
    for level, wanted_BLQ, found_BLQ in zip(first.schedule.levels, wanted, found, strict=True):
        first.add(wanted_BLQ, level)
        second.add(found_BLQ, level)
        a_BN, b_BN = (one.latent_BDYX.double().flatten(1) for one in (first, second))
        errors.append((b_BN - a_BN).norm(dim=1) / a_BN.norm(dim=1))
    return torch.stack(errors, dim=1).cpu()


def psnr_db(image_B3YX: Tensor, reference_B3YX: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of every image against its reference, both in [-1, 1]."""
    mse_B = ((image_B3YX - reference_B3YX) / 2).square().mean((1, 2, 3))
    return -10 * torch.log10(mse_B.clamp_min(1e-10))


def ssim(image_B3YX: Tensor, reference_B3YX: Tensor) -> Tensor:
    """Structural similarity of every image with its reference, both in [-1, 1]: the mean over
    channels and over all places that have a whole window, as scikit-image takes it.

    Source: Z. Wang et al., "Image quality assessment: from error visibility to structural
    similarity", IEEE Transactions on Image Processing 13, 2004.
    """
    a, b = ((x.double() + 1) / 2 for x in (image_B3YX, reference_B3YX))
    mean_a, mean_b, square_a, square_b, product = map(_windowed, (a, b, a * a, b * b, a * b))
    covariance = product - mean_a * mean_b
    variances = square_a - mean_a.square() + square_b - mean_b.square()
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a.square() + mean_b.square() + _C1)
    return (luminance * (2 * covariance + _C2) / (variances + _C2)).mean((1, 2, 3))


def _windowed(x_B3YX: Tensor) -> Tensor:
    """Gaussian means around every place that has a whole window, by rows and then by columns."""
    weights = [exp(-0.5 * ((i - SSIM_WINDOW // 2) / _SIGMA) ** 2) for i in range(SSIM_WINDOW)]
    for dim in (2, 3):
        places = x_B3YX.shape[dim] - SSIM_WINDOW + 1
        total_B3YX = torch.zeros_like(x_B3YX.narrow(dim, 0, places))
        for i, weight in enumerate(weights):
            total_B3YX.add_(x_B3YX.narrow(dim, i, places), alpha=weight / sum(weights))
        x_B3YX = total_B3YX
    return x_B3YX
