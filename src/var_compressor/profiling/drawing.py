"""How pictures are drawn: once, as PNG for files and as SVG for the page.

An SVG takes text and lines in the colour of the page around it, so that it is read on light, dark
and paper alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# what an SVG's text, lines and grid are drawn in, and replaced by the page's own
INK, _GRID = "#101214", "#c8ccd0"


@contextmanager
def style() -> Iterator[None]:
    import matplotlib

    settings: dict[Any, Any] = {
        **{"font.size": 10, "axes.titlesize": 10.5, "axes.labelsize": 10, "svg.fonttype": "none"},
        **{"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False},
        **{"axes.grid": True, "grid.color": _GRID, "grid.linewidth": 0.6, "axes.axisbelow": True},
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), INK),
        **dict.fromkeys(("xtick.color", "ytick.color"), INK),
        **{"lines.linewidth": 1.4, "lines.markersize": 4.5, "svg.hashsalt": "profile"},
    }
    with matplotlib.rc_context(settings):
        yield


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def to_png(figure: Figure) -> bytes:
    png = BytesIO()
    figure.savefig(png, format="png", facecolor="white")
    # the layout is found; finding it again takes as long as all the rest
    figure.set_layout_engine("none")
    return png.getvalue()


def to_svg(figure: Figure) -> str:
    """Without the XML prologue and fixed size, in the page's own ink."""
    svg = BytesIO()
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", svg.getvalue().decode(), flags=re.DOTALL)
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace(INK, "currentColor").replace(_GRID, "var(--grid)")


def log_scale(axes: Axes) -> None:
    """Decades, and 2 and 5 between them, in plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def blocks_below(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
