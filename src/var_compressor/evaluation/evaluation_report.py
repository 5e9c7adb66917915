"""What `varc evaluate` shows: a table, and a page with the worst and the median pairs."""

from __future__ import annotations

from pathlib import Path

from var_compressor import page
from var_compressor.evaluation.evaluate import Evaluation
from var_compressor.evaluation.metrics import METRICS
from var_compressor.evaluation.pairs import Pairs
from var_compressor.evaluation.results import Change, MetricResult, Results

PAGE_FILE = "index.html"
COLUMNS = ("benchmark", "metric", "this model", "full precision", "change", "images", "judged by")


def table_rows(results: Results) -> list[tuple[str, ...]]:
    """One row per benchmark and metric, ready to print."""
    rows: list[tuple[str, ...]] = []
    for name, found in results.benchmarks.items():
        for metric, value in found.metrics.items():
            reference, change = found.reference.get(metric), found.changes.get(metric)
            cells = (_shown(value), _shown(reference), _shown(change, signed=True))
            rows.append(
                (name, _arrow(metric), *cells, f"{value.num_samples:,}", value.backbone or "-")
            )
        for metric in found.skipped:
            rows.append((name, _arrow(metric), "skipped", "", "", "", "-"))
    return rows


def lines(results: Results) -> list[str]:
    """What else is to be said, a line each."""
    subject, drawing = results.subject, results.drawing
    said = [
        f"model: {subject.base}, {subject.summary}; transformer "
        f"{subject.weight_bytes / 2**20:,.1f} MiB, KV cache "
        f"{subject.kv_bytes_per_image / 2**20:,.2f} MiB per image",
        f"drawn: seed {drawing.seed}, cfg {drawing.sampling['cfg']}, tau "
        f"{drawing.sampling['tau']}, {drawing.pixel_budget} at {drawing.aspect_ratio:g}, linears "
        f"by {', '.join(drawing.paths)} on {drawing.runs_on} in {drawing.dtype}",
    ]
    for name, found in results.benchmarks.items():
        said.append(f"{name}: median {found.seconds_per_image:.3g} s per image")
        for metric, value in found.metrics.items():
            if value.by_size:
                sizes = ", ".join(f"{one.value:.4g} of {one.num_images}" for one in value.by_size)
                said.append(f"{name}: {metric} by number of images: {sizes}")
        said += [f"{name}: skipped {metric}: {why}" for metric, why in found.skipped.items()]
        said += [f"{name}: no image of {one.id!r}: {one.reason}" for one in found.failed]
    return said


def write_page(evaluation: Evaluation) -> Path:
    """One self-contained HTML file beside the results."""
    results = evaluation.results
    parts = [page.paragraph(line) for line in lines(results)]
    parts.append(page.table(COLUMNS, table_rows(results)))
    parts.append(
        page.paragraph(
            "Brackets are 95 % bootstrap intervals over the images; a change is between images of "
            "the same prompts and seeds, with its paired interval. Of Fréchet distances, the "
            "spread of resamples around their mean, moved to the value."
        )
    )
    for name, pairs in evaluation.pairs.items():
        has_reference = "reference" in results.benchmarks[name].images
        parts += _shown_pairs(name, pairs, has_reference=has_reference)
    path = evaluation.out / PAGE_FILE
    page.write_page(path, f"Evaluation of {results.subject.base}: {results.subject.summary}", parts)
    return path


def _shown_pairs(benchmark: str, pairs: Pairs, *, has_reference: bool) -> list[str]:
    texts = ["full precision", "this model"] if has_reference else ["this model"]
    parts = []
    for kind, chosen in (("worst", pairs.worst), ("median", pairs.median)):
        parts.append(page.heading(f"{benchmark}: {kind} by {pairs.metric}"))
        if has_reference:
            parts.append(page.paragraph("Left: full precision. Right: this model."))
        figures = [
            page.pictures(list(zip(one.pngs, texts, strict=True)), one.prompt, one.note)
            for one in chosen
        ]
        parts.append(page.gallery(figures))
    return parts


def _arrow(metric: str) -> str:
    return f"{metric} {'↑' if METRICS[metric].higher_is_better else '↓'}"


def _shown(one: MetricResult | Change | None, *, signed: bool = False) -> str:
    if one is None:
        return ""
    sign = "+" if signed else ""
    return f"{one.value:{sign}.4g} [{one.low:{sign}.4g}, {one.high:{sign}.4g}]"
