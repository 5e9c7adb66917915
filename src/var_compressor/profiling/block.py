"""One block while all recordings go through it: what its linears and its cache hold.

Shapes: R guidance rows, H heads, L tokens, D head channels, S sampled tokens of a row, K channels,
T sampled tokens of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from var_compressor.models.schedule import Level, Schedule
from var_compressor.models.transformer import Block
from var_compressor.pipeline import InfinityPipeline
from var_compressor.profiling.rounding import (
    DEFAULT_RANK,
    OutputNoise,
    output_report,
    robust_variation,
    rounding_snr,
    weight_report,
)
from var_compressor.profiling.tensor_stats import PartStats
from var_compressor.quant.calibration import (
    BlockStream,
    CalibrationTrace,
    TokenSample,
    one_layer_cache,
)
from var_compressor.spec import MODULES, LinearSpec

CACHES = ("k", "v")
# reads the text, which has no levels
TEXT = "cross_attn.kv"


@dataclass(frozen=True)
class Sampled:
    """Which tokens are kept for what needs values: ``tokens[i]`` of recording i, for every row.

    ``weight_S`` float64: how many tokens a kept one stands for.
    """

    schedule: Schedule
    tokens: tuple[Tensor, ...]
    weight_S: Tensor
    max_text_tokens: int

    @staticmethod
    def of(
        trace: CalibrationTrace, *, max_tokens_per_level: int, seed: int, device: torch.device
    ) -> Sampled:
        sample = TokenSample.of(trace, max_tokens_per_level=max_tokens_per_level, seed=seed)
        ends = torch.tensor([level.end for level in trace.schedule.levels])
        sizes = torch.tensor([level.num_tokens for level in trace.schedule.levels])
        level_S = torch.bucketize(sample.tokens[0], ends, right=True)
        weight_S = (sizes / level_S.bincount(minlength=len(sizes)))[level_S]
        share = max(1, max_tokens_per_level // (sample.num_rows * len(sample.tokens)))
        tokens = tuple(one.to(device) for one in sample.tokens)
        return Sampled(trace.schedule, tokens, weight_S.double().to(device), share)


@dataclass
class Seen:
    """Statistics of one tensor by level (one entry for text), and its sampled tokens."""

    levels: list[PartStats]
    samples: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def sample(self) -> tuple[Tensor, Tensor]:
        """x_TK in its own dtype, weight_T."""
        return torch.cat(self.samples), torch.cat(self.weights)


class BlockObserver:
    """Watches one block: recording after recording, level after level."""

    def __init__(self, sampled: Sampled) -> None:
        self.sampled, self.schedule = sampled, sampled.schedule
        num_levels = len(self.schedule.levels)
        self.seen = {
            name: Seen([PartStats() for _ in range(1 if name == TEXT else num_levels)])
            for name in (*MODULES, *CACHES)
        }
        self.recording = 0

    def observe_input(self, i: int, name: str, x_RLK: Tensor) -> None:
        self.recording = i
        if name == TEXT:
            self._observe_text(x_RLK)
            return
        for level in self.schedule.levels:
            part_RLK = x_RLK[:, level.offset : level.end]
            self.seen[name].levels[level.index].add(part_RLK.flatten(0, 1))
        self._keep(name, x_RLK[:, self.sampled.tokens[i]], self.sampled.weight_S)

    def observe_cache(self, level: Level, q: Tensor, k_RHLD: Tensor, v_RHLD: Tensor) -> None:
        tokens_S = self.sampled.tokens[self.recording]
        here_S = (tokens_S >= level.offset) & (tokens_S < level.end)
        for name, x_RHLD in zip(CACHES, (k_RHLD, v_RHLD), strict=True):
            x_RLK = x_RHLD.transpose(1, 2).flatten(2)
            self.seen[name].levels[level.index].add(x_RLK.flatten(0, 1))
            if not level.is_last:
                kept = tokens_S[here_S] - level.offset
                self._keep(name, x_RLK[:, kept], self.sampled.weight_S[here_S])

    def _observe_text(self, x_RTK: Tensor) -> None:
        self.seen[TEXT].levels[0].add(x_RTK.flatten(0, 1))
        num_tokens = x_RTK.shape[1]
        kept = min(num_tokens, self.sampled.max_text_tokens)
        positions = torch.arange(kept, device=x_RTK.device) * num_tokens // kept
        weight = self.sampled.weight_S.new_full((kept,), num_tokens / kept)
        self._keep(TEXT, x_RTK[:, positions], weight)

    def _keep(self, name: str, x_RSK: Tensor, weight_S: Tensor) -> None:
        self.seen[name].samples.append(x_RSK.flatten(0, 1))
        self.seen[name].weights.append(weight_S.repeat(len(x_RSK)))


def observe_block(
    pipeline: InfinityPipeline, stream: BlockStream, block: Block, sampled: Sampled
) -> BlockObserver:
    """Send all recordings through a block, and look on."""
    observer = BlockObserver(sampled)
    schedule = sampled.schedule
    new_cache = one_layer_cache(pipeline, schedule, observe=observer.observe_cache)
    stream.run(block, new_cache, schedule.levels, observe=observer.observe_input, names=MODULES)
    return observer


# --- what is said of it ---------------------------------------------------------------------------


def block_report(
    block: Block, observer: BlockObserver, specs: dict[str, LinearSpec], seed: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Channel profiles by name, and the report: {"linears": {name: …}, "cache": {"k": …, "v": …}}.

    ``specs`` of the linears that the recipe quantizes; of others no output error is told.
    """
    profiles: dict[str, Tensor] = {}
    linears, caches = {}, {}
    for name in MODULES:
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        seen = observer.seen.pop(name)
        whole = PartStats.merged(seen.levels)
        linears[name] = _linear_report(linear, seen, whole, specs.get(name), seed)
        profiles |= {f"{name}.{key}": x for key, x in whole.channel_profile().items()}
    for name in CACHES:
        seen = observer.seen.pop(name)
        # the last level is never stored
        whole = PartStats.merged(seen.levels[:-1] or seen.levels)
        caches[name] = _tensor_report(seen, whole)
        profiles |= {f"{name}.{key}": x for key, x in whole.channel_profile().items()}
    return profiles, {"linears": linears, "cache": caches}


def _tensor_report(seen: Seen, whole: PartStats) -> dict[str, Any]:
    x_TK, weight_T = seen.sample()
    return {
        "all": {**whole.summary(), **robust_variation(x_TK, weight_T)},
        "levels": [level.summary() for level in seen.levels],
        "snr_db": rounding_snr(x_TK, weight_T, whole.lowest_K, whole.highest_K),
        "num_sampled_tokens": len(x_TK),
    }


def _linear_report(
    linear: nn.Linear, seen: Seen, whole: PartStats, spec: LinearSpec | None, seed: int
) -> dict[str, Any]:
    x_TK, weight_T = seen.sample()
    output, factors_K, rank = None, torch.ones_like(whole.lowest_K), DEFAULT_RANK
    if spec is not None:
        low, high = whole.lowest_K + spec.shift, whole.highest_K + spec.shift
        absmax_K = torch.maximum(low.abs(), high.abs())
        noise = OutputNoise(linear, x_TK, weight_T, absmax_K, spec)
        output, factors_K = output_report(noise, seed)
        rank = spec.low_rank.rank or rank
    return {
        "input": _tensor_report(seen, whole),
        "weight": weight_report(linear.weight, factors_K, rank, seed),
        "output": output,
    }


def channel_names(profile: Sequence[str]) -> list[str]:
    """Tensors that a file of channel profiles tells of."""
    return sorted({name.rpartition(".")[0] for name in profile})
