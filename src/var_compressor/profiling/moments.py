"""Statistics that are gathered part by part: moments in float64, magnitudes in a histogram.

Shapes: M values of each channel in a part, K channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

# of a float32: the sign and these many low bits of the mantissa are dropped
_DROPPED_MANTISSA = 14
# relative; a bin of float32 magnitudes is at most 2^-9 of its lower edge wide. bfloat16: exact
MEDIAN_ERROR = {torch.float32: 2.0**-10, torch.bfloat16: 0.0}


@dataclass(frozen=True)
class Moments:
    """``count`` values per channel: float64 ``mean``, and sums of powers of the deviation from it.

    Parts are merged without going back to the values. Relative error of a standardized moment:
    some 2^-52 * |mean| / standard deviation, whatever the number of values.
    Source: Pebay 2008, Sandia report SAND2008-6212, for merging third and fourth moments.
    """

    count: int
    mean: Tensor
    m2: Tensor
    m3: Tensor
    m4: Tensor

    @staticmethod
    def of(x_MK: Tensor) -> Moments:
        """Over the first dimension; any float dtype."""
        x_MK = x_MK.double()
        mean = x_MK.mean(0)
        deviation = x_MK - mean
        square = deviation * deviation
        m2, m3 = square.sum(0), deviation.mul_(square).sum(0)
        return Moments(len(x_MK), mean, m2, m3, square.square_().sum(0))

    def merged(self, other: Moments) -> Moments:
        a, b = self.count, other.count
        n = a + b
        delta = other.mean - self.mean
        step = delta / n
        cross = delta * step * a * b
        m3 = cross * step * (a - b) + 3 * step * (a * other.m2 - b * self.m2)
        m4 = (
            cross * step * step * (a * a - a * b + b * b)
            + 6 * step * step * (a * a * other.m2 + b * b * self.m2)
            + 4 * step * (a * other.m3 - b * self.m3)
        )
        return Moments(
            n,
            self.mean + step * b,
            self.m2 + other.m2 + cross,
            self.m3 + other.m3 + m3,
            self.m4 + other.m4 + m4,
        )

    def pooled(self) -> Moments:
        """Of the values of all channels together, as one channel."""
        n, d = self.count, self.mean - self.mean.mean()
        return Moments(
            n * self.mean.numel(),
            self.mean.mean().unsqueeze(0),
            (self.m2 + n * d**2).sum().unsqueeze(0),
            (self.m3 + 3 * d * self.m2 + n * d**3).sum().unsqueeze(0),
            (self.m4 + 4 * d * self.m3 + 6 * d**2 * self.m2 + n * d**4).sum().unsqueeze(0),
        )

    def to(self, device: torch.device | str) -> Moments:
        parts = (part.to(device) for part in (self.mean, self.m2, self.m3, self.m4))
        return Moments(self.count, *parts)

    @property
    def std(self) -> Tensor:
        """Of the values there are (divided by their number)."""
        return (self.m2 / self.count).sqrt()

    @property
    def sample_std(self) -> Tensor:
        """Unbiased; NaN for a single value."""
        return (self.m2 / (self.count - 1 or float("nan"))).sqrt()

    @property
    def skewness(self) -> Tensor:
        """Fisher-Pearson, biased; NaN for a constant channel."""
        return (self.m3 / self.count) / (self.m2 / self.count) ** 1.5

    @property
    def kurtosis(self) -> Tensor:
        """Excess over a normal distribution's, biased; NaN for a constant channel."""
        return self.count * self.m4 / self.m2**2 - 3


class Magnitudes:
    """How often each magnitude occurred: ranks without keeping the values.

    Of bfloat16 values every magnitude has its own bin and ranks are exact; of others, taken as
    float32, a bin is its middle, off by at most ``MEDIAN_ERROR`` of the value.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        self.num_bins = 2**15 if dtype == torch.bfloat16 else 2 ** (31 - _DROPPED_MANTISSA)
        self.counts = torch.zeros(self.num_bins, dtype=torch.int64, device=device)

    def add(self, x: Tensor) -> None:
        if self.dtype == torch.bfloat16:
            places = x.contiguous().view(torch.int16).int() & 0x7FFF
        else:
            places = (x.float().contiguous().view(torch.int32) & 0x7FFFFFFF) >> _DROPPED_MANTISSA
        self.counts += torch.bincount(places.flatten(), minlength=self.num_bins)

    def merged(self, other: Magnitudes) -> Magnitudes:
        both = Magnitudes(self.dtype, self.counts.device)
        both.counts = self.counts + other.counts
        return both

    def quantiles(self, shares: tuple[float, ...]) -> list[float]:
        """Between the two nearest ranks in proportion, as numpy has it."""
        ends = self.counts.cpu().cumsum(0)
        total = int(ends[-1])
        found = []
        for share in shares:
            position = share * (total - 1)
            ranks = torch.tensor([int(position), min(int(position) + 1, total - 1)])
            low, high = self._values(torch.searchsorted(ends, ranks, right=True)).tolist()
            found.append(low + (high - low) * (position - int(position)))
        return found

    def _values(self, places: Tensor) -> Tensor:
        if self.dtype == torch.bfloat16:
            return places.short().view(torch.bfloat16).double()
        lower = (places << _DROPPED_MANTISSA).int().view(torch.float32).double()
        upper = ((places + 1) << _DROPPED_MANTISSA).int().view(torch.float32).double()
        return torch.where(places == 0, 0.0, (lower + upper) / 2)


def merged(parts: list[Moments]) -> Moments:
    return reduce(Moments.merged, parts)
