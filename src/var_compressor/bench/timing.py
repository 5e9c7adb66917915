"""One image from prompt to PNG, timed by stage without waiting for the device in between."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from time import perf_counter

import torch

from var_compressor.bench.ceilings import median_seconds
from var_compressor.generation import Drawn, Generation, OnLevel
from var_compressor.models.sampling import (
    Sampling,
    draw_noise,
    sample_bits,
    seeded_generators,
)
from var_compressor.models.schedule import Level, Schedule
from var_compressor.models.transformer import TextFeatures
from var_compressor.pipeline import InfinityPipeline, Text


@dataclass(frozen=True)
class Request:
    """What every run draws."""

    text: Text
    schedule: Schedule
    seed: int
    sampling: Sampling


@dataclass(frozen=True)
class Run:
    """Seconds of one run. ``total_s`` is wall time from the prompt to PNG files in memory.

    ``level_s``: transformer and sampling; the first level has the text's conditioning, too.
    ``joules``: of the GPU, over the run.
    """

    total_s: float
    text_s: float
    level_s: tuple[float, ...]
    vae_s: float
    png_s: float
    joules: float | None

    @property
    def draw_s(self) -> float:
        return sum(self.level_s)


class Clock:
    """Marks in the order of the device's work: CUDA events, or the time of day on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[torch.cuda.Event | float] = []

    def mark(self) -> None:
        if self.device.type != "cuda":
            self.marks.append(perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        self.marks.append(event)

    def seconds(self) -> list[float]:
        """Between neighbouring marks; waits for the last one."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return [_between(a, b) for a, b in pairwise(self.marks)]


def _between(a: torch.cuda.Event | float, b: torch.cuda.Event | float) -> float:
    if isinstance(a, float) and isinstance(b, float):
        return b - a
    assert isinstance(a, torch.cuda.Event) and isinstance(b, torch.cuda.Event)
    return a.elapsed_time(b) / 1000


@torch.inference_mode()
def time_run(pipeline: InfinityPipeline, request: Request) -> Run:
    """One image per prompt; ``joules`` None."""
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize(pipeline.device)
    clock, start = Clock(pipeline.device), perf_counter()
    clock.mark()
    text = pipeline.encode(request.text)
    clock.mark()
    drawn = draw(pipeline, text, request, on_level=lambda level, latent: clock.mark())
    image = pipeline.decode(drawn.latent_BDYX, strip_rows=None)
    clock.mark()
    text_s, *level_s, vae_s = clock.seconds()
    decoded = perf_counter()
    write_pngs(Generation(image, drawn))
    end = perf_counter()
    return Run(end - start, text_s, tuple(level_s), vae_s, end - decoded, None)


def draw(
    pipeline: InfinityPipeline,
    text: TextFeatures,
    request: Request,
    *,
    on_level: OnLevel | None = None,
) -> Drawn:
    """The transformer's part of a run."""
    return pipeline.draw(
        text,
        request.schedule,
        seed=request.seed,
        sampling=request.sampling,
        on_level=on_level,
    )


def write_pngs(generation: Generation) -> list[bytes]:
    """Every image as a PNG file in memory."""
    files = []
    for image in generation.pil:
        buffer = BytesIO()
        image.save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


@torch.inference_mode()
def sampling_seconds(pipeline: InfinityPipeline, request: Request, *, batch: int) -> list[float]:
    """Of each level's noise and draw, alone, on random logits of the right shape."""
    num_bits, device = pipeline.transformer.config.bits_per_token, pipeline.device
    generators = seeded_generators(request.seed, batch)

    def seconds(level: Level) -> float:
        logits_BLQ2 = torch.randn(batch, level.num_tokens, num_bits, 2, device=device)
        return median_seconds(
            lambda: sample_bits(
                logits_BLQ2, draw_noise(generators, level, num_bits, device), request.sampling
            ),
            device,
        )

    return [seconds(level) for level in request.schedule.levels]


@dataclass(frozen=True)
class Spread:
    """Median and extremes of several runs."""

    median: float
    lowest: float
    highest: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(statistics.median(values), min(values), max(values))
