"""How far two models' logits for the same bits are apart, level by level.

Shapes: B images, S levels, N images of several batches, L tokens of a level, Q bits per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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


@dataclass(frozen=True)
class ForcedRows:
    """`BitAgreement` image by image, float64; ``num_bits`` of one image per level."""

    same_bit_BS: Tensor
    kl_nats_BS: Tensor
    num_bits: tuple[int, ...]

    @property
    def weights_S(self) -> Tensor:
        """Each level's share of an image's bits."""
        counts_S = torch.tensor(self.num_bits, dtype=torch.float64)
        return counts_S / counts_S.sum()

    @property
    def same_bit_B(self) -> Tensor:
        """Of every image, over all its bits."""
        return self.same_bit_BS @ self.weights_S

    @property
    def kl_nats_B(self) -> Tensor:
        return self.kl_nats_BS @ self.weights_S

    def pooled(self) -> BitAgreement:
        """Over all images."""
        batch = len(self.same_bit_BS)
        same_S, kl_S = (x.mean(0).tolist() for x in (self.same_bit_BS, self.kl_nats_BS))
        return BitAgreement(tuple(same_S), tuple(kl_S), tuple(batch * n for n in self.num_bits))


def joined(parts: Sequence[ForcedRows]) -> ForcedRows:
    """The images of several batches of one schedule."""
    same_NS, kl_NS = (
        torch.cat(rows)
        for rows in ([part.same_bit_BS for part in parts], [part.kl_nats_BS for part in parts])
    )
    return ForcedRows(same_NS, kl_NS, parts[0].num_bits)


def compare_logits(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> ForcedRows:
    """Of two models' teacher-forced logits ``[B, L, Q, 2]`` per level, full precision's first."""
    same, kl, counts = [], [], []
    for wanted_BLQ2, found_BLQ2 in zip(wanted, found, strict=True):
        agrees = wanted_BLQ2.argmax(-1) == found_BLQ2.argmax(-1)
        same.append(agrees.double().flatten(1).mean(1))
        log_p, log_q = wanted_BLQ2.double().log_softmax(-1), found_BLQ2.double().log_softmax(-1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1).flatten(1).mean(1))
        counts.append(wanted_BLQ2[0, ..., 0].numel())
    return ForcedRows(torch.stack(same, 1).cpu(), torch.stack(kl, 1).cpu(), tuple(counts))
