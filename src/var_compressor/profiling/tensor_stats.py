"""All statistics of one activation tensor, gathered part by part and level by level.

What comes out has the keys of the diagnostics of Henvezz95/VAR-Compressor, and some more.
Shapes: M tokens of a part, K channels, G groups of channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from var_compressor.profiling.moments import Magnitudes, Moments, merged

# elements that are worked on at a time: float64 scratch of four times 128 MiB
_CHUNK = 2**24
_EPSILON = 1e-6
# channels that share a scale in most 4-bit formats
GROUP = 64


class PartStats:
    """Statistics of tokens [M, K], as many as were added: per channel, per token, and of all."""

    def __init__(self) -> None:
        self._channels: Moments | None = None
        self._token_ranges: Moments | None = None
        self._magnitudes: Magnitudes | None = None
        self._lowest_K: Tensor | None = None
        self._highest_K: Tensor | None = None

    def add(self, x_MK: Tensor) -> None:
        """More tokens with the same channels, of the same dtype."""
        for part_MK in x_MK.split(max(1, _CHUNK // x_MK.shape[1])):
            self._add_chunk(part_MK)

    def _add_chunk(self, x_MK: Tensor) -> None:
        channels = Moments.of(x_MK)
        lowest_K, highest_K = (x.float() for x in x_MK.aminmax(dim=0))
        lowest_M, highest_M = (x.double() for x in x_MK.aminmax(dim=1))
        ranges = Moments.of((highest_M - lowest_M).unsqueeze(1))
        if self._channels is None:
            self._channels, self._token_ranges = channels, ranges
            self._lowest_K, self._highest_K = lowest_K, highest_K
            self._magnitudes = Magnitudes(x_MK.dtype, x_MK.device)
        else:
            assert self._token_ranges is not None
            self._channels = self._channels.merged(channels)
            self._token_ranges = self._token_ranges.merged(ranges)
            self._lowest_K = torch.minimum(self.lowest_K, lowest_K)
            self._highest_K = torch.maximum(self.highest_K, highest_K)
        self.magnitudes.add(x_MK)

    @property
    def channels(self) -> Moments:
        assert self._channels is not None, "nothing was added"
        return self._channels

    @property
    def token_ranges(self) -> Moments:
        assert self._token_ranges is not None, "nothing was added"
        return self._token_ranges

    @property
    def magnitudes(self) -> Magnitudes:
        assert self._magnitudes is not None, "nothing was added"
        return self._magnitudes

    @property
    def lowest_K(self) -> Tensor:
        assert self._lowest_K is not None, "nothing was added"
        return self._lowest_K

    @property
    def highest_K(self) -> Tensor:
        assert self._highest_K is not None, "nothing was added"
        return self._highest_K

    @staticmethod
    def merged(parts: list[PartStats]) -> PartStats:
        whole = PartStats()
        whole._channels = merged([part.channels for part in parts])
        whole._token_ranges = merged([part.token_ranges for part in parts])
        whole._lowest_K = torch.stack([part.lowest_K for part in parts]).amin(0)
        whole._highest_K = torch.stack([part.highest_K for part in parts]).amax(0)
        whole._magnitudes = parts[0].magnitudes
        for part in parts[1:]:
            whole._magnitudes = whole._magnitudes.merged(part.magnitudes)
        return whole

    def summary(self) -> dict[str, Any]:
        """Every statistic as a number or, where there is none, null.

        ``kurtosis`` (excess), ``mean`` and ``std`` of all elements; ``max``, ``median`` and
        ``p999`` (99.9 % lie below) of magnitudes; ``skewness`` mean and ``max_skew`` largest of the
        channels' absolute skewness, constant channels left out; ``cv_channel`` how unlike the
        channels' ranges are, standard deviation over mean, ``cv_token`` the same of the tokens;
        ``ideal_zero_point`` of 8 bits, mean distance from 0 in steps; ``group_ratio`` largest over
        median channel of the worst group of 64 neighbours.
        """
        channels, ranges = self.channels.to("cpu"), self.token_ranges.to("cpu")
        lowest_K, highest_K = (x.cpu().double() for x in (self.lowest_K, self.highest_K))
        everything = channels.pooled()
        largest = torch.maximum(-lowest_K, highest_K)
        # the histogram counts a NaN as the largest magnitude there is
        is_finite = bool(largest.isfinite().all())
        median, p999 = self.magnitudes.quantiles((0.5, 0.999)) if is_finite else (math.nan,) * 2
        skew = _channel_skewness(channels, lowest_K, highest_K).abs()
        skew = skew[~skew.isnan()]
        maximum = largest.max().item()
        cv_channel = _variation(Moments.of((highest_K - lowest_K).unsqueeze(1)))
        cv_token = _variation(ranges)
        numbers = {
            "kurtosis": everything.kurtosis.item(),
            "max": maximum,
            "max_median_ratio": maximum / (median + _EPSILON),
            "cv_channel": cv_channel,
            "cv_token": cv_token,
            "skewness": skew.mean().item(),
            "max_skew": skew.max().item() if len(skew) else math.nan,
            "ideal_zero_point": _ideal_zero_point(lowest_K, highest_K),
            "global_min": lowest_K.min().item(),
            "global_max": highest_K.max().item(),
            "mean": everything.mean.item(),
            "std": everything.std.item(),
            "median": median,
            "p999": p999,
            "group_ratio": group_ratio(largest),
        }
        return {
            **{key: value if math.isfinite(value) else None for key, value in numbers.items()},
            "dominance": "Channel" if cv_channel > cv_token else "Token",
            "num_tokens": channels.count,
            "num_channels": len(lowest_K),
            "num_constant_channels": int((lowest_K == highest_K).sum()),
            "is_finite": is_finite,
        }

    def channel_profile(self) -> dict[str, Tensor]:
        """float32 ``[K]``: lowest, highest, mean, std, skewness (NaN for constant channels)."""
        channels = self.channels.to("cpu")
        lowest_K, highest_K = self.lowest_K.cpu(), self.highest_K.cpu()
        return {
            "lowest": lowest_K,
            "highest": highest_K,
            "mean": channels.mean.float(),
            "std": channels.std.float(),
            "skewness": _channel_skewness(channels, lowest_K, highest_K).float(),
        }


def group_ratio(absmax_K: Tensor) -> float:
    """Largest over median channel of each group that shares a scale: the worst of the groups."""
    groups_GE = absmax_K.unflatten(0, (-1, math.gcd(len(absmax_K), GROUP)))
    ratio_G = groups_GE.amax(1) / (groups_GE.median(1).values + _EPSILON)
    return ratio_G.max().item()


def _channel_skewness(channels: Moments, lowest_K: Tensor, highest_K: Tensor) -> Tensor:
    return torch.where(lowest_K == highest_K, math.nan, channels.skewness)


def _variation(ranges: Moments) -> float:
    return (ranges.sample_std / (ranges.mean + _EPSILON)).item()


def _ideal_zero_point(lowest_K: Tensor, highest_K: Tensor) -> float:
    step_K = (highest_K - lowest_K) / (255 + _EPSILON)
    zero_point_K = torch.where(step_K > 1e-9, -128 - lowest_K / step_K, 0.0)
    return zero_point_K.abs().mean().item()
