"""How a 4-bit weight is multiplied on the machine at hand: which path, and why.

An artifact stores 4-bit weights once; the path is chosen per number of tokens and shape of linear.

    w4a4    4-bit inputs, exact integers: what calibration measured
    w4a8    8-bit inputs per token: e4m3 where the GPU has it, else int8; closer to full precision
    w4a16   16-bit inputs, weights unpacked in registers: few tokens, bound by weight bytes
    bf16    16-bit inputs, weights unpacked to a scratch, the library's product: runs anywhere
    reference   plain torch, for formats and devices without kernels
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PATHS = ("w4a4", "w4a8", "w4a16", "bf16")
COMPUTE = ("auto", *PATHS)
FP8_FROM = (8, 9)


@dataclass(frozen=True)
class Choice:
    """A path, and the reason in words."""

    path: str
    why: str


@dataclass(frozen=True)
class Policy:
    """Chooses a path from what was asked, the GPU, and what was measured on it.

    ``capability`` and ``num_processors`` are the GPU's. ``milliseconds`` of
    ``(tokens, N, K, path)``, if someone measured; empty takes the static table.
    """

    asked: str
    capability: tuple[int, int]
    num_processors: int
    milliseconds: Mapping[tuple[int, int, int, str], float]

    def __post_init__(self) -> None:
        if self.asked not in COMPUTE:
            raise ValueError(f"compute is {self.asked!r}; use one of {', '.join(COMPUTE)}")

    @property
    def has_fp8(self) -> bool:
        return self.capability >= FP8_FROM

    def choose(self, num_tokens: int, N: int, K: int) -> Choice:
        """The path of a linear of ``[N, K]`` for ``num_tokens`` tokens; deterministic."""
        if self.asked != "auto":
            return Choice(self.asked, "asked for")
        measured = {
            path: ms
            for (tokens, *shape, path), ms in self.milliseconds.items()
            if shape == [N, K] and tokens == self._nearest(num_tokens, N, K)
        }
        if measured:
            best = min(measured, key=lambda path: (measured[path], path))
            others = ", ".join(f"{p} {ms:.3f}" for p, ms in sorted(measured.items()) if p != best)
            return Choice(best, f"{measured[best]:.3f} ms measured here ({others})")
        return self._from_table(num_tokens)

    def _nearest(self, num_tokens: int, N: int, K: int) -> int:
        """The measured count of tokens that is nearest as a ratio."""
        counts = {tokens for tokens, n, k, _ in self.milliseconds if (n, k) == (N, K)}
        return min(
            sorted(counts),
            key=lambda count: max(count, num_tokens) / min(count, num_tokens),
            default=0,
        )

    def _from_table(self, num_tokens: int) -> Choice:
        major, minor = self.capability
        if num_tokens <= FEW_TOKENS:
            return Choice("w4a16", f"at most {FEW_TOKENS} tokens: bound by weight bytes")
        if not self.has_fp8:
            return Choice("w4a4", f"sm_{major}{minor} has integer tensor cores, and no fp8")
        return Choice("w4a8", f"sm_{major}{minor} has fp8 tensor cores")


# where the paths cross on an H100 (benchmarks/results/ops-h100-2026-11-24.json)
FEW_TOKENS = 64
