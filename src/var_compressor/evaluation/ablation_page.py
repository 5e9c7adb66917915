"""An ablation as people read it: tables, plots, one HTML page, Markdown, and JSON beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from var_compressor import page
from var_compressor.artifact import write_atomically, write_json
from var_compressor.evaluation import compare_page, plots
from var_compressor.evaluation.ablation import FULL, METHODS, Ablation, Cell
from var_compressor.evaluation.compare import METHOD
from var_compressor.evaluation.compare_page import ABSENT, Label, Table, label_of
from var_compressor.evaluation.statistics import Estimate

PAGE_FILE, JSON_FILE, TABLES_FILE = "index.html", "ablation.json", "tables.md"
_FLOOR = (
    "Two more runs of full precision with other seeds are the noise floor: what stays within their "
    "range is no loss that these images could show."
)
_ORDER = (
    "Each bit metric against each image metric over the quantized lines of the first table: "
    "Spearman's rank correlation, then Pearson's (of the logarithm of KL), with 95 % intervals by "
    "Fisher's transformation. Lines share methods and prompts, so that the intervals are, if "
    "anything, too narrow."
)
_NOT_COLORED = "#555555"


# --- tables ---------------------------------------------------------------------------------------


def tables(ablation: Ablation) -> dict[str, Table]:
    """Columns and rows by heading."""
    compared = ablation.compared
    found = {
        "Values": (_value_columns(ablation), _value_rows(ablation)),
        f"Difference to {FULL}": (
            compare_page.difference_columns(compared),
            compare_page.difference_rows(compared),
        ),
    }
    if any("bit_agreement" in one for one in ablation.levels.values()):
        found["Bits equal by level, % (KL, millinats per bit)"] = _level_table(ablation)
    if ablation.groups:
        found["One group of layers quantized alone: KL, millinats per bit"] = _group_table(ablation)
    if ablation.correlations:
        found["Correlation of bit metrics with image metrics"] = _correlation_table(ablation)
    return found


def _value_columns(ablation: Ablation) -> list[str]:
    first, size, _, *metrics = compare_page.value_columns(ablation.compared)
    return [first, size, *metrics]


def _value_rows(ablation: Ablation) -> list[list[str]]:
    rows = compare_page.value_rows(ablation.compared)
    return [[name, size, *metrics] for name, size, _, *metrics in rows]


def _level_table(ablation: Ablation) -> Table:
    rows = []
    for title, found in ablation.levels.items():
        if title == FULL or title in ablation.noise_floor or "bit_agreement" not in found:
            continue
        same, kl = found["bit_agreement"], found.get("bit_kl", [])
        cells = [f"{100 * share:.2f}" for share in same]
        if kl:
            pairs = zip(cells, kl, strict=True)
            cells = [f"{cell} ({1000 * nats:.2f})" for cell, nats in pairs]
        rows.append([title, *cells])
    num_levels = max(len(row) for row in rows) - 1 if rows else 0
    return ["", *(f"level {i}" for i in range(num_levels))], rows


def _group_table(ablation: Ablation) -> Table:
    names = list(dict.fromkeys(name for one in ablation.groups.values() for name in one))
    label = label_of("bit_kl")
    rows = [
        [
            name,
            *(
                label.interval(costs[name].kl_nats) if name in costs else ABSENT
                for costs in ablation.groups.values()
            ),
        ]
        for name in names
    ]
    return ["quantized alone", *ablation.groups], rows


def _correlation_table(ablation: Ablation) -> Table:
    found = {(one.bits, one.images): one.found for one in ablation.correlations}
    bits, images = (list(dict.fromkeys(pair[i] for pair in found)) for i in (0, 1))
    two_digits = Label("", 1, 2)
    rows = []
    for row in bits:
        cells = []
        for column in images:
            one = found.get((row, column))
            cells.append(
                ABSENT
                if one is None
                else f"{two_digits.interval(one.spearman)}; {two_digits.interval(one.pearson)}"
            )
        rows.append([label_of(row).text, *cells])
    count = ablation.correlations[0].found.count
    return [f"{count} lines", *(label_of(name).text for name in images)], rows


def markdown(ablation: Ablation) -> str:
    """All tables as Markdown."""
    parts = []
    for heading, (columns, rows) in tables(ablation).items():
        rule = ["---", *["---:"] * (len(columns) - 1)]
        lines = [f"| {' | '.join(line)} |" for line in (columns, rule, *rows)]
        parts.append("\n".join([f"### {heading}", "", *lines]))
    return "\n\n".join(parts) + "\n"


# --- plots ----------------------------------------------------------------------------------------


def pngs(ablation: Ablation) -> dict[str, bytes]:
    """By file name: all lines of the grid, quality over bytes, and groups of layers."""
    compared, styles = ablation.compared, styles_of(ablation)
    panels = []
    for metric in compared.metrics:
        band = _floor(ablation, metric)
        panels.append(compare_page.metric_panel(compared, metric, compared.entries, band))
    names = [one.name for one in compared.entries]
    bytes_plot = next(iter(compare_page.cost_plots(compared, styles).items()))
    found = {"grid.png": plots.line_by_line(names, panels, styles), "bytes.png": bytes_plot[1]}
    if ablation.groups:
        found["groups.png"] = _groups_png(ablation)
    return found


def _floor(ablation: Ablation, metric: str) -> tuple[float, float] | None:
    """The range of the other seeds' intervals, in the metric's unit."""
    label = label_of(metric)
    values = [
        one.metrics[metric]
        for one in ablation.compared.entries
        if one.name in ablation.noise_floor and metric in one.metrics
    ]
    if not values:
        return None
    ends = label.factor * min(v.low for v in values), label.factor * max(v.high for v in values)
    return min(ends), max(ends)


def styles_of(ablation: Ablation) -> dict[str, plots.Style]:
    """A colour per method, a marker per set of switches."""
    colors = dict(zip(METHODS, plots.COLORS, strict=False))
    switches = list(dict.fromkeys(one.switches for one in ablation.cells))
    markers = dict(zip(switches, plots.MARKERS, strict=False))
    return {one.title: _style(one, colors, markers[one.switches]) for one in ablation.cells}


def _style(cell: Cell, colors: Mapping[str, str], marker: str) -> plots.Style:
    # the cache alone belongs to no method
    alone = cell.method is None or not (cell.switches.weights or cell.switches.activations)
    color = _NOT_COLORED if alone or cell.method is None else colors[cell.method]
    return plots.Style(cell.title, color, marker)


def _groups_png(ablation: Ablation) -> bytes:
    names = list(dict.fromkeys(name for one in ablation.groups.values() for name in one))
    panels, label = [], label_of("bit_kl")
    for method, costs in ablation.groups.items():
        values = {
            name: Estimate(*(label.factor * v for v in (kl.value, kl.low, kl.high)))
            for name, cost in costs.items()
            for kl in [cost.kl_nats]
        }
        panels.append(plots.Panel(f"{method}: {label.text} ↓", values))
    return plots.line_by_line(names, panels, plots.styles_of(names))


# --- the page -------------------------------------------------------------------------------------


def write_ablation(ablation: Ablation, out: Path) -> list[Path]:
    """The page, plots as files, tables as Markdown and the JSON; what was written."""
    images = pngs(ablation) if plots.can_draw() else {}
    for name, png in images.items():
        write_atomically(out / name, png)
    write_json(out / JSON_FILE, ablation.to_dict())
    write_atomically(out / TABLES_FILE, markdown(ablation).encode())
    compared = ablation.compared
    parts = [
        page.paragraph(
            f"{compared.num_samples} prompts of {compared.name}, the same for every line, image by "
            f"image at the same seeds; groups of layers on {ablation.num_group_prompts} of them."
        ),
        *map(page.paragraph, (METHOD, _FLOOR)),
    ]
    texts = {"Correlation of bit metrics with image metrics": _ORDER}
    for heading, (columns, rows) in tables(ablation).items():
        parts.append(page.heading(heading))
        if heading in texts:
            parts.append(page.paragraph(texts[heading]))
        parts.append(page.table(columns, rows))
    parts += [page.picture(png, name) for name, png in images.items()]
    if not images:
        parts.append(page.paragraph(plots.MISSING))
    parts += map(page.paragraph, compared.notes)
    page.write_page(out / PAGE_FILE, "Ablation: what each kind of quantization costs", parts)
    return [out / name for name in (PAGE_FILE, JSON_FILE, TABLES_FILE, *images)]
