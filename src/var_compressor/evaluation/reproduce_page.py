"""A reproduction as people read it: measured beside published, one HTML page, and JSON."""

from __future__ import annotations

from pathlib import Path

from var_compressor import page
from var_compressor.artifact import write_atomically, write_json
from var_compressor.evaluation import compare_page, plots
from var_compressor.evaluation.compare import METHOD, Entry
from var_compressor.evaluation.compare_page import ABSENT, Label, Table, label_of
from var_compressor.evaluation.reproduce import GB, PEAK_GB, SECONDS, PublishedRow, Reproduced
from var_compressor.evaluation.statistics import Estimate

PAGE_FILE, JSON_FILE = "index.html", "reproduction.json"
_LABELS = {PEAK_GB: Label("peak memory, GB", 1, 2), SECONDS: Label("s per image", 1, 2)}


def main_table(found: Reproduced) -> Table:
    """Every quantity of both models, published and measured."""
    full, compressed = found.compared.entries
    published = found.asked.published
    there = {row.quantity: row for row in published.rows}
    columns = [f"{found.model}", full.name, compressed.name, "difference"]
    if there:
        columns += [f"{one.name}, published" for one in (full, compressed)]
    quantities = [*found.compared.metrics, PEAK_GB, SECONDS]
    rows = []
    for quantity in quantities:
        row = [_name(found, quantity), *_measured(found, quantity)]
        if there:
            row += _published(there.get(quantity), _label(quantity))
        rows.append(row)
    return columns, rows


def _label(quantity: str) -> Label:
    return _LABELS.get(quantity) or label_of(quantity)


def _name(found: Reproduced, quantity: str) -> str:
    better = quantity not in _LABELS and found.compared.higher_is_better(quantity)
    return f"{_label(quantity).text} {'↑' if better else '↓'}"


def _measured(found: Reproduced, quantity: str) -> list[str]:
    """Full precision, compressed, and their difference."""
    full, compressed = found.compared.entries
    if quantity in _LABELS:
        of = {
            PEAK_GB: {name: size / GB for name, size in found.timed.peak_bytes.items()},
            SECONDS: found.timed.seconds,
        }[quantity]
        label = _LABELS[quantity]
        values = [of[full.name], of[compressed.name]]
        return [*map(label.number, values), f"{values[1] / values[0]:.2f} x"]
    change = compare_page.difference_cell(found.compared, compressed, quantity)
    return [_cell(full, quantity), _cell(compressed, quantity), change]


def _cell(entry: Entry, metric: str) -> str:
    value = entry.metrics.get(metric)
    if value is None:
        return ABSENT
    return label_of(metric).interval(Estimate(value.value, value.low, value.high))


def _published(row: PublishedRow | None, label: Label) -> list[str]:
    if row is None:
        return [ABSENT, ABSENT]
    return [f"{value:g}" for value in (row.full, row.compressed)]


def lines(found: Reproduced) -> list[str]:
    """What to know of both sides of the table."""
    asked, machine = found.asked, found.machine
    said = [
        f"measured: {found.compared.num_samples} images of {asked.benchmark}, seed {asked.seed}, "
        f"on {machine.get('name')}; memory and time on {found.timed.machine}, median of "
        f"{asked.bench.runs} runs of one image",
        f"compressed: {found.summary}",
    ]
    published = asked.published
    if not published.rows:
        return [*said, "there are no published numbers of this model"]
    said.append(
        f"{published.source}: {published.num_samples} images; memory and time on "
        f"{published.machine}, which is another machine than this one unless it is named above"
    )
    if found.compared.num_samples != published.num_samples:
        said.append(
            f"FID falls with the number of images: {found.compared.num_samples} here, "
            f"{published.num_samples} there"
        )
    return said


def write_reproduction(found: Reproduced, out: Path) -> list[Path]:
    """The page with its plots, and the JSON; what was written."""
    compared = found.compared
    images = {}
    if plots.can_draw():
        styles = plots.styles_of([one.name for one in compared.entries])
        images = compare_page.cost_plots(compared, styles)
    for name, png in images.items():
        write_atomically(out / name, png)
    write_json(out / JSON_FILE, found.to_dict())
    parts = [
        *map(page.paragraph, lines(found)),
        page.table(*main_table(found)),
        page.paragraph(METHOD),
        page.heading("Time and memory"),
        page.table(found.timed.columns, found.timed.rows),
        page.heading("Quality over cost"),
        *(page.picture(png, name) for name, png in images.items()),
        *([] if images else [page.paragraph(plots.MISSING)]),
        *map(page.paragraph, compared.notes),
    ]
    page.write_page(out / PAGE_FILE, f"{found.model}: measured beside published", parts)
    return [out / name for name in (PAGE_FILE, JSON_FILE, *images)]
