"""The page: what a visitor sees, and what happens at which click. No work is done here."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from var_compressor.images import read_settings
from var_compressor.studio import panels
from var_compressor.studio.drawing import Drawing, Progress
from var_compressor.studio.engine import Engine, Job, Snapshot, State
from var_compressor.studio.form import Form, Update
from var_compressor.studio.gallery import Gallery
from var_compressor.studio.orders import Order
from var_compressor.studio.reports import Reports
from var_compressor.studio.shelf import Offer

TITLE = "VAR-Compressor studio"
SPARE_EVENTS, MAX_EVENTS = 64, 1024
# how often a visitor's page looks at its job; the farther its turn, the less often
LOOK_SECONDS, MAX_LOOK_SECONDS = 0.05, 3.0
IMAGE_TAB, COMPARE_TAB, GALLERY_TAB, REPORTS_TAB = "image", "compare", "gallery", "reports"
# of every event but drawing: not for other programs, and too quick for a spinner
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


@dataclass(frozen=True)
class Studio:
    """What the page shows. ``machine``: where models run; ``memory_kind``: what is measured there.

    ``examples``: prompts that the models can draw.
    """

    engine: Engine[Order]
    gallery: Gallery
    reports: Reports
    offers: Sequence[Offer]
    machine: str
    memory_kind: str
    examples: Sequence[str]


def build_page(studio: Studio) -> gr.Blocks:
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown(f"## {TITLE}")
        gr.HTML(panels.machine_line(studio.machine), elem_id="machine")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=320):
                form = Form(studio.offers, studio.examples)
            with gr.Column(scale=5, min_width=420):
                view = View()
        _connect(studio, blocks, form, view)
    # Gradio's own queue must never hold back what ours would refuse, nor a visitor's other clicks
    blocks.max_threads = studio.engine.capacity + SPARE_EVENTS
    blocks.queue(default_concurrency_limit=None, max_size=MAX_EVENTS, api_open=False)
    return blocks


class View:
    """What a visitor sees."""

    def __init__(self) -> None:
        self.status = gr.HTML(panels.status("ready"), elem_id="status")
        with gr.Tabs(selected=IMAGE_TAB) as self.tabs:
            with gr.Tab("Image", id=IMAGE_TAB):
                self._show_image()
            with gr.Tab("Compare", id=COMPARE_TAB):
                self._show_pair()
            with gr.Tab("Gallery", id=GALLERY_TAB) as self.gallery_tab:
                self._show_gallery()
            with gr.Tab("Reports", id=REPORTS_TAB) as self.reports_tab:
                self.report_name = gr.Dropdown(
                    [], value=None, label="Report", elem_id="report-name"
                )
                self.report = gr.HTML(panels.reports_hint(), elem_id="report")

    def _show_image(self) -> None:
        self.image = gr.Image(
            show_label=False,
            interactive=False,
            type="filepath",
            height=420,
            buttons=["download", "fullscreen"],
            elem_id="image",
        )
        self.details = gr.HTML(elem_id="details")

    def _show_pair(self) -> None:
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=300):
                self.pair = gr.ImageSlider(
                    label="Left and right", interactive=False, max_height=420, elem_id="pair"
                )
            with gr.Column(scale=3, min_width=220):
                self.difference = gr.Image(
                    label="Difference of each pixel",
                    interactive=False,
                    buttons=["fullscreen"],
                    elem_id="difference",
                )
        self.compared = gr.HTML(panels.compare_hint(), elem_id="compared")

    def _show_gallery(self) -> None:
        self.gallery = gr.Gallery(
            show_label=False,
            columns=5,
            fit_columns=False,
            height=480,
            interactive=False,
            buttons=["download", "fullscreen"],
            elem_id="gallery",
        )
        self.shown_files: gr.State = gr.State([])
        self.chosen: gr.State = gr.State("")
        self.chosen_settings = gr.HTML(elem_id="chosen")
        self.reuse = gr.Button("Use these settings", interactive=False, size="sm", elem_id="reuse")

    @property
    def drawn_on(self) -> list[Any]:
        """The image first, for programs that read the answer."""
        shown = [self.image, self.status, self.details, self.tabs]
        return [*shown, self.pair, self.difference, self.compared]

    def cleared(self) -> Update:
        """Of what an earlier drawing left. Values are cheaper to Gradio than leaving them alone."""
        return {
            self.image: None,
            self.details: "",
            self.pair: None,
            self.difference: None,
            self.compared: panels.compare_hint(),
        }

    def running(self, now: Snapshot, job: Job[Order]) -> Update:
        preview = now.latest.preview if isinstance(now.latest, Progress) else None
        said = panels.job_status(now, len(job.order.models))
        return self.cleared() | {self.status: said, self.image: preview}

    def final(self, now: Snapshot, memory_kind: str) -> Update:
        if now.state is State.cancelled:
            return {self.status: panels.status("cancelled", "error")}
        if now.state is State.failed:
            return {self.status: panels.status(now.message, "error")}
        drawing: Drawing = now.result
        update = self.cleared() | {
            self.status: panels.done_status(drawing),
            self.image: str(drawing.pictures[0].file),
            self.details: panels.details(drawing.pictures, memory_kind),
        }
        if len(drawing.pictures) == 2:
            left, right = drawing.pictures
            label = f"{left.model}  |  {right.model}"
            update |= {
                self.tabs: gr.update(selected=COMPARE_TAB),
                self.pair: gr.update(value=(str(left.file), str(right.file)), label=label),
                self.difference: drawing.comparison and drawing.comparison.difference,
                self.compared: panels.compared(drawing, memory_kind),
            }
        return update


def _connect(studio: Studio, blocks: gr.Blocks, form: Form, view: View) -> None:
    """Every event of the page; only `draw` is meant for other programs."""
    engine = studio.engine

    async def draw(request: gr.Request, *values: Any) -> AsyncIterator[Update]:
        try:
            job = engine.submit(form.order(*values), str(request.session_hash))
        except ValueError as error:
            yield {view.status: panels.status(str(error), "error")}
            return
        try:
            yield {view.tabs: gr.update(selected=IMAGE_TAB)}
            seen = None
            while not (now := job.snapshot()).state.is_final:
                if seen is None or now.position != seen.position or now.latest is not seen.latest:
                    yield view.running(now, job)
                seen = now
                await asyncio.sleep(min(MAX_LOOK_SECONDS, LOOK_SECONDS * max(1, now.position)))
            # thumbnails and tables are drawn beside the loop that serves everybody
            yield await asyncio.to_thread(view.final, now, studio.memory_kind)
        finally:
            # whoever closes the page in the middle gives up the turn; a final job does not mind
            job.cancel()

    def cancel(request: gr.Request) -> None:
        engine.cancel_all_of(str(request.session_hash))

    def restore(path: str | None) -> Update:
        if path is None:
            return {}
        return {form.file: None} | apply(Path(path))

    def apply(path: Path) -> Update:
        try:
            updates, said = form.restored(read_settings(path), studio.offers)
        except (ValueError, OSError) as error:
            return {view.status: panels.status(str(error), "error")}
        return updates | {view.status: panels.status(said, "done")}

    gr.on(
        [form.draw.click, form.prompt.submit],
        draw,
        form.inputs,
        view.drawn_on,
        api_name="draw",
        show_progress="hidden",
    )
    form.cancel.click(cancel, None, None, **PRIVATE)
    blocks.unload(cancel)
    form.dice.click(lambda: str(secrets.randbelow(10**9)), None, form.seed, **PRIVATE)
    form.file.upload(restore, form.file, [form.file, view.status, *form.inputs], **PRIVATE)
    _connect_gallery(studio, form, view, apply)
    _connect_reports(studio, view)


def _connect_gallery(studio: Studio, form: Form, view: View, apply: Any) -> None:

    def refresh() -> Update:
        entries = studio.gallery.newest()
        return {
            view.gallery: [(str(entry.path), entry.caption) for entry in entries],
            view.shown_files: [entry.path.name for entry in entries],
        }

    def choose(names: list[str], event: gr.SelectData) -> Update:
        name = names[event.index] if 0 <= event.index < len(names) else ""
        try:
            said = panels.settings_table(read_settings(studio.gallery.folder / name))
        except (ValueError, OSError) as error:
            return {view.chosen_settings: panels.status(str(error), "error")}
        return {
            view.chosen: name,
            view.chosen_settings: said,
            view.reuse: gr.update(interactive=True),
        }

    def reuse(name: str) -> Update:
        return apply(studio.gallery.folder / name) | {view.tabs: gr.update(selected=IMAGE_TAB)}

    chosen = [view.chosen, view.chosen_settings, view.reuse]
    view.gallery_tab.select(refresh, None, [view.gallery, view.shown_files], **PRIVATE)
    view.gallery.select(choose, view.shown_files, chosen, **PRIVATE)
    view.reuse.click(reuse, view.chosen, [view.status, view.tabs, *form.inputs], **PRIVATE)


def _connect_reports(studio: Studio, view: View) -> None:

    def look(current: str | None) -> Any:
        names = list(studio.reports.found())
        shown = current if current in names else next(iter(names), None)
        return gr.update(choices=names, value=shown)

    def show(name: str | None) -> str:
        if name is None:
            return panels.reports_hint()
        try:
            return studio.reports.frame(name)
        except (ValueError, OSError) as error:
            return panels.status(str(error), "error")

    view.reports_tab.select(look, view.report_name, view.report_name, **PRIVATE)
    view.report_name.change(show, view.report_name, view.report, **PRIVATE)
