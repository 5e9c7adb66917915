"""What the page says in HTML: every text that comes from outside is escaped here."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

from PIL import Image

from var_compressor.studio.comparing import FULL_DIFFERENCE, Comparison, legend_colors
from var_compressor.studio.drawing import PREVIEW_STAGE, Drawing, Picture, Progress
from var_compressor.studio.engine import Snapshot, State

THUMBNAIL_PIXELS = 112
MIB = 2**20

CSS = """
:is(#machine, #status, #details, #compared, #chosen, #report) .html-container { padding: 0; }
body:has(.vs-status.busy) #draw, body:not(:has(.vs-status.busy)) #cancel {
  opacity: .45; pointer-events: none; }
#image img { height: 410px; width: 100%; object-fit: contain; }
#dice { align-self: center; }
.vs-status { display: flex; align-items: center; gap: .75rem; min-height: 2.6rem;
  padding: .45rem .8rem; border-radius: .3rem; border: 1px solid var(--border-color-primary);
  background: var(--block-background-fill); color: var(--body-text-color); }
.vs-status.error { border-left: .3rem solid #c2410c; }
.vs-status.done { border-left: .3rem solid #15803d; }
.vs-status .bar { flex: 1; height: .4rem; }
.vs-film { display: flex; flex-wrap: wrap; gap: .4rem; margin-bottom: .6rem; }
.vs-film figure { margin: 0; text-align: center; font-size: .75rem; }
.vs-film img { display: block; border-radius: .3rem; max-height: 112px; margin: 0; }
.prose .vs-table, .vs-table { width: 100%; padding: 0; border-collapse: collapse; border: 0;
  font-size: .85rem; font-variant-numeric: tabular-nums; color: var(--body-text-color); }
.prose .vs-table tr { border: 0; }
.prose .vs-table :is(th, td), .vs-table :is(th, td) { padding: .2rem .5rem; text-align: right;
  vertical-align: bottom; border: 0; border-bottom: 1px solid var(--border-color-primary); }
.prose .vs-table :is(th, td):first-child, .vs-table :is(th, td):first-child { text-align: left; }
.vs-table .total td { font-weight: 600; }
.vs-table .bar { display: inline-block; width: 7rem; height: .55rem; margin-left: .5rem; }
.bar { background: var(--border-color-primary); border-radius: .15rem; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--color-accent); }
.vs-note, .vs-legend, .vs-film figcaption { font-size: .85rem; color: var(--body-text-color);
  opacity: .72; }
.vs-legend i { display: inline-block; width: 8rem; height: .65rem; border-radius: .15rem; }
.vs-name { font-size: .9rem; font-weight: 600; margin: .3rem 0; color: var(--body-text-color); }
.report { width: 100%; border: 1px solid var(--border-color-primary); border-radius: .3rem; }
iframe.report { height: 75vh; background: white; }
"""


def status(text: str, kind: str = "", share: float | None = None) -> str:
    """One line for the eye and for a screen reader; ``share`` 0 … 1 adds a bar."""
    bar = "" if share is None else f'<span class="bar"><i style="width:{share:.0%}"></i></span>'
    role = "alert" if kind == "error" else "status"
    said = f"<span>{html.escape(text)}</span>"
    return f'<div class="vs-status {kind}" role="{role}">{said}{bar}</div>'


def job_status(now: Snapshot, num_models: int) -> str:
    """Of a job that is not final."""
    if now.state is State.waiting:
        return status(f"waiting: number {now.position} in the queue", "busy")
    progress = now.latest
    if not isinstance(progress, Progress):
        return status("starting", "busy")
    text = progress.stage if num_models == 1 else f"{progress.stage} · {progress.model}"
    if not progress.num_levels:
        return status(text, "busy")
    share = progress.done_levels / progress.num_levels
    return status(f"{text} · level {progress.done_levels} of {progress.num_levels}", "busy", share)


def done_status(drawing: Drawing) -> str:
    seconds = " and ".join(f"{drawing_seconds(one):.2f} s" for one in drawing.pictures)
    size = drawing.pictures[0].image.size
    text = f"done · {size[0]}×{size[1]} pixels in {seconds}"
    return status(f"{text} · {drawing.note}" if drawing.note else text, "done")


def drawing_seconds(picture: Picture) -> float:
    """From prompt to image, without the previews."""
    return sum(stage.seconds for stage in picture.stages if stage.name != PREVIEW_STAGE)


def details(pictures: Sequence[Picture], memory_kind: str) -> str:
    """Of one image or two: its levels, and what each stage took."""
    return filmstrip(pictures) + stage_table(pictures, memory_kind)


def compared(drawing: Drawing, memory_kind: str) -> str:
    """Below the slider: how far two images are from each other, and what each stage took."""
    found = drawing.comparison
    if found is None:
        said = f'<p class="vs-note">{html.escape(drawing.note)}</p>'
    else:
        said = difference_legend(found) + agreement_table(found)
    return said + stage_table(drawing.pictures, memory_kind)


def filmstrip(pictures: Sequence[Picture]) -> str:
    """Every level's preview, coarse to fine, and the image itself."""
    strips = []
    for picture in pictures:
        images = [*picture.previews, picture.image]
        labels = [str(index + 1) for index in range(len(images))]
        figures = "".join(
            f'<figure><img alt="level {label}" src="{_data_url(image)}">'
            f"<figcaption>{label}</figcaption></figure>"
            for image, label in zip(images, labels, strict=True)
        )
        strips.append(
            f'<div class="vs-name">{html.escape(picture.model)}, level by level</div>'
            f'<div class="vs-film">{figures}</div>'
        )
    return "".join(strips)


def stage_table(pictures: Sequence[Picture], memory_kind: str) -> str:
    """Seconds and peak memory of every stage, a pair of columns for each model."""
    heads = "".join(
        f"<th>{html.escape(one.model)}<br>seconds</th><th><br>peak, MiB</th>" for one in pictures
    )
    longest = max(stage.seconds for one in pictures for stage in one.stages)
    names = [stage.name for stage in max(pictures, key=lambda one: len(one.stages)).stages]
    rows = []
    for name in names:
        cells = "".join(_stage_cells(one, name, longest) for one in pictures)
        rows.append(f"<tr><td>{html.escape(name)}</td>{cells}</tr>")
    totals = "".join(
        f"<td>{drawing_seconds(one):.3f}</td>"
        f"<td>{max(stage.peak_bytes for stage in one.stages) / MIB:,.0f}</td>"
        for one in pictures
    )
    rows.append(f'<tr class="total"><td>all but previews</td>{totals}</tr>')
    for label, field in (("transformer's weights", "transformer_bytes"), ("KV cache", "kv_bytes")):
        cells = "".join(f"<td></td><td>{getattr(one, field) / MIB:,.2f}</td>" for one in pictures)
        rows.append(f"<tr><td>{label}</td>{cells}</tr>")
    note = f'<p class="vs-note">Peak memory is that of {html.escape(memory_kind)}.</p>'
    heads = f"<tr><th>stage</th>{heads}</tr>"
    return f'<table class="vs-table stages">{heads}{"".join(rows)}</table>{note}'


def agreement_table(found: Comparison) -> str:
    """Bits in common by level."""
    rows = "".join(
        f"<tr><td>level {index + 1}</td><td>{num_bits:,}</td>{_share(forced)}{_share(drawn)}</tr>"
        for index, (num_bits, forced, drawn) in enumerate(
            zip(found.num_bits, found.forced, found.drawn, strict=True)
        )
    )
    total = (
        f'<tr class="total"><td>all</td><td>{sum(found.num_bits):,}</td>'
        f"{_share(found.mean(found.forced))}{_share(found.mean(found.drawn))}</tr>"
    )
    return (
        '<table class="vs-table agreement"><tr><th>bits in common</th><th>bits</th>'
        f"<th>given the same levels before</th><th>as drawn</th></tr>{rows}{total}</table>"
        '<p class="vs-note">As drawn, an early difference leads to others; given the '
        "first model's levels before, each level is judged by itself, by the likelier value of "
        "each bit.</p>"
    )


def difference_legend(found: Comparison) -> str:
    colors = ", ".join(legend_colors())
    return (
        f'<div class="vs-legend">0 <i style="background:linear-gradient(90deg, {colors})"></i> '
        f"{FULL_DIFFERENCE} or more of 255 · mean {found.mean_difference:.1f}, largest "
        f"{found.max_difference}, {found.changed:.0%} of the pixels differ</div>"
    )


def _stage_cells(picture: Picture, name: str, longest: float) -> str:
    stage = next((one for one in picture.stages if one.name == name), None)
    if stage is None:
        return "<td></td><td></td>"
    share = stage.seconds / longest if longest else 0.0
    return (
        f'<td>{stage.seconds:.3f}<span class="bar"><i style="width:{share:.0%}"></i></span></td>'
        f"<td>{stage.peak_bytes / MIB:,.0f}</td>"
    )


def _share(value: float) -> str:
    return f'<td>{value:.1%}<span class="bar"><i style="width:{value:.0%}"></i></span></td>'


def _data_url(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = BytesIO()
    small.convert("RGB").save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def machine_line(machine: str) -> str:
    return f'<div class="vs-note">{html.escape(machine)}</div>'


def compare_hint() -> str:
    return '<p class="vs-note">Choose a second model under “Compare with”, and draw.</p>'


def reports_hint() -> str:
    return (
        '<p class="vs-note">No report yet: start with <code>varc studio --reports DIR</code> to '
        "browse the pages that varc profile, varc evaluate and varc demo wrote there.</p>"
    )


def settings_table(settings: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(str(value)[:400])}</td></tr>"
        for name, value in settings.items()
    )
    return f'<table class="vs-table">{rows}</table>'
