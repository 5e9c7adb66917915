"""A profile as pictures.

Kinds are told apart by hue, marker and line, with hues that every kind of colour vision separates
(Okabe and Ito).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from var_compressor.profiling.drawing import INK, blocks_below, log_scale, new_figure
from var_compressor.profiling.rows import Row, rows_of, worst_first
from var_compressor.spec import MODULES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Channels = Mapping[tuple[int, str], Mapping[str, Any]]  # (block, tensor) -> profiles, numpy [K]

_BLUE, _ORANGE, _GREEN, _PINK, _SKY, _RED = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7"),
    *("#56B4E9", "#D55E00"),
)
_MAP = "viridis"
_NO_VALUE = "#9a9fa5"
NUM_WORST = 10
# bars of a channel profile: more channels than that are joined, by their largest
_MAX_BARS = 256
_MAX_SKEW = 10

# kind -> (name on pictures, colour, marker, line)
KINDS: dict[str, tuple[str, str, str, str]] = {
    "self_attn.qkv": ("self-attention q, k, v", _BLUE, "o", "-"),
    "self_attn.proj": ("self-attention output", _BLUE, "s", "--"),
    "cross_attn.q": ("cross-attention q", _ORANGE, "o", "-"),
    "cross_attn.kv": ("cross-attention k, v (text)", _ORANGE, "^", ":"),
    "cross_attn.proj": ("cross-attention output", _ORANGE, "s", "--"),
    "ffn.fc1": ("feed-forward up", _GREEN, "o", "-"),
    "ffn.fc2": ("feed-forward down", _GREEN, "s", "--"),
    "k": ("cached K", _PINK, "o", "-"),
    "v": ("cached V", _PINK, "s", "--"),
}
_CACHES = ("k", "v")


# --- pictures -------------------------------------------------------------------------------------


def draw_outliers(profile: Mapping[str, Any]) -> Figure:
    """Outlier ratio and kurtosis of every kind of tensor, block by block."""
    figure = new_figure(11, 6.6)
    panels = figure.subplots(2, 1, sharex=True)
    for axes, key in zip(panels, ("max_median_ratio", "kurtosis"), strict=True):
        for name, (label, color, marker, line) in KINDS.items():
            values = [_number(_stats(block, name)[key]) for block in profile["blocks"]]
            axes.plot(values, color=color, marker=marker, linestyle=line, label=label)
        blocks_below(axes)
    log_scale(panels[0])
    panels[0].set_ylabel("largest / median magnitude")
    panels[1].set_yscale("symlog", linthresh=1)
    panels[1].set_ylim(bottom=min(-0.5, 1.3 * panels[1].dataLim.y0), top=1.5 * panels[1].dataLim.y1)
    panels[1].yaxis.set_major_formatter("{x:g}")
    panels[1].set_ylabel("excess kurtosis (normal: 0)")
    panels[1].set_xlabel("block")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def draw_levels(profile: Mapping[str, Any]) -> Figure:
    """Outlier ratio of every block and level, a map per kind."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    names = [name for name in KINDS if name != "cross_attn.kv"]
    grids = {name: _by_level(profile, name, "max_median_ratio") for name in names}
    known = [v for grid in grids.values() for row in grid for v in row if not math.isnan(v)]
    norm = LogNorm(min(known, default=1), max([*known, 10]))
    palette = colormaps[_MAP].with_extremes(bad=_NO_VALUE)
    depth, levels = len(profile["blocks"]), profile["levels"]
    figure = new_figure(11, min(12.0, 4.4 + 0.16 * depth))
    panels = figure.subplots(2, 4, sharex=True, sharey=True)
    for axes, (name, grid) in zip(panels.flat, grids.items(), strict=True):
        image = axes.imshow(
            grid, cmap=palette, norm=norm, aspect="auto", interpolation="nearest", origin="lower"
        )
        axes.set_title(KINDS[name][0])
        axes.grid(False)
    shown = range(0, len(levels), 1 if len(levels) <= 7 else 2)
    labels = [f"{levels[i]['height']}×{levels[i]['width']}" for i in shown]
    for axes in panels[-1]:
        axes.set_xticks(list(shown), labels, rotation=90)
        axes.set_xlabel("level, tokens")
    for axes in panels[:, 0]:
        axes.set_ylabel("block")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    colors = figure.colorbar(image, ax=panels, label="largest / median magnitude", pad=0.01)
    colors.ax.yaxis.set_major_formatter("{x:g}")
    return figure


def draw_cache(profile: Mapping[str, Any]) -> Figure:
    """Do channels or tokens of the cache differ more, and what rounding makes of it."""
    figure = new_figure(11, 6.4)
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    ways = (("channel", _BLUE, "o"), ("token", _ORANGE, "s"))
    for column, name in enumerate(_CACHES):
        caches = [block["cache"][name] for block in profile["blocks"]]
        spread, noise = panels[0][column], panels[1][column]
        for way, color, marker in ways:
            values = [_number(cache["all"][f"cv_{way}"]) for cache in caches]
            spread.plot(values, color=color, marker=marker, label=f"between {way}s")
            robust = [_number(cache["all"][f"cv_{way}_p98"]) for cache in caches]
            spread.plot(
                robust, color=color, linestyle=":", label=f"between {way}s, outer 2 % left out"
            )
        for way, color, marker in (*ways, ("group", _GREEN, "^")):
            values = [cache["snr_db"]["int4"][way]["asymmetric"] for cache in caches]
            label = {"group": "per token and 64 channels"}.get(way, f"per {way}")
            noise.plot(values, color=color, marker=marker, label=label)
        wins = sum(cache["all"]["dominance"] == "Channel" for cache in caches)
        where = f"in {wins} of {len(caches)} layers"
        spread.set_title(f"{KINDS[name][0]}: channels differ more {where}")
        noise.set_xlabel("block")
        for axes in (spread, noise):
            blocks_below(axes)
    panels[0][0].set_ylabel("CV of ranges\n(standard deviation / mean)")
    panels[1][0].set_ylabel("SNR in 4 bits, dB")
    panels[0][0].set_ylim(bottom=0)
    for row in panels:
        handles, labels = row[1].get_legend_handles_labels()
        row[1].legend(handles, labels, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def draw_skewness(profile: Mapping[str, Any], channels: Channels) -> Figure:
    """How lopsided channels are: of all blocks together, and block by block."""
    import numpy as np

    figure = new_figure(11, 6.2)
    panels = figure.subplots(2, 2, sharex="row", sharey="row")
    depth, bins = len(profile["blocks"]), np.linspace(-_MAX_SKEW, _MAX_SKEW, 101)
    for column, names in enumerate((_CACHES, ("ffn.fc2", "self_attn.qkv"))):
        top, below = panels[0][column], panels[1][column]
        for name in names:
            label, *_ = KINDS[name]
            color, hatch = (_BLUE, "") if name == names[0] else (_ORANGE, "//")
            found = [channels[index, name]["skewness"] for index in range(depth)]
            found = [values[~np.isnan(values)] for values in found]
            everything = np.concatenate(found)
            top.hist(
                np.clip(everything, -_MAX_SKEW, _MAX_SKEW), bins=bins, histtype="stepfilled",
                color=color, alpha=0.45, hatch=hatch, edgecolor=color, density=True, label=label,
            )  # fmt: skip
            quartiles = [np.percentile(abs(v), (25, 50, 75, 100)) if len(v) else [np.nan] * 4
                         for v in found]  # fmt: skip
            low, middle, high, largest = np.array(quartiles).T
            below.fill_between(range(depth), low, high, color=color, alpha=0.3, linewidth=0)
            below.plot(middle, color=color, marker="o", label=f"{label}: median, middle half")
            below.plot(largest, color=color, marker="^", linestyle=":", label=f"{label}: largest")
        top.set_xlabel(f"skewness of a channel over its tokens (beyond ±{_MAX_SKEW}: at the edges)")
        top.set_yscale("log")
        below.set_xlabel("block")
        log_scale(below)
        blocks_below(below)
        top.legend(loc="upper left", fontsize=9)
        below.legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    panels[0][0].set_ylabel("share of channels, density")
    panels[1][0].set_ylabel("absolute skewness")
    return figure


def draw_remedies(profile: Mapping[str, Any]) -> Figure | None:
    """Output SNR of every linear: rounded plainly, with smoothing, with a branch too."""
    rows = rows_of(profile, only_rounded=True)
    names = [name for name in MODULES if any(row.name == name for row in rows)]
    if not names:
        return None
    figure = new_figure(11, 5.4)
    panels = figure.subplots(2, 4, sharex=True, sharey=True)
    steps = (
        ("plain", "rounded to nearest", _RED, "o"),
        ("smoothed", "with smoothing", _SKY, "s"),
        ("branch", "with smoothing and branch", _BLUE, "^"),
    )
    for axes, name in zip(panels.flat, names, strict=False):
        here = [row for row in rows if row.name == name]
        for step, label, color, marker in steps:
            values = [row.output[step] for row in here]
            blocks = [row.block for row in here]
            axes.plot(blocks, values, color=color, marker=marker, label=label)
        axes.set_title(KINDS[name][0])
        blocks_below(axes)
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("block")
    for axes in panels.flat[len(names) :]:
        axes.axis("off")
    for axes in panels[:, 0]:
        axes.set_ylabel("output SNR, dB")
    panels.flat[-1].legend(*panels.flat[0].get_legend_handles_labels(), loc="center")
    return figure


def draw_formats(profile: Mapping[str, Any]) -> Figure:
    """What a format alone costs each kind of tensor, in its median block."""
    import numpy as np

    figure = new_figure(11, 5.2)
    panels = figure.subplots(1, 4, sharey=True)
    ways = (("group", _GREEN, "^"), ("token", _ORANGE, "s"), ("channel", _BLUE, "o"))
    tensors = {name: [_tensor(block, name) for block in profile["blocks"]] for name in KINDS}
    weights = {
        name: [block["linears"][name]["weight"] for block in profile["blocks"]] for name in MODULES
    }
    sides = (("inputs and cache", tensors), ("weights", weights))
    places = [(format, side) for format in ("int4", "int8") for side in sides]
    for axes, (format, (title, found)) in zip(panels, places, strict=True):
        for y, name in enumerate(KINDS):
            for way, color, marker in ways:
                values = [
                    [one["snr_db"][format][way][kind] for kind in ("symmetric", "asymmetric")]
                    for one in found.get(name, ())
                    if way in one["snr_db"][format]
                ]
                if not values:
                    continue
                plain, shifted = np.median(values, axis=0)
                offset = {"group": 0.2, "token": 0.0, "channel": -0.2}[way]
                axes.plot([plain, shifted], [y - offset] * 2, color=color, linewidth=1)
                axes.plot(plain, y - offset, color=color, marker=marker, markerfacecolor="none")
                axes.plot(shifted, y - offset, color=color, marker=marker)
        axes.set_title(f"{format[3:]} bits: {title}")
        axes.set_xlabel("SNR, dB")
    panels[0].set_yticks(range(len(KINDS)), [label for label, *_ in KINDS.values()])
    panels[0].invert_yaxis()
    _legend_of_ways(figure, ways)
    return figure


def draw_sensitivity(profile: Mapping[str, Any]) -> Figure | None:
    """What rounding one layer alone does: to the hidden state, and to the bits."""
    if profile["sensitivity"] is None:
        return None
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    layers, depth = profile["sensitivity"]["layers"], len(profile["blocks"])
    found = {name.split(".", 2)[2] for name in layers}
    names = [name for name in (*MODULES, "self_attn.kv") if name in found]
    labels = [KINDS[name][0] if name in KINDS else "KV cache" for name in names]

    def grid(value: Callable[[Mapping[str, Any]], float | None]) -> list[list[float]]:
        cells = [[layers.get(f"blocks.{i}.{name}") for i in range(depth)] for name in names]
        return [[math.nan if c is None else _number(value(c)) for c in row] for row in cells]

    maps: tuple[tuple[str, str, list[list[float]]], ...] = (
        (
            "hidden state behind the block",
            "error / hidden state, power",
            grid(lambda c: 10 ** (-c["stream_snr_db"] / 10)),
        ),
        (
            "bits, given all levels before",
            "KL divergence, nats a bit",
            grid(lambda c: c["kl_nats"]),
        ),
    )
    figure = new_figure(11, 1.6 + 0.3 * len(names))
    panels = figure.subplots(1, 2, sharey=True)
    palette = colormaps[_MAP].with_extremes(bad=_NO_VALUE)
    for axes, (title, unit, values) in zip(panels, maps, strict=True):
        known = [v for row in values for v in row if v > 0]
        # four decades: below, nothing matters
        top = max(known, default=1.0)
        norm = LogNorm(max(min(known, default=top / 10), top * 1e-4), top)
        image = axes.imshow(values, cmap=palette, norm=norm, aspect="auto", interpolation="nearest")
        figure.colorbar(image, ax=axes, label=unit)
        axes.set_title(title)
        axes.set_xlabel("block (grey: not measured)" if _has_gaps(values) else "block")
        axes.grid(False)
        blocks_below(axes)
    panels[0].set_yticks(range(len(names)), labels)
    return figure


def draw_worst(profile: Mapping[str, Any], channels: Channels) -> Figure:
    """The channels of the ten worst layers' inputs."""
    rows = worst_first(profile)[:NUM_WORST]
    num_rows = math.ceil(len(rows) / 2)
    figure = new_figure(11, 0.7 + 1.75 * num_rows)
    panels = figure.subplots(num_rows, 2, squeeze=False)
    for axes, row in zip(panels.flat, rows, strict=False):
        _draw_channels(axes, row, channels[row.block, row.name])
    for axes in panels.flat[len(rows) :]:
        axes.axis("off")
    for axes in panels[:, 0]:
        axes.set_ylabel("magnitude")
    for axes in panels[-1]:
        axes.set_xlabel("input channel")
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def _draw_channels(axes: Axes, row: Row, profile: Mapping[str, Any]) -> None:
    import numpy as np

    largest = np.maximum(np.abs(profile["lowest"]), np.abs(profile["highest"]))
    edges = np.unique(np.linspace(0, len(largest), min(_MAX_BARS, len(largest)) + 1).astype(int))
    bars, spread = (np.maximum.reduceat(x, edges[:-1]) for x in (largest, profile["std"]))
    axes.stairs(bars, edges, fill=True, color=_SKY, label="largest magnitude")
    axes.stairs(spread, edges, color=_RED, linewidth=1.0, label="standard deviation")
    axes.set_xlim(0, len(largest))
    axes.set_ylim(bottom=0)
    title = f"{row.full_name}: largest {row.ratio:.0f}× the median"
    axes.set_title(title, loc="left", fontsize=9.5)


# --- shared ---------------------------------------------------------------------------------------


def _legend_of_ways(figure: Figure, ways: Sequence[tuple[str, str, str]]) -> None:
    from matplotlib.lines import Line2D

    names = {"group": "range per 64 channels", "token": "per token or output channel"}
    handles = [
        Line2D([], [], color=color, marker=marker, label=names.get(way, "per input channel"))
        for way, color, marker in ways
    ]
    for label, face in (("symmetric", "none"), ("with zero point", INK)):
        handles.append(
            Line2D([], [], color=INK, marker="o", linestyle="", markerfacecolor=face, label=label)
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=5)


def _tensor(block: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return block["cache"][name] if name in _CACHES else block["linears"][name]["input"]


def _stats(block: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return _tensor(block, name)["all"]


def _by_level(profile: Mapping[str, Any], name: str, key: str) -> list[list[float]]:
    return [
        [_number(level[key]) for level in _tensor(block, name)["levels"]]
        for block in profile["blocks"]
    ]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _has_gaps(values: Sequence[Sequence[float]]) -> bool:
    return any(math.isnan(value) for row in values for value in row)
