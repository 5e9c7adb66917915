"""A profile for people: `report.html`, which needs nothing beside it, and `pictures/*.png`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from var_compressor import page
from var_compressor.artifact import block_file, write_atomically
from var_compressor.profiling import drawing, figures
from var_compressor.profiling.rows import Row, rows_of, worst_first
from var_compressor.spec import QuantSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT_FILE = "report.html"
PICTURES = "pictures"


@dataclass(frozen=True)
class Picture:
    """``draw`` None: nothing of that kind was measured."""

    name: str
    title: str
    caption: str
    draw: Callable[[Mapping[str, Any], figures.Channels], Figure | None]


PICTURE_LIST = (
    Picture(
        "sensitivity",
        "What each layer does to the bits",
        "One layer at a time is rounded to nearest as the recipe says, without smoothing or "
        "branch. Left: the error behind its block, over the hidden state. Right: how far the "
        "predicted bits of all levels move, given the full-precision bits of the levels before.",
        lambda profile, channels: figures.draw_sensitivity(profile),
    ),
    Picture(
        "worst",
        "Channels of the ten worst layers",
        "What each reads, channel by channel, over all tokens of all levels. Spikes are channels "
        "that force a coarse step on their neighbours.",
        figures.draw_worst,
    ),
    Picture(
        "outliers",
        "Outliers by block and kind",
        "Largest over median magnitude, and excess kurtosis, of every linear's input and of the "
        "cache, all levels together. The higher, the fewer of a format's steps are left for "
        "ordinary values.",
        lambda profile, channels: figures.draw_outliers(profile),
    ),
    Picture(
        "levels",
        "Outliers by level",
        "The same ratio for each level by itself, from the coarsest on the left to the finest. One "
        "number over all levels mixes their distributions.",
        lambda profile, channels: figures.draw_levels(profile),
    ),
    Picture(
        "remedies",
        "What smoothing and a branch give back",
        "Signal over noise of each linear's output, on a sample of tokens. Smoothing: the best of "
        "a few factors. The branch holds the strongest directions of the weight in 16 bits.",
        lambda profile, channels: figures.draw_remedies(profile),
    ),
    Picture(
        "formats",
        "What a format costs by itself",
        "Signal over rounding noise in the median block, by how many values share a range. Hollow: "
        "symmetric; filled: with a zero point.",
        lambda profile, channels: figures.draw_formats(profile),
    ),
    Picture(
        "cache",
        "Cache: by channel or by token",
        "Top: how unlike the ranges of channels are, and those of tokens. What varies more should "
        "have ranges of its own. Bottom: what each choice keeps in 4 bits, with zero points.",
        lambda profile, channels: figures.draw_cache(profile),
    ),
    Picture(
        "skewness",
        "Skewed channels",
        "Skewed channels waste up to half of a symmetric range; a zero point gives it back. Top: "
        "channels of all blocks. Bottom: block by block, median, middle half and largest.",
        figures.draw_skewness,
    ),
)


def write_report(profile: Mapping[str, Any], folder: Path) -> bool:
    """Write both; without matplotlib a page without pictures, and False."""
    svgs = _draw(profile, folder)
    title = f"Profile of {profile['source']['source']}"
    parts = [
        page.facts(_facts(profile)),
        page.section("In short", *(page.verdict(*words) for words in _verdicts(profile))),
    ]
    for picture in PICTURE_LIST:
        content = [] if svgs is None or picture.name not in svgs else [
            page.drawing(svgs[picture.name], picture.caption)
        ]  # fmt: skip
        if picture.name == "worst":
            content.append(page.table(COLUMNS, table_rows(profile)))
        if content:
            parts.append(page.section(picture.title, *content))
    if svgs is None:
        parts.append(page.paragraph("No pictures: pip install 'var-compressor[plots]'"))
    parts += [
        page.section("Every layer", page.folded("Linears", _all_linears(profile)),
                     page.folded("Cache", _all_caches(profile))),
        page.section("How it was measured", *map(page.paragraph, _method(profile))),
    ]  # fmt: skip
    page.write_page(folder / REPORT_FILE, title, parts)
    return svgs is not None


def _draw(profile: Mapping[str, Any], folder: Path) -> dict[str, str] | None:
    """SVGs by name; the PNGs are written. None without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return None
    channels, svgs = read_channels(folder, len(profile["blocks"])), {}
    with drawing.style():
        for picture in PICTURE_LIST:
            figure = picture.draw(profile, channels)
            if figure is not None:
                path = folder / PICTURES / f"{picture.name}.png"
                write_atomically(path, drawing.to_png(figure))
                svgs[picture.name] = drawing.to_svg(figure)
    return svgs


def read_channels(folder: Path, depth: int) -> dict[tuple[int, str], dict[str, Any]]:
    """Channel profiles by block and tensor."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for index in range(depth):
        for key, values in load_file(folder / block_file(index)).items():
            name, _, what = key.rpartition(".")
            found.setdefault((index, name), {})[what] = values.to(torch.float64).numpy()
    return found


# --- words and tables -----------------------------------------------------------------------------

COLUMNS = (
    *("layer", "largest / median", "kurtosis", "plain, dB", "smoothed", "with branch"),
    *("hidden state, dB", "bits equal", "KL, nats"),
)


def table_rows(profile: Mapping[str, Any], limit: int = figures.NUM_WORST) -> list[list[str]]:
    """The worst layers under `COLUMNS`, as text."""
    return [_cells(row) for row in worst_first(profile)[:limit]]


def _cells(row: Row) -> list[str]:
    output = row.output or {}
    effect = row.effect or {}
    same = effect.get("same_bit")
    return [
        row.full_name,
        f"{row.ratio:.0f}×",
        _text(row.input["kurtosis"], ".1f"),
        *(_text(output.get(step), ".1f") for step in ("plain", "smoothed", "branch")),
        _text(effect.get("stream_snr_db"), ".1f"),
        "" if same is None else f"{100 * same:.2f} %",
        _text(effect.get("kl_nats"), ".2g"),
    ]


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _all_linears(profile: Mapping[str, Any]) -> str:
    columns = (
        *("layer", "largest", "median", "largest / median", "99.9 % / median", "kurtosis"),
        *("CV channels", "CV tokens", "skewness", "largest skew", "zero point", "range"),
        *("input, 4-bit dB", "weight, 4-bit dB", "weight kurtosis", "energy in branch"),
    )
    rows = []
    for row in rows_of(profile):
        weight = row.report["weight"]
        noise = row.report["input"]["snr_db"]["int4"]["group"]["symmetric"]
        rows.append(
            [
                *_stat_cells(row.full_name, row.input),
                f"{noise:.1f}",
                f"{weight['snr_db']['int4']['group']['symmetric']:.1f}",
                _text(weight["kurtosis"], ".2f"),
                f"{100 * weight['energy_in_rank']['smoothed']:.0f} %",
            ]
        )
    return page.table(columns, rows)


def _all_caches(profile: Mapping[str, Any]) -> str:
    columns = (
        *("cache", "largest", "median", "largest / median", "99.9 % / median", "kurtosis"),
        *("CV channels", "CV tokens", "skewness", "largest skew", "zero point", "range"),
        *("verdict", "4 bits per channel, dB", "per token", "8 bits per channel", "per token"),
    )
    rows = []
    for index, block in enumerate(profile["blocks"]):
        for name, cache in block["cache"].items():
            noise = [
                cache["snr_db"][format][way]["asymmetric"]
                for format in ("int4", "int8")
                for way in ("channel", "token")
            ]
            cells = _stat_cells(f"blocks.{index}.{name}", cache["all"])
            rows.append([*cells, cache["all"]["dominance"], *(f"{x:.1f}" for x in noise)])
    return page.table(columns, rows)


def _stat_cells(name: str, stats: Mapping[str, Any]) -> list[str]:
    p999, median = stats["p999"], stats["median"]
    low, high = stats["global_min"], stats["global_max"]
    return [
        name,
        _text(stats["max"], ".3g"),
        _text(median, ".3g"),
        _text(stats["max_median_ratio"], ".0f"),
        _text(p999 / median if p999 and median else None, ".1f"),
        _text(stats["kurtosis"], ".1f"),
        *(_text(stats[key], ".2f") for key in ("cv_channel", "cv_token", "skewness", "max_skew")),
        _text(stats["ideal_zero_point"], ".0f"),
        f"{_text(low, '.3g')} … {_text(high, '.3g')}",
    ]


def _facts(profile: Mapping[str, Any]) -> list[tuple[str, str]]:
    calibration, levels = profile["calibration"], profile["levels"]
    grid = levels[-1]
    return [
        (
            "model",
            f"{profile['config']['depth']} blocks of {profile['config']['embed_dim']} channels",
        ),
        ("judged for", QuantSpec.from_dict(profile["spec"]).summary()),
        ("cache", profile["spec"]["kv"]["format"]),
        ("images", f"{calibration['num_prompts']}, seed {calibration['seed']}"),
        ("levels", f"{len(levels)}, up to {grid['height']}×{grid['width']} tokens"),
        ("computed in", calibration["dtype"]),
        ("by", profile["created_by"]),
    ]


def _verdicts(profile: Mapping[str, Any]) -> list[tuple[str, str, str | None]]:
    return [(one["verdict"], one["text"], one["advice"]) for one in profile["findings"]]


def _method(profile: Mapping[str, Any]) -> list[str]:
    method = profile["method"]
    error = method["median_relative_error"]
    exact = "exact" if error == 0 else f"off by at most {100 * error:.2f} % of the value"
    rows = "conditional and unconditional rows" if profile["guided"] else "conditional rows"
    lines = [
        f"One image per prompt was drawn and its bits kept; then all levels of all images, {rows}, "
        "went through the full-precision model block by block. Statistics of inputs count every "
        "token; those of the cache every token that is ever stored, K after normalisation and "
        "rotation.",
        "Moments are float64, merged part by part, from which kurtosis, skewness and standard "
        "deviations follow. Medians and percentiles come from a histogram of magnitudes and are "
        f"{exact}.",
        "Signal-to-noise ratios and the variations without the outer 2 % are of a sample of at "
        f"most {method['max_tokens_per_level']} tokens a level, each weighted by the tokens it "
        "stands for.",
    ]
    if profile["sensitivity"] is not None:
        lines.append(
            "Sensitivity: the first image, teacher-forced; a bit counts as equal when the same "
            "value is likelier. Rounding is plain, so that a compressed model loses less."
        )
    return lines
