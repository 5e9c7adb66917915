"""How a 4-bit weight is multiplied on the machine at hand: which path, and why.

An artifact stores 4-bit weights once; the path is chosen per number of tokens.

    w4a4    4-bit inputs, exact integers: what calibration measured
    w4a8    8-bit inputs per token: e4m3 where the GPU has it, else int8; closer to full precision
    w4a16   16-bit inputs, weights unpacked in registers: few tokens, bound by weight bytes
    w8a8    w4a8 in e4m3 with weights unpacked for good: a byte each, and faster
    bf16    16-bit inputs, weights unpacked to a scratch, the library's product: runs anywhere
    reference   plain torch, for formats and devices without kernels

(`nunchaku`, somebody else's kernels where they are installed, is no path of ours: see
`layers.nunchaku_linear`.)

`packed` takes the fastest of the first three: by what was measured on this GPU, where somebody
asked for that (`varc doctor --measure`), else by architecture. `auto` takes w8a8 where the GPU has
room for it, which is faster still, and else what `packed` takes.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from var_compressor.artifact import write_atomically

if TYPE_CHECKING:
    from var_compressor.ops.gemm import GPU

# those that `packed` takes, and the others
CANDIDATES = ("w4a16", "w4a8", "w4a4")
PATHS = (*CANDIDATES, "w8a8", "bf16")
COMPUTE = ("auto", "packed", *PATHS)
FP8_FROM = (8, 9)
# of a GPU's memory: unpacked weights that take no more leave the rest to caches and activations
ROOMY_SHARE = 1 / 4
# where the paths cross on an H100 (benchmarks/results/ops-h100-2026-11-24.json)
FEW_TOKENS = 64
# of an image, where no number is given
MANY_TOKENS = 2**30


@dataclass(frozen=True)
class Choice:
    """A path, and the reason in words."""

    path: str
    why: str


@dataclass(frozen=True)
class PathTable:
    """Milliseconds of each path, as measured on one GPU.

    ``measured[N, K]`` holds, by ascending number of tokens, ``{path: ms}``.
    """

    measured: dict[tuple[int, int], tuple[tuple[int, dict[str, float]], ...]]

    def choose(self, num_tokens: int, N: int, K: int) -> Choice | None:
        """The fastest path at the first measured number of tokens that is as large, or the last."""
        if (N, K) not in self.measured:
            return None
        entries = self.measured[N, K]
        tokens, ms = next((one for one in entries if one[0] >= num_tokens), entries[-1])
        path, second = sorted(ms, key=lambda one: ms[one])[:2]
        why = f"measured at {tokens} tokens: {ms[path]:.3f} ms, {second} {ms[second]:.3f} ms"
        return Choice(path, why)

    def to_dict(self) -> dict[str, Any]:
        return {
            f"{N}x{K}": [{"tokens": tokens, "ms": ms} for tokens, ms in entries]
            for (N, K), entries in self.measured.items()
        }

    @classmethod
    def from_dict(cls, found: Any, where: str) -> PathTable:
        """Raises: ValueError when it is no table."""
        try:
            measured = {
                tuple(int(size) for size in shape.split("x", 1)): tuple(
                    sorted((int(one["tokens"]), _times(one["ms"])) for one in entries)
                )
                for shape, entries in found.items()
            }
            assert all(len(shape) == 2 and entries for shape, entries in measured.items())
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(
                f"{where}: holds no table of measured paths; delete it, and run "
                "`varc doctor --measure` again"
            ) from None
        return cls(measured)  # type: ignore[arg-type]


def _times(ms: dict[str, float]) -> dict[str, float]:
    assert len(ms) >= 2 and ms.keys() <= set(CANDIDATES)
    return {path: float(value) for path, value in ms.items()}


@dataclass(frozen=True)
class Policy:
    """Chooses a path from what was asked and the GPU: its capability and number of processors.

    ``table``: what was measured; ``has_room``: whether the GPU has room for unpacked weights.
    """

    asked: str
    capability: tuple[int, int]
    num_processors: int
    table: PathTable | None = None
    has_room: bool = False

    def __post_init__(self) -> None:
        if self.asked not in COMPUTE:
            raise ValueError(f"compute is {self.asked!r}; use one of {', '.join(COMPUTE)}")

    @property
    def has_fp8(self) -> bool:
        return self.capability >= FP8_FROM

    @property
    def unpacks(self) -> bool:
        """Whether weights are unpacked for good."""
        return self.asked == "w8a8" or (self.asked == "auto" and self.has_room and self.has_fp8)

    @property
    def gpu(self) -> GPU:
        """As the kernels' settings want it."""
        from var_compressor.ops.gemm import GPU

        return GPU(self.capability, self.num_processors)

    def choose(self, image_tokens: int | None, N: int, K: int) -> Choice:
        """The path of an [N, K] weight for as many tokens of an image, None for many."""
        if self.asked not in ("auto", "packed"):
            return Choice(self.asked, "asked for")
        if self.unpacks:
            return Choice("w8a8", f"weights of a byte take at most {ROOMY_SHARE:.0%} of the memory")
        num_tokens = MANY_TOKENS if image_tokens is None else image_tokens
        if self.table is not None and (found := self.table.choose(num_tokens, N, K)):
            return found
        major, minor = self.capability
        if num_tokens <= FEW_TOKENS:
            return Choice("w4a16", f"at most {FEW_TOKENS} tokens: bound by weight bytes")
        if not self.has_fp8:
            return Choice("w4a4", f"sm_{major}{minor} has integer tensor cores, and no fp8")
        return Choice("w4a8", f"sm_{major}{minor} has fp8 tensor cores")


def has_room(unpacked_bytes: int, total_bytes: int) -> bool:
    """Whether a GPU of ``total_bytes`` has room for weights unpacked to a byte each."""
    return unpacked_bytes <= ROOMY_SHARE * total_bytes


# --- the table's file -----------------------------------------------------------------------------


def table_path(gpu_name: str) -> Path:
    """Where the table of a kind of GPU is kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-")
    return cache / "var-compressor" / f"paths-{name}.json"


def read_table(gpu_name: str, versions: dict[str, str]) -> PathTable | None:
    """What was measured on such a GPU with these versions of torch and triton; None if nothing.

    Raises: ValueError when the file is damaged.
    """
    path = table_path(gpu_name)
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); delete it") from None
    if not isinstance(found, dict) or found.get("versions") != versions:
        return None
    return PathTable.from_dict(found.get("shapes"), str(path))


def write_table(table: PathTable, gpu_name: str, versions: dict[str, str]) -> Path:
    """Keep a table, with what was measured before of other shapes."""
    path = table_path(gpu_name)
    before = read_table(gpu_name, versions)
    merged = PathTable({**(before.measured if before else {}), **table.measured})
    content = {"gpu": gpu_name, "versions": versions, "shapes": merged.to_dict()}
    write_atomically(path, json.dumps(content, indent=1).encode())
    return path


def table_versions() -> dict[str, str]:
    """What a measurement holds for."""
    import torch
    import triton

    from var_compressor import __version__

    return {"torch": torch.__version__, "triton": triton.__version__, "var-compressor": __version__}
