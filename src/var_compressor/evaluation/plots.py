"""Plots of compared results as PNG: quality over cost, and values with intervals line by line.

Every point has a colour and a marker of its own kind, so that no plot is read by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

from var_compressor.evaluation.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# hues that every kind of colour vision tells apart (Okabe and Ito), and shapes
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
MISSING = "pip install 'var-compressor[plots]' draws plots"
_BAND = "#BBBBBB"
_PANEL_COLUMNS = 4


@dataclass(frozen=True)
class Style:
    """How one thing is drawn in all panels; ``label`` stands in the legend."""

    label: str
    color: str
    marker: str


@dataclass(frozen=True)
class Panel:
    """One quantity of several things, by their names; ``title`` tells the unit, and which way is
    better. ``band`` is a range drawn behind, such as the noise floor.
    """

    title: str
    values: Mapping[str, Estimate]
    band: tuple[float, float] | None = None


def styles_of(names: Sequence[str]) -> dict[str, Style]:
    """A colour and a marker for each; the pairs repeat after 70."""
    return {
        name: Style(name, COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)])
        for i, name in enumerate(names)
    }


def can_draw() -> bool:
    """Whether matplotlib is there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def quality_over_cost(
    cost: Mapping[str, float], cost_label: str, panels: Sequence[Panel], styles: Mapping[str, Style]
) -> bytes:
    """A panel per quantity over the cost of each thing, such as bytes; intervals as bars."""
    from matplotlib.figure import Figure

    num_columns = min(_PANEL_COLUMNS, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    legend_rows = math.ceil(len(styles) / (2 * num_columns))
    height = 2.9 * num_rows + 0.25 * legend_rows + 0.3
    figure = Figure(figsize=(3.4 * num_columns + 0.3, height), dpi=100, layout="constrained")
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        for name, found in panel.values.items():
            style = styles[name]
            axes.errorbar(
                [cost[name]],
                [found.value],
                yerr=_bars(found),
                color=style.color,
                marker=style.marker,
                markersize=6,
                capsize=2,
                linestyle="",
                label=style.label,
            )
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel(cost_label)
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    _add_legend(figure, styles, num_columns=2 * num_columns)
    return _png(figure)


def _add_legend(figure: Figure, styles: Mapping[str, Style], *, num_columns: int) -> None:
    """One line per label, whichever panels it is in."""
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        found, names = axes.get_legend_handles_labels()
        handles.update(zip(names, found, strict=True))
    labels = [
        label for label in dict.fromkeys(s.label for s in styles.values()) if label in handles
    ]
    figure.legend(
        [handles[label] for label in labels],
        labels,
        loc="outside lower center",
        ncols=num_columns,
        fontsize=8,
    )


def line_by_line(
    names: Sequence[str], panels: Sequence[Panel], styles: Mapping[str, Style]
) -> bytes:
    """Names from top to bottom, a panel per quantity, each value as a point with its interval."""
    from matplotlib.figure import Figure

    num_columns = min(_PANEL_COLUMNS, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    size = (2.4 + 2.6 * num_columns, num_rows * (0.6 + 0.22 * len(names)))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    grid = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False)
    place = {name: i for i, name in enumerate(names)}
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw_lines(axes, panel, place, styles)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes in grid[:, 0]:
        axes.set_yticks(range(len(names)), names, fontsize=9)
        axes.set_ylim(len(names) - 0.5, -0.5)
    return _png(figure)


def _draw_lines(
    axes: Axes, panel: Panel, place: Mapping[str, int], styles: Mapping[str, Style]
) -> None:
    if panel.band is not None:
        axes.axvspan(*panel.band, color=_BAND, alpha=0.5, linewidth=0)
    for name, found in panel.values.items():
        style = styles[name]
        axes.errorbar(
            [found.value],
            [place[name]],
            xerr=_bars(found),
            color=style.color,
            marker=style.marker,
            markersize=5,
            capsize=2,
            linestyle="",
        )
    axes.set_title(panel.title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.tick_params(axis="x", labelsize=8)


def _bars(found: Estimate) -> list[list[float]]:
    """Lengths below and above the value, which a skewed interval may leave outside."""
    return [[max(0.0, found.value - found.low)], [max(0.0, found.high - found.value)]]


def _png(figure: Figure) -> bytes:
    """In 256 colours: a third of the bytes, and no difference to be seen."""
    from PIL import Image

    drawn, buffer = BytesIO(), BytesIO()
    figure.savefig(drawn, format="png")
    image = Image.open(drawn).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
