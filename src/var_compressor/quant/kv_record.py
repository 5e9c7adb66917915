"""What is kept of one layer's attention while recordings go through it: a bounded sample.

Shapes: R guidance rows, P rows kept whole, H heads, L tokens of all levels, T sampled tokens, N
sampled queries of a level, D head channels, S levels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from var_compressor.models.schedule import Level, Schedule
from var_compressor.quant.calibration import CalibrationTrace, TokenSample

# queries of a level that tell what attention reads
_QUERIES = 64
# tokens of rows kept whole: both guidance rows of an image of 1024x1024
_PROBE_TOKENS = 21_042


@dataclass(frozen=True)
class Probe:
    """Rows of one layer kept whole: sampled queries of every level, all keys and values, float32.

    ``q_PHND[s]`` queries of level s; ``k_PHLD``, ``v_PHLD`` all tokens, also of the last level.
    """

    q_PHND: tuple[Tensor, ...]
    k_PHLD: Tensor
    v_PHLD: Tensor


@dataclass(frozen=True)
class LayerRecord:
    """One layer's sample.

    ``k_HTD``, ``v_HTD`` float32: as many tokens of each cached level as its size allows, of all
    recordings and rows. ``weight_HT``: the probability that queries of later levels give to the
    token, times the tokens it stands for: how much its error counts. ``mass_HS``: what they give to
    level s, averaged over all levels but the first.
    """

    k_HTD: Tensor
    v_HTD: Tensor
    weight_HT: Tensor
    mass_HS: Tensor
    probe: Probe


@dataclass(frozen=True)
class RecordPlan:
    """Which tokens and queries are kept; the same for every layer."""

    schedule: Schedule
    tokens: tuple[Tensor, ...]  # of every recording, int64, ascending, cached ones only
    queries: tuple[Tensor, ...]  # of every level, within the level
    stands_for_L: Tensor  # tokens of a level over sampled ones, float32

    @staticmethod
    def of(
        trace: CalibrationTrace, *, max_tokens_per_level: int, seed: int, device: torch.device
    ) -> RecordPlan:
        schedule = trace.schedule
        sample = TokenSample.of(trace, max_tokens_per_level=max_tokens_per_level, seed=seed)
        cached = [tokens[tokens < schedule.num_cached_tokens] for tokens in sample.tokens]
        share = max(1, max_tokens_per_level // (sample.num_rows * len(sample.tokens)))
        generator = torch.Generator().manual_seed(seed)
        queries = [
            torch.randperm(level.num_tokens, generator=generator)[:_QUERIES]
            for level in schedule.levels
        ]
        stands_for = [
            torch.full((level.num_tokens,), max(1.0, level.num_tokens / share))
            for level in schedule.levels
        ]
        return RecordPlan(
            schedule,
            tuple(tokens.to(device) for tokens in cached),
            tuple(positions.to(device) for positions in queries),
            torch.cat(stands_for).to(device),
        )


@dataclass
class LayerRecorder:
    """Watches one layer: recording after recording, level after level, coarse to fine."""

    plan: RecordPlan
    parts: dict[str, list[Tensor]] = field(
        default_factory=lambda: {name: [] for name in ("k", "v", "weight", "mass")}
    )
    probes: list[Probe] = field(default_factory=list)

    def observe(self, level: Level, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor) -> None:
        if level.index == 0:
            self._begin(k_RHND)
        now = slice(level.offset, level.end)
        self.k_RHLD[:, :, now], self.v_RHLD[:, :, now] = k_RHND, v_RHND
        q_RHND = q_RHND[:, :, self.plan.queries[level.index]].float()
        self.queries.append(q_RHND)
        if level.index > 0:
            probs_RHNL = (q_RHND @ self.k_RHLD[:, :, : level.end].mT).softmax(-1)
            self.mass_RHL[..., : level.offset] += probs_RHNL[..., : level.offset].mean(2)
        if level.is_last:
            self._finish()

    def record(self) -> LayerRecord:
        """All that was seen; call it after the last recording."""
        k, v, weight = (torch.cat(self.parts[name], dim=1) for name in ("k", "v", "weight"))
        queries = zip(*(probe.q_PHND for probe in self.probes), strict=True)
        probe = Probe(
            tuple(torch.cat(level) for level in queries),
            torch.cat([probe.k_PHLD for probe in self.probes]),
            torch.cat([probe.v_PHLD for probe in self.probes]),
        )
        mass_HS = torch.stack(self.parts["mass"]).mean(0)
        return LayerRecord(k, v, weight, mass_HS, probe)

    def _begin(self, k_RHND: Tensor) -> None:
        R, H, _, D = k_RHND.shape
        shape = (R, H, self.plan.schedule.num_tokens, D)
        self.k_RHLD, self.v_RHLD = (
            torch.empty(shape, dtype=torch.float32, device=k_RHND.device) for _ in range(2)
        )
        self.mass_RHL = self.k_RHLD.new_zeros(shape[:3])
        self.queries: list[Tensor] = []

    def _finish(self) -> None:
        schedule = self.plan.schedule
        tokens_T = self.plan.tokens[len(self.parts["k"])]
        weight_RHT = (self.mass_RHL * self.plan.stands_for_L)[:, :, tokens_T]
        self.parts["k"].append(_rows_joined(self.k_RHLD[:, :, tokens_T]))
        self.parts["v"].append(_rows_joined(self.v_RHLD[:, :, tokens_T]))
        self.parts["weight"].append(_rows_joined(weight_RHT))
        sizes = [level.num_tokens for level in schedule.levels]
        mass_SH = torch.stack([part.sum(-1).mean(0) for part in self.mass_RHL.split(sizes, dim=2)])
        self.parts["mass"].append(mass_SH.T / (len(sizes) - 1))
        kept = sum(len(probe.k_PHLD) for probe in self.probes) * schedule.num_tokens
        rows = max((_PROBE_TOKENS - kept) // schedule.num_tokens, 0 if self.probes else 1)
        if rows > 0:
            queries = tuple(q_RHND[:rows] for q_RHND in self.queries)
            self.probes.append(Probe(queries, self.k_RHLD[:rows], self.v_RHLD[:rows]))


def _rows_joined(x_RHT: Tensor) -> Tensor:
    """[R, H, T, ...] to [H, R * T, ...]."""
    return x_RHT.transpose(0, 1).flatten(1, 2)
