"""How far a compressed model is from full precision, teacher-forced and image by image.

Teacher-forced: both models get the full-precision model's bits of all levels before, so one level's
differences do not add up. Shapes: B images, L tokens of a level, Q bits per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from var_compressor.models.transformer import TextFeatures
from var_compressor.pipeline import InfinityPipeline


@dataclass(frozen=True)
class BitAgreement:
    """Per level: the share of bits whose likelier value is the same, and the mean KL divergence.

    ``kl_nats`` is KL(full || compressed) per bit at temperature 1.
    """

    same_bit: tuple[float, ...]
    kl_nats: tuple[float, ...]
    num_bits: tuple[int, ...]

    @property
    def mean_same_bit(self) -> float:
        """Over all bits of all levels."""
        total = sum(self.num_bits)
        return sum(s * n for s, n in zip(self.same_bit, self.num_bits, strict=True)) / total

    @property
    def mean_kl_nats(self) -> float:
        total = sum(self.num_bits)
        return sum(k * n for k, n in zip(self.kl_nats, self.num_bits, strict=True)) / total


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
    where = {"aspect_ratio": aspect_ratio, "pixel_budget": pixel_budget}
    wanted = full.teacher_logits(text, bits, cfg=cfg, **where)  # type: ignore[arg-type]
    found = compressed.teacher_logits(text, bits, cfg=cfg, **where)  # type: ignore[arg-type]
    same, kl, counts = [], [], []
    for wanted_BLQ2, found_BLQ2 in zip(wanted, found, strict=True):
        same.append((wanted_BLQ2.argmax(-1) == found_BLQ2.argmax(-1)).double().mean().item())
        log_p, log_q = wanted_BLQ2.double().log_softmax(-1), found_BLQ2.double().log_softmax(-1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1).mean().item())
        counts.append(wanted_BLQ2[..., 0].numel())
    return BitAgreement(tuple(same), tuple(kl), tuple(counts))


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


def psnr_db(image_B3YX: Tensor, reference_B3YX: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of every image against its reference, both in [-1, 1]."""
    mse_B = ((image_B3YX - reference_B3YX) / 2).square().mean((1, 2, 3))
    return -10 * torch.log10(mse_B.clamp_min(1e-10))


def ssim(image_B3YX: Tensor, reference_B3YX: Tensor) -> Tensor | None:
    """Structural similarity of every image by torchmetrics; None where it is not installed."""
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError:
        return None
    values = structural_similarity_index_measure(
        (image_B3YX + 1) / 2, (reference_B3YX + 1) / 2, data_range=1.0, reduction="none"
    )
    assert isinstance(values, Tensor)
    return values
