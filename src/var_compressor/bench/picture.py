"""`varc bench` as a picture: time by stage and memory by part, one bar per pipeline."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from var_compressor.artifact import write_atomically
from var_compressor.bench.session import Measured, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GIB = 2**30
_LEVELS_COLORS, _PARTS_COLORS = "viridis", "Set2"


def write_picture(result: Result, path: Path) -> bool:
    """Draw both as a PNG; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(12, 2.2 + 1.6 * len(result.measured)), dpi=100, layout="constrained")
    machine, height, width = result.machine["name"], *result.image_size
    batch = result.settings.batch
    figure.suptitle(
        f"{batch} × {height}×{width} on {machine}, median of {result.settings.num_runs}"
    )
    time_axes, memory_axes = figure.subplots(1, 2, width_ratios=(3, 2))
    names = [one.name for one in result.measured]
    stages = [stage_seconds(one) for one in result.measured]
    _stack(time_axes, names, stages, _LEVELS_COLORS)
    time_axes.set_xlabel("seconds, prompt to PNG")
    parts = [part_gib(one) for one in result.measured]
    _stack(memory_axes, names, parts, _PARTS_COLORS)
    memory_axes.set_xlabel("GiB at the peak of one run")
    png = BytesIO()
    figure.savefig(png, format="png")
    write_atomically(path, png.getvalue())
    return True


def stage_seconds(one: Measured) -> dict[str, float]:
    """Median of each stage."""
    levels = zip(*(run.level_s for run in one.runs), strict=True)
    return {
        "text": statistics.median(run.text_s for run in one.runs),
        **{f"level {index}": statistics.median(found) for index, found in enumerate(levels)},
        "VAE": statistics.median(run.vae_s for run in one.runs),
        "PNG": statistics.median(run.png_s for run in one.runs),
    }


def part_gib(one: Measured) -> dict[str, float]:
    """Weights, cache, and all else that was there at the peak."""
    rest = max(0, one.memory.peak - sum(one.memory.parts.values()))
    parts = {**one.memory.parts, "activations and the rest": rest}
    return {name: num_bytes / GIB for name, num_bytes in parts.items()}


def _stack(
    axes: Axes, names: Sequence[str], bars: Sequence[Mapping[str, float]], colors: str
) -> None:
    """A bar per pipeline, the first one on top; pieces in the order of the legend."""
    from matplotlib import colormaps

    palette = colormaps[colors].resampled(len(bars[0]))
    starts = [0.0] * len(bars)
    for index, piece in enumerate(bars[0]):
        lengths = [bar[piece] for bar in bars]
        axes.barh(names, lengths, left=starts, color=palette(index), label=piece)
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.25))
