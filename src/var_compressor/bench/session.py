"""The whole measurement: open, warm up, run in turns, look inside, and give everything back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from var_compressor.bench import ceilings, kinds, work
from var_compressor.bench.memory import Memory, Meter
from var_compressor.bench.shapes import random_text
from var_compressor.bench.timing import Request, Run, draw, sampling_seconds, time_run
from var_compressor.generation import SAVING_STRIP_ROWS
from var_compressor.layers.kernel_linear import UnpackedLinear
from var_compressor.machine import machine_of
from var_compressor.models.sampling import Sampling
from var_compressor.models.transformer import TextFeatures
from var_compressor.pipeline import InfinityPipeline, Text

if TYPE_CHECKING:
    from var_compressor.footprint import ModelShape

# the first one compiles and allocates, the second may still choose
WARM_UP_RUNS = 2
RANDOM_TEXT = "no text encoder: the text's features are random, encoding takes no time"
IN_TURNS = "both did not fit in memory at once: measured one after the other, not interleaved"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """What is drawn, and how often."""

    prompt: str
    batch: int
    seed: int
    num_runs: int
    aspect_ratio: float
    pixel_budget: str | None
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Source:
    """A pipeline that is opened when its turn comes, and the ``shape`` to predict its memory."""

    name: str
    open: Callable[[], InfinityPipeline]
    shape: Callable[[], ModelShape]


@dataclass(frozen=True)
class Measured:
    """All figures of one pipeline.

    ``sampling_s`` per level, measured alone; ``compute`` as the pipeline's ``compute_report``
    has it, empty without one. ``predicted_peaks``: bytes by stage, empty on a CPU.
    """

    name: str
    open_s: float
    warm_up_s: tuple[float, ...]
    runs: tuple[Run, ...]
    sampling_s: tuple[float, ...]
    memory: Memory
    by_kind: kinds.ByKind
    work: work.Work
    compute: tuple[dict[str, Any], ...]
    predicted_peaks: dict[str, int]

    @property
    def joules_per_run(self) -> float | None:
        found = [run.joules for run in self.runs if run.joules is not None]
        return sum(found) / len(found) if found else None


@dataclass(frozen=True)
class Result:
    """One or two pipelines, the machine's own figures, and what to know of both."""

    machine: dict[str, Any]
    settings: Settings
    levels: tuple[tuple[int, int], ...]
    image_size: tuple[int, int]
    ceilings: ceilings.Ceilings
    measured: tuple[Measured, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        return asdict(self)


@dataclass
class _Warm:
    """A pipeline that has drawn already, and its runs so far."""

    source: Source
    pipeline: InfinityPipeline
    request: Request
    open_s: float
    warm_up_s: tuple[float, ...]
    memory: Memory
    runs: list[Run]


def benchmark(
    sources: Sequence[Source],
    settings: Settings,
    *,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: Progress,
) -> Result:
    """Measure one pipeline, or two in turns (A B A B …) if memory holds both."""
    meter, notes = Meter(device), []
    limits = ceilings.measure(device, dtype)
    warm = _open_all(sources, settings, meter, on_progress)
    schedule = warm[0].request.schedule
    if warm[0].pipeline.text_encoder is None:
        notes.append(RANDOM_TEXT)
    measured = _run_all(warm, settings.num_runs, meter, on_progress)
    if len(warm) < len(sources):
        notes.append(IN_TURNS)
        warm.clear()
        warm = _open_all(sources[1:], settings, meter, on_progress)
        measured += _run_all(warm, settings.num_runs, meter, on_progress)
    return Result(
        machine=machine_of(device),
        settings=settings,
        levels=tuple((level.height, level.width) for level in schedule.levels),
        image_size=schedule.image_size,
        ceilings=limits,
        measured=tuple(measured),
        notes=tuple(notes),
    )


def _open_all(
    sources: Sequence[Source], settings: Settings, meter: Meter, on_progress: Progress
) -> list[_Warm]:
    """The pipelines that memory holds together; the first one at least."""
    warm = [_open(sources[0], settings, meter, on_progress)]
    try:
        warm += [_open(source, settings, meter, on_progress) for source in sources[1:]]
    except torch.OutOfMemoryError:
        return warm
    return warm


def _open(source: Source, settings: Settings, meter: Meter, on_progress: Progress) -> _Warm:
    before, start = meter.occupied(), perf_counter()
    pipeline = source.open()
    open_s = perf_counter() - start
    request = request_for(pipeline, settings)
    warm_up_s = []
    for done in range(WARM_UP_RUNS):
        # the first run also reads the text encoder
        warm_up_s.append(time_run(pipeline, request).total_s)
        on_progress(f"{source.name}: warm-up", done + 1, WARM_UP_RUNS)
    memory = meter.measure(pipeline, request, before=before)
    return _Warm(source, pipeline, request, open_s, tuple(warm_up_s), memory, [])


def request_for(pipeline: InfinityPipeline, settings: Settings) -> Request:
    """The prompt once per image; random features where there is no text encoder."""
    config, batch = pipeline.transformer.config, settings.batch
    if pipeline.text_encoder is None:
        text: Text = random_text(config, batch=batch, seed=settings.seed)
    else:
        text = [settings.prompt] * batch
    schedule = pipeline.schedule_for(settings.aspect_ratio, settings.pixel_budget)
    return Request(text, schedule, settings.seed, settings.sampling)


def _run_all(
    warm: Sequence[_Warm], num_runs: int, meter: Meter, on_progress: Progress
) -> list[Measured]:
    for done in range(num_runs):
        for one in warm:
            before = meter.joules()
            run = time_run(one.pipeline, one.request)
            after = meter.joules()
            joules = None if before is None or after is None else after - before
            one.runs.append(replace(run, joules=joules))
        on_progress("runs", done + 1, num_runs)
    return [_look_inside(one) for one in warm]


@torch.inference_mode()
def _look_inside(warm: _Warm) -> Measured:
    """What takes runs of its own: sampling alone, kinds of kernels, counted work."""
    pipeline, request = warm.pipeline, warm.request
    text = pipeline.encode(request.text)
    by_kind = kinds.profile_kinds(lambda: draw(pipeline, text, request), pipeline.device)
    batch = work.Batch(request.schedule, request.sampling, text.lens)
    rows = batch.num_rows(pipeline.transformer.config)
    return Measured(
        name=warm.source.name,
        open_s=warm.open_s,
        warm_up_s=warm.warm_up_s,
        runs=tuple(warm.runs),
        sampling_s=tuple(sampling_seconds(pipeline, request, batch=len(text.lens))),
        memory=warm.memory,
        by_kind=by_kind,
        work=work.count(pipeline.transformer, batch, kv_bytes=warm.memory.parts["KV cache"]),
        compute=tuple(
            pipeline.compute_report(request.schedule, num_images=len(text.lens), rows=rows)
        ),
        predicted_peaks={}
        if pipeline.device.type == "cpu"
        else predicted_peaks(warm.source, pipeline, request, text),
    )


def predicted_peaks(
    source: Source, pipeline: InfinityPipeline, request: Request, text: TextFeatures
) -> dict[str, int]:
    """Bytes by stage as `varc plan` predicts them for bf16 on a GPU."""
    from var_compressor import footprint

    shape = replace(source.shape(), kv=pipeline.kv_params)
    compressed = shape.spec is not None
    saves = pipeline.saves_memory
    linears = pipeline.transformer.modules()
    setup = footprint.Setup(
        weights="stored" if compressed else "bf16",
        kv="bf16" if shape.kv is None else "stored",
        text_bits=None if pipeline.text_encoder is None else 16,
        releases_text=False,
        chunk_tokens=request.schedule.levels[-1].num_tokens if saves and compressed else None,
        strip_rows=SAVING_STRIP_ROWS if saves else None,
        unpacks=any(isinstance(one, UnpackedLinear) for one in linears),
        keeps_cache=pipeline.keeps_cache,
    )
    asked = footprint.Request(request.schedule, len(text.lens), max(text.lens))
    return footprint.footprint(shape, asked, setup).stage_bytes
