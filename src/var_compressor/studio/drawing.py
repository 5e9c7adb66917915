"""An order becomes images: previews after every level, then time, memory and a comparison.

Shapes: B is 1 everywhere; D code channels, (Y, X) a VAE grid; L tokens of a level, Q bits each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from time import perf_counter

import torch
from PIL import Image
from torch import Tensor

from var_compressor.generation import Generation, Trace
from var_compressor.models.bits import resize, vae_grid
from var_compressor.models.schedule import Level, Schedule
from var_compressor.models.transformer import TextFeatures
from var_compressor.pipeline import InfinityPipeline
from var_compressor.resident import reset_resident_peak, resident_peak
from var_compressor.studio.comparing import Comparison, compare
from var_compressor.studio.engine import Report
from var_compressor.studio.gallery import Gallery
from var_compressor.studio.orders import Order
from var_compressor.studio.shelf import Shelf

# tokens of the largest grid that a preview is decoded on: 384 × 384 pixels of a square image
MAX_PREVIEW_TOKENS = 24 * 24
MAX_PREVIEW_PIXELS = 512
PREVIEW_STAGE = "previews"


@dataclass(frozen=True)
class Progress:
    """Where a drawing is. ``preview`` is None before the first level is done."""

    model: str
    stage: str
    done_levels: int
    num_levels: int
    preview: Image.Image | None = None


@dataclass(frozen=True)
class Stage:
    """Of one drawing; ``peak_bytes``: torch's tensors on a GPU, the whole process on a CPU."""

    name: str
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Picture:
    """One model's image. ``previews``: of every level but the last, coarse to fine.

    ``file``: where a gallery keeps it, if one does; ``transformer_bytes`` and ``kv_bytes``: what
    weights and KV cache take in memory.
    """

    model: str
    image: Image.Image
    file: Path | None
    previews: tuple[Image.Image, ...]
    stages: tuple[Stage, ...]
    transformer_bytes: int
    kv_bytes: int


@dataclass(frozen=True)
class Drawing:
    """All that an order brings; ``comparison`` is None for one model, or for images of two sizes.

    ``note`` says why two models could not be compared.
    """

    order: Order
    pictures: tuple[Picture, ...]
    comparison: Comparison | None = None
    note: str = ""


class Painter:
    """A device's worker: draws orders with the models of its shelf."""

    def __init__(self, shelf: Shelf, gallery: Gallery) -> None:
        self.shelf, self.gallery = shelf, gallery

    def __call__(self, order: Order, report: Report) -> Drawing:
        """Raises: ValueError for what cannot be drawn; OutOfMemory, one of them."""
        drawn = [self._draw(order, model, report) for model in order.models]
        pictures = tuple(self._kept(order, picture) for picture, _ in drawn)
        if len(pictures) == 1:
            return Drawing(order, pictures)
        first, second = (trace for _, trace in drawn)
        if [one.shape for one in first.bits] != [one.shape for one in second.bits]:
            sizes = " and ".join(f"{one.image.width}×{one.image.height}" for one in pictures)
            note = f"two kinds of models, images of {sizes} pixels: not comparable bit by bit"
            return Drawing(order, pictures, note=note)
        forced = self._forced(order, first, report)
        return Drawing(order, pictures, compare(pictures, first, second, forced))

    def _draw(self, order: Order, model: str, report: Report) -> tuple[Picture, Trace]:
        report(Progress(model, "opening the model", 0, 0))
        return self.shelf.with_room(
            model, lambda pipeline: draw(pipeline, order, model=model, report=report)
        )

    def _kept(self, order: Order, picture: Picture) -> Picture:
        settings = order.settings(self.shelf.offered[picture.model].source)
        return replace(picture, file=self.gallery.add(picture.image, settings))

    def _forced(self, order: Order, first: Trace, report: Report) -> Trace:
        """The second model, given the first one's bits of all levels before."""
        model = order.models[1]

        @torch.inference_mode()
        def use(pipeline: InfinityPipeline) -> Trace:
            schedule = _schedule(pipeline, order)

            def on_level(level: Level, latent_BDYX: Tensor) -> None:
                report(Progress(model, "comparing bits", level.index + 1, len(schedule.levels)))

            text, negative = _encoded(pipeline, order)
            drawn = pipeline.draw(
                text,
                schedule,
                seed=order.seed,
                sampling=order.sampling,
                negative=negative,
                forced_bits=first.bits,
                with_trace=True,
                on_level=on_level,
            )
            return drawn.trace

        return self.shelf.with_room(model, use)


@torch.inference_mode()
def draw(
    pipeline: InfinityPipeline, order: Order, *, model: str, report: Report
) -> tuple[Picture, Trace]:
    """One image, with a preview reported after every level but the last.

    Raises: ValueError for an image larger than the model's own; whatever ``report`` raises, and
    then the pipeline is as good as before.
    """
    schedule = _schedule(pipeline, order)
    watch = _Watch(pipeline, schedule, model, report)
    text, negative = _encoded(pipeline, order)
    watch.stage("text")
    drawn = pipeline.draw(
        text,
        schedule,
        seed=order.seed,
        sampling=order.sampling,
        negative=negative,
        with_trace=True,
        on_level=watch.on_level,
    )
    image = Generation(pipeline.decode(drawn.latent_BDYX, strip_rows=None), drawn).pil[0]
    watch.stage("VAE")
    if watch.preview_seconds:
        watch.stages.append(Stage(PREVIEW_STAGE, watch.preview_seconds, watch.preview_peak))
    weights = chain(pipeline.transformer.parameters(), pipeline.transformer.buffers())
    picture = Picture(
        model,
        image,
        None,
        tuple(watch.previews),
        tuple(watch.stages),
        sum(tensor.nbytes for tensor in weights),
        drawn.kv_bytes,
    )
    return picture, drawn.trace


class _Watch:
    """Times and measures the stages of one drawing, and shows what is there after each level."""

    def __init__(
        self, pipeline: InfinityPipeline, schedule: Schedule, model: str, report: Report
    ) -> None:
        self.pipeline, self.schedule = pipeline, schedule
        self.model, self.report = model, report
        self.previews: list[Image.Image] = []
        self.stages: list[Stage] = []
        self.preview_seconds, self.preview_peak = 0.0, 0
        self._began = 0.0
        self._take()
        report(self._progress("reading the prompt", 0))

    def stage(self, name: str) -> None:
        """The end of a stage; the next one begins now."""
        self.stages.append(Stage(name, *self._take()))

    def on_level(self, level: Level, latent_BDYX: Tensor) -> None:
        self.stage(f"level {level.index + 1}")
        if level.is_last:
            self.report(self._progress("decoding", level.index + 1))
            return
        self.previews.append(preview(self.pipeline, latent_BDYX, level, self.schedule))
        self.report(self._progress("drawing", level.index + 1))
        seconds, peak_bytes = self._take()
        self.preview_seconds += seconds
        self.preview_peak = max(self.preview_peak, peak_bytes)

    def _progress(self, stage: str, done_levels: int) -> Progress:
        latest = self.previews[-1] if self.previews else None
        return Progress(self.model, stage, done_levels, len(self.schedule.levels), latest)

    def _take(self) -> tuple[float, int]:
        """Seconds and most bytes since the last call."""
        device = self.pipeline.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            peak_bytes = torch.cuda.max_memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        else:
            peak_bytes = resident_peak()
            reset_resident_peak()
        now = perf_counter()
        began, self._began = self._began, now
        return now - began, peak_bytes


def preview(
    pipeline: InfinityPipeline, latent_BDYX: Tensor, level: Level, schedule: Schedule
) -> Image.Image:
    """The image so far, decoded on the level's own grid: cheap, and as sharp as what it holds."""
    grid = vae_grid(level, patchify=pipeline.transformer.config.patchify)
    shrink = max(1, math.ceil(math.sqrt(level.num_tokens / MAX_PREVIEW_TOKENS)))
    small = resize(latent_BDYX, (max(1, grid[0] // shrink), max(1, grid[1] // shrink)))
    image_B3YX = pipeline.decode(small, strip_rows=None)
    pixels = ((image_B3YX[0] + 1) / 2 * 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    height, width = schedule.image_size
    scale = min(1.0, MAX_PREVIEW_PIXELS / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def _schedule(pipeline: InfinityPipeline, order: Order) -> Schedule:
    schedule = pipeline.schedule_for(order.aspect_ratio, order.pixel_budget)
    own = pipeline.schedule_for(order.aspect_ratio, None)
    if len(schedule.levels) > len(own.levels):
        raise ValueError(
            f"the image size {schedule.pixel_budget} is beyond this model's own "
            f"{own.pixel_budget}; choose that or less"
        )
    return schedule


def _encoded(pipeline: InfinityPipeline, order: Order) -> tuple[TextFeatures, TextFeatures | None]:
    negative = pipeline.encode([order.negative]) if order.negative else None
    return pipeline.encode([order.prompt]), negative
