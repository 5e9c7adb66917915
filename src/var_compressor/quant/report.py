"""What a run did to each linear, in numbers: warnings, a table and a plot for people.

``report.json`` of an artifact holds {"blocks": [{"linears": [LinearReport as a dict, ...]}, ...]};
``timing.json`` beside it {"stages": {"recording": seconds}, "blocks": {"0": {"inputs": seconds,
"ffn.fc2": seconds, ...}}}, where "inputs" is the pass that records a block's inputs. Times stay
apart because a report must come out the same when a run is done again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import torch

from var_compressor.artifact import REPORT_FILE, write_atomically
from var_compressor.ops.primitives import FORMATS, round_trip
from var_compressor.spec import ACT_FORMATS, MODULES, WEIGHT_FORMATS, WHOLE_ROW, LinearSpec

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

TIMING_FILE = "timing.json"
PLOT_FILE = "report.png"

# values on which a format's noise is measured: rows as long as those of a large model's linears
_NORMAL_SHAPE = (128, 4096)
# three times the noise that the formats cost on normal weights and inputs: outliers do that, and
# smoothing and branch, which are there to absorb them, did not
SNR_MARGIN_DB = 5.0
# storing the branch in bfloat16 puts noise some 56 dB below it, which takes up to this much from
# the 41 dB of sint8 without any choice being bad
SAME_SNR_DB = 0.2
# four times the noise of the median block: more than blocks of one kind differ by themselves
BELOW_MEDIAN_DB = 6.0


@dataclass(frozen=True)
class LinearReport:
    """What was chosen for one linear and what it cost, on the sampled calibration tokens.

    ``snr_db`` of the output after each step, in order: "nearest" (plain rounding in the same
    formats), "smoothed", "branch" (with the one-shot low-rank branch), "refined" (after the
    alternation), "final" (as stored). ``objective`` is what the searches compared: "attention
    output" or "projection output"; ``smooth_gain_db`` that of the chosen factors against none.
    ``low_rank_steps`` were tried, ``low_rank_best`` is the index of the one kept.
    ``outlier_ratio`` is the largest over the median channel absmax of the input.
    """

    name: str
    snr_db: dict[str, float]
    objective: str
    alpha: float
    beta: float
    smooth_gain_db: float
    low_rank_steps: int
    low_rank_best: int
    outlier_ratio: float
    warnings: tuple[str, ...] = ()


# --- warnings -------------------------------------------------------------------------------------


@cache
def normal_snr_db(format_name: str) -> float:
    """What rounding leaves of a normal distribution, in dB, with the format's usual group size.

    uint4 counts as sint4, for a range used on both sides.
    """
    name = "sint4" if format_name == "uint4" else format_name
    group_size = (ACT_FORMATS | WEIGHT_FORMATS)[name]
    x_MK = torch.randn(_NORMAL_SHAPE, generator=torch.Generator().manual_seed(0))
    back_MK = round_trip(
        x_MK,
        format=FORMATS[name],
        group_size=x_MK.shape[1] if group_size == WHOLE_ROW else group_size,
        scale_dtype=torch.float32,
    )
    ratio = x_MK.double().square().sum() / (x_MK - back_MK).double().square().sum()
    return 10 * math.log10(ratio)


def vanishing_ratio(format_name: str) -> float:
    """Largest value of a format over half its smallest step.

    Where the largest channel of a group exceeds the median by more, all of the median channel
    rounds to 0.
    """
    format = FORMATS[format_name]
    smallest = 1.0
    if format.kind == "float":
        info = torch.finfo(format.code_dtype)
        smallest = info.smallest_normal * info.eps
    if format.kind == "table":
        smallest = min(value for value in format.values if value > 0)
    return format.qmax / (smallest / 2)


def expected_snr_db(spec: LinearSpec) -> float:
    """SNR of the output when weight and input are normal and independent."""
    formats = [name for name in (spec.weight.format, spec.act.format) if name is not None]
    noise = sum(10 ** (-normal_snr_db(name) / 10) for name in formats)
    return -10 * math.log10(noise)


def warnings_for(report: LinearReport, spec: LinearSpec) -> tuple[str, ...]:
    """What looks wrong about a linear by itself: one line each, with its number and a way out."""
    found = (
        _low_snr(report, spec),
        _worse_than_nearest(report),
        _unsmoothed_outliers(report, spec),
        _unfinished_refinement(report, spec),
    )
    return tuple(line for line in found if line)


def _low_snr(report: LinearReport, spec: LinearSpec) -> str:
    bound, final = expected_snr_db(spec) - SNR_MARGIN_DB, report.snr_db["final"]
    if final >= bound:
        return ""
    formats = f"{spec.weight.format} weights and {spec.act.format or '16-bit'} inputs"
    return (
        f"SNR {final:.1f} dB, {formats} should keep {bound:.1f} dB; try a higher "
        "quant.low_rank.rank, or a rule in quant.exceptions with act null or more bits"
    )


def _worse_than_nearest(report: LinearReport) -> str:
    nearest, final = report.snr_db["nearest"], report.snr_db["final"]
    if final >= nearest - SAME_SNR_DB:
        return ""
    return (
        f"SNR {final:.1f} dB, plain rounding gives {nearest:.1f} dB; try more prompts "
        "(collect.num_prompts), or a rule in quant.exceptions without smooth and low_rank"
    )


def _unsmoothed_outliers(report: LinearReport, spec: LinearSpec) -> str:
    # a 16-bit input does not mind outliers
    if not spec.smooth.enabled or spec.act.format is None or report.alpha or report.beta:
        return ""
    if report.outlier_ratio <= vanishing_ratio(spec.act.format):
        return ""
    return (
        f"no smoothing was best although the largest channel is {report.outlier_ratio:.0f}x the "
        "median; try more quant.smooth.num_grids, or an exception with act null"
    )


def _unfinished_refinement(report: LinearReport, spec: LinearSpec) -> str:
    steps, limit = report.low_rank_steps, spec.low_rank.max_iters
    since_best = steps - 1 - report.low_rank_best
    # a limit of 1 asks for no refinement
    if limit == 1 or steps < limit or since_best >= spec.low_rank.patience:
        return ""
    return (
        f"refinement ended at its limit of {limit} steps before it settled; "
        "try more quant.low_rank.max_iters"
    )


def model_warnings(report: Mapping[str, Any]) -> list[str]:
    """Linears that stand out among those of their kind, the furthest first.

    ``report`` is the content of ``report.json``.
    """
    outstanding = []
    for kind, linears in _by_kind(report).items():
        middle = median(linear.snr_db["final"] for linear in linears.values())
        for block, linear in linears.items():
            below = middle - linear.snr_db["final"]
            if below > BELOW_MEDIAN_DB:
                line = (
                    f"blocks.{block}.{kind}: SNR {linear.snr_db['final']:.1f} dB, {below:.1f} dB "
                    f"below the median {kind}; try a rule for it in quant.exceptions"
                )
                outstanding.append((below, line))
    return [line for _, line in sorted(outstanding, reverse=True)]


def all_warnings(report: Mapping[str, Any]) -> list[str]:
    """`model_warnings`, then those of single linears by their full names, worst SNR first.

    What is said of several linears in the same words is one line.
    """
    linears = sorted(
        (linear.snr_db["final"], f"blocks.{block}.{kind}", line)
        for kind, linears in _by_kind(report).items()
        for block, linear in linears.items()
        for line in linear.warnings
    )
    names: dict[str, list[str]] = {}
    for _, name, line in linears:
        names.setdefault(line, []).append(name)
    return [
        *model_warnings(report),
        *(f"{_named(linears)}: {line}" for line, linears in names.items()),
    ]


def _named(linears: list[str]) -> str:
    others = len(linears) - 1
    return f"{linears[0]} and {others} more" if others else linears[0]


# --- numbers --------------------------------------------------------------------------------------


def read_report(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of report.json and timing.json of an artifact."""
    report, timing = (
        json.loads((folder / name).read_text()) for name in (REPORT_FILE, TIMING_FILE)
    )
    return report, timing


def final_snr_db(report: Mapping[str, Any]) -> dict[str, float] | None:
    """Mean and minimum over all linears; None when none was quantized."""
    finals = [
        linear.snr_db["final"]
        for linears in _by_kind(report).values()
        for linear in linears.values()
    ]
    return {"mean": fmean(finals), "min": min(finals)} if finals else None


def stage_seconds(timing: Mapping[str, Any]) -> dict[str, float]:
    """Time by stage; that of the linears is the sum over all processes."""
    blocks = timing["blocks"].values()
    inputs = sum(block["inputs"] for block in blocks)
    return {
        **timing["stages"],
        "inputs": inputs,
        "linears": sum(sum(block.values()) for block in blocks) - inputs,
    }


SUMMARY_COLUMNS = (
    *("linear", "nearest: median dB", "min dB", "compressed: median dB", "min dB"),
    *("worst block", "seconds"),
)


def summary_rows(report: Mapping[str, Any], timing: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A line of text per kind of linear under `SUMMARY_COLUMNS`: SNR of the output, and time.

    Blocks that an earlier, interrupted run made have no time.
    """
    rows = []
    for kind, linears in _by_kind(report).items():
        nearest = [linear.snr_db["nearest"] for linear in linears.values()]
        final = {block: linear.snr_db["final"] for block, linear in linears.items()}
        numbers = (median(nearest), min(nearest), median(final.values()), min(final.values()))
        worst = min(final, key=lambda block: final[block])
        seconds = sum(times.get(kind, 0.0) for times in timing["blocks"].values())
        rows.append((kind, *(f"{n:.1f}" for n in numbers), str(worst), f"{seconds:.1f}"))
    return rows


def _by_kind(report: Mapping[str, Any]) -> dict[str, dict[int, LinearReport]]:
    """kind of linear -> block -> its report; kinds in the order of a block."""
    kinds: dict[str, dict[int, LinearReport]] = {}
    for index, block in enumerate(report["blocks"]):
        for fields in block["linears"]:
            linear = LinearReport(**{**fields, "warnings": tuple(fields["warnings"])})
            kinds.setdefault(linear.name, {})[index] = linear
    return {kind: kinds[kind] for kind in sorted(kinds, key=MODULES.index)}


# --- plot -----------------------------------------------------------------------------------------

# two hues that every kind of colour vision tells apart (Okabe and Ito)
_NEAREST_COLOR, _FINAL_COLOR = "#D55E00", "#0072B2"
_COLORS, _NO_VALUE = "viridis", "#DDDDDD"
_PANEL_COLUMNS = 4


def write_plot(report: Mapping[str, Any], timing: Mapping[str, Any], path: Path) -> bool:
    """Draw SNR, smoothing, outliers and time over the blocks as a PNG; False without matplotlib.

    Raises: ValueError when no linear was quantized.
    """
    kinds, num_blocks = _by_kind(report), len(report["blocks"])
    if not kinds:
        raise ValueError(f"{path}: no linear was quantized, there is nothing to draw")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(15, 10), dpi=100, layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(5, 3))
    _draw_snr(figure.add_subfigure(grid[0]), kinds, num_blocks)
    _draw_maps(figure.add_subfigure(grid[1]), kinds, timing, num_blocks)
    png = BytesIO()
    figure.savefig(png, format="png")
    write_atomically(path, png.getvalue())
    return True


def _draw_snr(
    figure: SubFigure, kinds: Mapping[str, Mapping[int, LinearReport]], num_blocks: int
) -> None:
    """A panel per kind, plain rounding against the result; the legend takes a panel of its own."""
    num_rows = math.ceil((len(kinds) + 1) / _PANEL_COLUMNS)
    panels = figure.subplots(num_rows, _PANEL_COLUMNS, sharex=True, squeeze=False)
    figure.suptitle("Output SNR of each linear on the calibration sample")
    steps = (
        ("nearest", "plain rounding", _NEAREST_COLOR, "o"),
        ("final", "as stored", _FINAL_COLOR, "s"),
    )
    for axes, (kind, linears) in zip(panels.flat, kinds.items(), strict=False):
        medians = []
        for step, label, color, marker in steps:
            snr_db = {block: linear.snr_db[step] for block, linear in linears.items()}
            values = _over_blocks(snr_db, num_blocks)
            axes.plot(values, color=color, marker=marker, markersize=4, label=label)
            medians.append(f"{median(snr_db.values()):.1f}")
        axes.set_title(f"{kind}: median {' → '.join(medians)} dB", fontsize=10)
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("block")
        axes.set_ylabel("SNR, dB")
    for axes in panels.flat[len(kinds) :]:
        axes.axis("off")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    panels.flat[-1].legend(handles, labels, loc="center", frameon=False, fontsize=12)


def _draw_maps(
    figure: SubFigure,
    kinds: Mapping[str, Mapping[int, LinearReport]],
    timing: Mapping[str, Any],
    num_blocks: int,
) -> None:
    """Kind by block, as colours: what was chosen, what the input is like, and how long it took."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    ratios = _chosen(kinds, "outlier_ratio", num_blocks)
    top = max(100.0, *(ratio for row in ratios for ratio in row if not math.isnan(ratio)))
    seconds = _seconds(kinds, timing, num_blocks)
    from_0_to_1 = {"vmin": 0, "vmax": 1}
    maps: tuple[tuple[str, str, list[list[float]], dict[str, Any]], ...] = (
        ("smoothing, by the input", "exponent α", _chosen(kinds, "alpha", num_blocks), from_0_to_1),
        ("smoothing, by the weight", "exponent β", _chosen(kinds, "beta", num_blocks), from_0_to_1),
        ("input, largest over median channel", "ratio", ratios, {"norm": LogNorm(1, top)}),
        ("time", "seconds", seconds, {"vmin": 0}),
    )
    palette = colormaps[_COLORS].with_extremes(bad=_NO_VALUE)
    figure.suptitle(
        r"Smoothing factors (input$^\alpha$ / weight$^\beta$), input outliers, and time"
    )
    panels = figure.subplots(1, len(maps), sharey=True)
    for axes, (title, unit, values, colors) in zip(panels, maps, strict=True):
        image = axes.imshow(values, cmap=palette, aspect="auto", interpolation="nearest", **colors)
        figure.colorbar(image, ax=axes, label=unit, location="bottom")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("block")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    panels[0].set_yticks(range(len(kinds)), list(kinds))


def _chosen(
    kinds: Mapping[str, Mapping[int, LinearReport]], field: str, num_blocks: int
) -> list[list[float]]:
    return [
        _over_blocks({b: getattr(linear, field) for b, linear in linears.items()}, num_blocks)
        for linears in kinds.values()
    ]


def _seconds(kinds: Iterable[str], timing: Mapping[str, Any], num_blocks: int) -> list[list[float]]:
    times = {int(block): linears for block, linears in timing["blocks"].items()}
    return [
        _over_blocks(
            {b: linears[kind] for b, linears in times.items() if kind in linears}, num_blocks
        )
        for kind in kinds
    ]


def _over_blocks(values: Mapping[int, float], num_blocks: int) -> list[float]:
    """A value per block; NaN, which is not drawn, where there is none."""
    return [values.get(block, math.nan) for block in range(num_blocks)]
