"""Logits to bits: guidance scales and temperatures per level, top-k/top-p, reproducible noise.

Shapes: B images, L tokens of a level, Q bits per token.
Source: Infinity's bitwise sampling; the noise reproduces ``torch.multinomial`` on a CPU generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from var_compressor.models.schedule import Level, Schedule
from var_compressor.models.transformer import Guidance


@dataclass(frozen=True)
class Sampling:
    """How bits are drawn.

    ``cfg`` and ``tau`` are one value for all levels, or one per level. ``top_k`` 1 is greedy, 0
    (or >= 2, a bit has two values) keeps both; ``top_p`` 0 keeps both, otherwise the less likely
    value is dropped when its probability is <= 1 - top_p. ``cfg_layers``: where guidance acts, 0
    on the logits, -k after the k-th block from the end. ``num_levels`` stops early.
    """

    cfg: float | tuple[float, ...] = 3.0
    tau: float | tuple[float, ...] = 0.5
    top_k: int = 0
    top_p: float = 0.97
    cfg_layers: tuple[int, ...] = (0,)
    num_levels: int | None = None

    def guidance(self, schedule: Schedule, depth: int) -> Guidance:
        """Raises: ValueError for a layer that does not exist."""
        for layer in self.cfg_layers:
            if layer > 0 or depth + layer <= 0:
                raise ValueError(
                    f"cfg_layers holds {layer}; use 0 (logits) or -1 … -{depth - 1} (blocks)"
                )
        return Guidance(_per_level("cfg", self.cfg, schedule), self.cfg_layers)

    def temperatures(self, schedule: Schedule) -> tuple[float, ...]:
        taus = _per_level("tau", self.tau, schedule)
        if min(taus) <= 0:
            raise ValueError(f"tau must be > 0, got {min(taus)}; for greedy bits use top_k=1")
        return taus

    def levels(self, schedule: Schedule) -> tuple[Level, ...]:
        if self.num_levels is None:
            return schedule.levels
        if not 1 <= self.num_levels <= len(schedule.levels):
            raise ValueError(
                f"num_levels is {self.num_levels}, this schedule has {len(schedule.levels)}"
            )
        return schedule.levels[: self.num_levels]

    def allowed(self, logits_BLQ2: Tensor) -> Tensor:
        """Logits with the excluded bit values at -inf.

        Raises: ValueError for a top_p outside [0, 1] or a negative top_k.
        """
        if not 0 <= self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                f"top_p {self.top_p} must lie in [0, 1] and top_k {self.top_k} be >= 0"
            )
        if self.top_k == 1:
            smaller = logits_BLQ2 < logits_BLQ2.amax(-1, keepdim=True)
            logits_BLQ2 = logits_BLQ2.masked_fill(smaller, -torch.inf)
        if self.top_p > 0:
            zero_BLQ, one_BLQ = logits_BLQ2.unbind(-1)
            # of two equal values the first counts as the smaller
            is_smaller = torch.stack([zero_BLQ <= one_BLQ, one_BLQ < zero_BLQ], dim=-1)
            unlikely = is_smaller & (logits_BLQ2.softmax(-1) <= 1 - self.top_p)
            logits_BLQ2 = logits_BLQ2.masked_fill(unlikely, -torch.inf)
        return logits_BLQ2


def _per_level(name: str, value: float | Sequence[float], schedule: Schedule) -> tuple[float, ...]:
    num_levels = len(schedule.levels)
    if isinstance(value, (int, float)):
        value = (value,) * num_levels
    if bad := [one for one in value if not math.isfinite(one)]:
        raise ValueError(f"{name} must be finite, got {bad[0]}")
    if len(value) < num_levels:
        raise ValueError(f"{name} has {len(value)} values, the schedule has {num_levels} levels")
    return tuple(map(float, value))


def seeded_generators(seed: int | Sequence[int], batch: int) -> list[torch.Generator]:
    """One CPU generator per image; a single seed counts up: image i gets ``seed + i``.

    An image depends on its own seed only, never on its batch-mates or the device.
    """
    seeds = [seed + i for i in range(batch)] if isinstance(seed, int) else list(seed)
    if len(seeds) != batch:
        raise ValueError(f"{len(seeds)} seeds for {batch} prompts; give one seed, or one each")
    return [torch.Generator().manual_seed(int(one)) for one in seeds]


def draw_noise(
    generators: Sequence[torch.Generator], level: Level, num_bits: int, device: torch.device
) -> Tensor:
    """Exp(1) variates of one level, float32 ``[B, L, Q, 2]``: drawn on the CPU, for ``device``.

    The host draws while a GPU still computes: nothing here waits for it.
    """
    shape = (len(generators), level.num_tokens, num_bits, 2)
    on_gpu = device.type == "cuda"
    noise_BLQ2 = torch.empty(shape, pin_memory=on_gpu)
    for one_LQ2, rng in zip(noise_BLQ2, generators, strict=True):
        one_LQ2.exponential_(generator=rng)
    return noise_BLQ2.to(device, non_blocking=on_gpu)


def sample_bits(logits_BLQ2: Tensor, noise_BLQ2: Tensor, sampling: Sampling) -> Tensor:
    """One draw per bit by the exponential race: uint8 ``[B, L, Q]``."""
    probabilities = sampling.allowed(logits_BLQ2).softmax(-1)
    return (probabilities / noise_BLQ2).argmax(-1).to(torch.uint8)
