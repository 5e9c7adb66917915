"""A profile's linears, one by one, and which of them are the worst."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One linear of a profile."""

    block: int
    name: str
    report: Mapping[str, Any]
    effect: Mapping[str, Any] | None

    @property
    def full_name(self) -> str:
        return f"blocks.{self.block}.{self.name}"

    @property
    def input(self) -> Mapping[str, Any]:
        return self.report["input"]["all"]

    @property
    def output(self) -> Mapping[str, Any]:
        return self.report["output"]

    @property
    def ratio(self) -> float:
        """Largest over median magnitude of the input; infinite where that is no number."""
        found = self.input["max_median_ratio"]
        return math.inf if found is None else found


def rows_of(profile: Mapping[str, Any], *, only_rounded: bool = False) -> list[Row]:
    """Every linear, in order, or those that the recipe rounds."""
    effects = (profile["sensitivity"] or {"layers": {}})["layers"]
    return [
        Row(index, name, report, effects.get(f"blocks.{index}.{name}"))
        for index, block in enumerate(profile["blocks"])
        for name, report in block["linears"].items()
        if report["output"] is not None or not only_rounded
    ]


def worst_first(profile: Mapping[str, Any]) -> list[Row]:
    """Linears by what rounding them does: to the bits, then to the hidden state, where that was
    measured; otherwise to their own output, or by their outliers if the recipe rounds none.
    """

    def badness(row: Row) -> tuple[float, ...]:
        if row.effect is not None:
            return (row.effect["kl_nats"] or 0.0, -row.effect["stream_snr_db"])
        return (0.0, -row.output["plain"])

    rounded = rows_of(profile, only_rounded=True)
    if not rounded:
        return sorted(rows_of(profile), key=lambda row: -row.ratio)
    return sorted(rounded, key=badness, reverse=True)
