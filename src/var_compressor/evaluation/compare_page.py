"""A comparison as people read it: tables, plots, one HTML page, and JSON beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from var_compressor import page
from var_compressor.artifact import write_atomically, write_json
from var_compressor.evaluation import plots
from var_compressor.evaluation.compare import METHOD, ComparedBenchmark, Comparison, Entry
from var_compressor.evaluation.statistics import Estimate

PAGE_FILE, JSON_FILE = "index.html", "comparison.json"
ABSENT = "–"
MIB = 2**20


@dataclass(frozen=True)
class Label:
    """How a metric is written: its name with the unit, the factor to that unit, and digits."""

    text: str
    factor: float
    digits: int

    def number(self, value: float) -> str:
        shown = f"{self.factor * value:.{self.digits}f}"
        # -0.0 and 0.0 are the same to a reader
        return shown.removeprefix("-") if float(shown) == 0 else shown

    def interval(self, found: Estimate) -> str:
        low, high = self.number(found.low), self.number(found.high)
        return f"{self.number(found.value)} [{low}, {high}]"


LABELS = {
    "fid": Label("FID", 1, 2),
    "clean_fid": Label("clean FID", 1, 2),
    "reader_fid": Label("reader FID", 1, 3),
    "image_reward": Label("ImageReward", 1, 3),
    "clip_iqa": Label("CLIP-IQA", 1, 3),
    "clip_score": Label("CLIP score", 1, 2),
    "psnr": Label("PSNR, dB", 1, 2),
    "ssim": Label("SSIM", 1, 3),
    "lpips": Label("LPIPS", 1, 3),
    "caption_accuracy": Label("captions right, %", 100, 1),
    "bit_agreement": Label("bits equal, %", 100, 2),
    "bit_kl": Label("KL, millinats per bit", 1000, 2),
    "first_divergence": Label("first other level", 1, 2),
    "latent_error": Label("latent error, %", 100, 1),
}


def label_of(metric: str) -> Label:
    return LABELS.get(metric, Label(metric, 1, 3))


Table = tuple[list[str], list[list[str]]]


# --- tables ---------------------------------------------------------------------------------------


def tables(benchmark: ComparedBenchmark) -> list[Table]:
    """Columns and rows: values, then differences where there are any."""
    found = [(value_columns(benchmark), value_rows(benchmark))]
    if compared_metrics(benchmark):
        found.append((difference_columns(benchmark), difference_rows(benchmark)))
    return found


def value_columns(benchmark: ComparedBenchmark) -> list[str]:
    metrics = [
        f"{label_of(name).text} {'↑' if benchmark.higher_is_better(name) else '↓'}"
        for name in benchmark.metrics
    ]
    return [benchmark.name, "MiB", "s per image", *metrics]


def value_rows(benchmark: ComparedBenchmark) -> list[list[str]]:
    """A line per model: its cost, and every metric with its interval."""
    return [
        [
            one.name,
            f"{one.num_bytes / MIB:.2f}",
            f"{one.seconds_per_image:.2f}",
            *(_value_cell(one, name) for name in benchmark.metrics),
        ]
        for one in benchmark.entries
    ]


def _value_cell(entry: Entry, metric: str) -> str:
    found = entry.metrics.get(metric)
    if found is None:
        return ABSENT
    return label_of(metric).interval(Estimate(found.value, found.low, found.high))


def difference_columns(benchmark: ComparedBenchmark) -> list[str]:
    names = [label_of(name).text for name in compared_metrics(benchmark)]
    return [f"difference to {benchmark.entries[0].name}", *names]


def difference_rows(benchmark: ComparedBenchmark) -> list[list[str]]:
    """A line per model but the first; ▲ better, ▼ worse, beyond the interval."""
    metrics = compared_metrics(benchmark)
    return [
        [one.name, *(difference_cell(benchmark, one, name) for name in metrics)]
        for one in benchmark.entries[1:]
    ]


def compared_metrics(benchmark: ComparedBenchmark) -> list[str]:
    return [
        name
        for name in benchmark.metrics
        if any(name in one.differences for one in benchmark.entries)
    ]


def difference_cell(benchmark: ComparedBenchmark, entry: Entry, metric: str) -> str:
    found = entry.differences.get(metric)
    if found is None:
        return ABSENT
    sign = "+" if found.value > 0 else ""
    verdict = ""
    if found.low > 0 or found.high < 0:
        verdict = " ▲" if (found.value > 0) == benchmark.higher_is_better(metric) else " ▼"
    return f"{sign}{label_of(metric).interval(found)}{verdict}"


# --- plots ----------------------------------------------------------------------------------------


def cost_plots(benchmark: ComparedBenchmark, styles: Mapping[str, plots.Style]) -> dict[str, bytes]:
    """Bytes against quality and latency against quality, as PNG by file name."""
    costs: dict[str, tuple[str, Callable[[Entry], float]]] = {
        "bytes": ("transformer and cache, MiB", lambda one: one.num_bytes / MIB),
        "latency": ("seconds per image", lambda one: one.seconds_per_image),
    }
    panels = [metric_panel(benchmark, name, benchmark.entries) for name in benchmark.metrics]
    return {
        f"{what}-{file_name(benchmark.name)}.png": plots.quality_over_cost(
            {one.name: of(one) for one in benchmark.entries}, label, panels, styles
        )
        for what, (label, of) in costs.items()
    }


def metric_panel(
    benchmark: ComparedBenchmark,
    metric: str,
    entries: Sequence[Entry],
    band: tuple[float, float] | None = None,
) -> plots.Panel:
    """The metric's values in its unit."""
    label = label_of(metric)
    values = {
        one.name: Estimate(*(label.factor * v for v in (found.value, found.low, found.high)))
        for one in entries
        if (found := one.metrics.get(metric)) is not None
    }
    arrow = "↑" if benchmark.higher_is_better(metric) else "↓"
    return plots.Panel(f"{label.text} {arrow}", values, band)


def file_name(text: str) -> str:
    """Of a benchmark: what any file system takes."""
    return "".join(c if c.isalnum() else "-" for c in text.lower())


# --- the page -------------------------------------------------------------------------------------


def write_comparison(comparison: Comparison, out: Path) -> list[Path]:
    """The page, its plots as files and the JSON, in the directory ``out``; what was written."""
    parts = [page.paragraph(METHOD)]
    written = []
    for benchmark in comparison.benchmarks:
        pngs = {}
        if plots.can_draw():
            pngs = cost_plots(benchmark, plots.styles_of([one.name for one in benchmark.entries]))
        parts += benchmark_parts(benchmark)
        parts += [page.picture(png, f"{benchmark.name}: {name}") for name, png in pngs.items()]
        for name, png in pngs.items():
            write_atomically(out / name, png)
            written.append(out / name)
    if not plots.can_draw():
        parts.append(page.paragraph(plots.MISSING))
    write_json(out / JSON_FILE, comparison.to_dict())
    page.write_page(out / PAGE_FILE, "Comparison", parts)
    return [out / PAGE_FILE, out / JSON_FILE, *written]


def benchmark_parts(benchmark: ComparedBenchmark) -> list[str]:
    """A benchmark's section as HTML, without plots."""
    summaries = [[one.name, one.summary] for one in benchmark.entries]
    return [
        page.heading(f"{benchmark.name}, {benchmark.num_samples} images"),
        *(page.table(*one) for one in tables(benchmark)),
        page.table(("model", "what it is"), summaries),
        *map(page.paragraph, benchmark.notes),
    ]
