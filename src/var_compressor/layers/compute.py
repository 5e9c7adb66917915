"""How a 4-bit weight is multiplied on the machine at hand: which path, and why.

An artifact stores 4-bit weights once; the path is chosen per number of tokens.

    w4a4    4-bit inputs, exact integers: what calibration measured
    w4a8    8-bit inputs per token: e4m3 where the GPU has it, else int8; closer to full precision
    w4a16   16-bit inputs, weights unpacked in registers: few tokens, bound by weight bytes
    bf16    16-bit inputs, weights unpacked to a scratch, the library's product: runs anywhere
    reference   plain torch, for formats and devices without kernels
"""

from __future__ import annotations

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
    """Chooses a path from what was asked and the GPU: its capability and number of processors."""

    asked: str
    capability: tuple[int, int]
    num_processors: int

    def __post_init__(self) -> None:
        if self.asked not in COMPUTE:
            raise ValueError(f"compute is {self.asked!r}; use one of {', '.join(COMPUTE)}")

    @property
    def has_fp8(self) -> bool:
        return self.capability >= FP8_FROM

    def choose(self, num_tokens: int) -> Choice:
        """The path of a linear for as many tokens; deterministic."""
        if self.asked != "auto":
            return Choice(self.asked, "asked for")
        major, minor = self.capability
        if num_tokens <= FEW_TOKENS:
            return Choice("w4a16", f"at most {FEW_TOKENS} tokens: bound by weight bytes")
        if not self.has_fp8:
            return Choice("w4a4", f"sm_{major}{minor} has integer tensor cores, and no fp8")
        return Choice("w4a8", f"sm_{major}{minor} has fp8 tensor cores")


# where the paths cross on an H100 (benchmarks/results/ops-h100-2026-11-24.json)
FEW_TOKENS = 64
