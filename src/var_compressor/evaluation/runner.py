"""Drawing the images of benchmarks: resumable at any moment, by any number of processes.

Samples are drawn in fixed groups, one by one unless a batch is asked for: an image never depends on
which process drew it, on what was there before, or on its neighbours in the list. A group is drawn
whole where any of its images is missing; images that are there are not written again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from var_compressor.evaluation.benchmarks import Sample
from var_compressor.evaluation.bitwise import packed_bits
from var_compressor.evaluation.gallery import Gallery, Writer
from var_compressor.evaluation.results import Failure
from var_compressor.evaluation.sharding import Crew
from var_compressor.models.new_directory import locked
from var_compressor.models.sampling import Sampling
from var_compressor.models.schedule import Schedule
from var_compressor.models.transformer import TextFeatures
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.calibration import Progress

Note = Callable[[str], None]


@dataclass(frozen=True)
class PromptSet:
    """The chosen samples of a benchmark."""

    name: str
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Plan:
    """How a model draws; ``batch`` samples at a time."""

    schedule: Schedule
    sampling: Sampling
    batch: int


Opener = Callable[[], InfinityPipeline]


class NotDrawn(ValueError):
    """A prompt that there can be no image of; the message says why."""


def draw_sets(
    gallery: Gallery,
    sets: Sequence[PromptSet],
    plan: Plan,
    *,
    opened: Opener,
    crew: Crew,
    on_progress: Progress,
    note: Note,
) -> dict[str, list[Failure]]:
    """Draw whatever is missing of the sets; prompts without an image by set, the same everywhere.

    ``opened`` gives the model, and is not asked when nothing is missing.
    Raises: ValueError when not one image of a set could be drawn; ProcessLost; CheckpointError
    while another run draws the same.
    """
    gallery.open()
    with locked(gallery.folder) if crew.is_first else nullcontext():
        _report_leftovers(gallery, crew, note)
        running = gallery.mark_running(crew.rank)
        failed = {}
        for one in sets:
            failed[one.name] = _draw_set(gallery, one, plan, opened, crew, on_progress)
        running.unlink(missing_ok=True)
        crew.gathered(None)
    return failed


def _draw_set(
    gallery: Gallery,
    prompts: PromptSet,
    plan: Plan,
    opened: Opener,
    crew: Crew,
    on_progress: Progress,
) -> list[Failure]:
    gallery.clear(prompts.name)
    groups = [
        prompts.samples[start : start + plan.batch]
        for start in range(0, len(prompts.samples), plan.batch)
    ]
    there = images_there(gallery, prompts, crew)
    todo = [group for group in groups if not all(one.id in there for one in group)]
    stage, total = f"drawing {prompts.name}, {gallery.label}", len(prompts.samples)
    before = total - sum(map(len, todo))
    queue = crew.queue(len(todo))
    on_progress(stage, before, total)
    failed: dict[str, Failure] = {}
    if todo:
        drawer = _Drawer(opened(), plan, gallery, prompts.name)
        with Writer() as writer:
            for job in queue:
                for one in drawer.draw(todo[job], there, writer):
                    failed[one.id] = one
                on_progress(stage, before + queue.finish(len(todo[job])), total)
    failures = list(crew.merged(failed).values())
    on_progress(stage, total, total)
    if prompts.samples and len(failures) == total:
        raise ValueError(
            f"{prompts.name}: no image could be drawn; the first prompt: {failures[0].reason}"
        )
    return failures


def images_there(gallery: Gallery, prompts: PromptSet, crew: Crew) -> set[str]:
    """Ids of samples whose image somebody has, whole; damaged ones are removed.

    Each image is checked by one of the processes that see it.
    """
    seen_by = who_sees(gallery, prompts, crew)
    whole = {}
    for number, sample in enumerate(prompts.samples):
        ranks = seen_by[sample.id]
        if ranks and ranks[number % len(ranks)] == crew.rank:
            if gallery.is_whole(prompts.name, sample):
                whole[sample.id] = True
            else:
                gallery.path(prompts.name, sample).unlink(missing_ok=True)
    return set(crew.merged(whole))


def who_sees(gallery: Gallery, prompts: PromptSet, crew: Crew) -> dict[str, list[int]]:
    """By sample, the processes on whose disk its image is."""
    mine = gallery.names(prompts.name)
    paths = {sample.id: gallery.path(prompts.name, sample).name for sample in prompts.samples}
    names = crew.gathered({id for id, name in paths.items() if name in mine})
    return {id: [rank for rank in range(crew.size) if id in names[rank]] for id in paths}


class _Drawer:
    """Draws groups of samples of one benchmark."""

    def __init__(
        self, pipeline: InfinityPipeline, plan: Plan, gallery: Gallery, benchmark: str
    ) -> None:
        self.pipeline, self.plan = pipeline, plan
        self.gallery, self.benchmark = gallery, benchmark

    def draw(self, group: Sequence[Sample], there: set[str], writer: Writer) -> list[Failure]:
        """Draw a group and write what is missing of it; the samples that have no image."""
        failed, texts = [], {}
        for sample in group:
            try:
                texts[sample] = self._encoded(sample)
            except _PROMPT_ERRORS as error:
                failed.append(_failure(sample, error))
        parts = [list(texts)] if texts else []
        while parts:
            part = parts.pop(0)
            try:
                images_B3YX, bits, seconds = self._images(part, [texts[one] for one in part])
            except _PROMPT_ERRORS as error:
                failure = _failure(part[0], error)
                if len(part) > 1:
                    # one of them is to blame: each alone then
                    parts = [[one] for one in part]
                else:
                    failed.append(failure)
                continue
            for sample, image_3YX, packed in zip(part, images_B3YX, bits, strict=True):
                if sample.id not in there:
                    settings = self.gallery.settings(self.benchmark, sample)
                    settings |= {"seconds": seconds / len(part), "bits": packed}
                    writer.put(image_3YX, self.gallery.path(self.benchmark, sample), settings)
        return failed

    def _encoded(self, sample: Sample) -> TextFeatures:
        # each alone: the padding of a batch may round otherwise
        if not sample.prompt.strip():
            raise NotDrawn("the prompt is empty")
        return self.pipeline.encode([sample.prompt])

    @torch.inference_mode()
    def _images(
        self, samples: Sequence[Sample], texts: Sequence[TextFeatures]
    ) -> tuple[Tensor, list[str], float]:
        text = TextFeatures(
            torch.cat([one.packed_TE for one in texts]), tuple(n for one in texts for n in one.lens)
        )
        seeds = [self.gallery.settings(self.benchmark, one)["seed"] for one in samples]
        began = perf_counter()
        drawn = self.pipeline.draw(
            text, self.plan.schedule, seed=seeds, sampling=self.plan.sampling, with_trace=True
        )
        image_B3YX = self.pipeline.decode(drawn.latent_BDYX, strip_rows=None)
        if not bool(image_B3YX.isfinite().all()):
            raise NotDrawn("the image is not finite")
        # truncated, as `generate` and the original do
        image_B3YX = ((image_B3YX + 1) / 2 * 255).to(torch.uint8).cpu()
        seconds = perf_counter() - began
        return image_B3YX, packed_bits(drawn.trace.bits), seconds


_PROMPT_ERRORS = (ValueError, RuntimeError)


def _failure(sample: Sample, error: Exception) -> Failure:
    """Raises: the error itself, when it is not of the prompt's making."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError) or "CUDA" in reason or "Triton" in reason:
        raise error
    return Failure(sample.id, sample.prompt, reason)


def _report_leftovers(gallery: Gallery, crew: Crew, note: Note) -> None:
    """Tell of processes that an earlier run lost."""
    found = crew.gathered(gallery.take_leftovers())
    for name in sorted({one for names in found for one in names}):
        note(f"{gallery.label}: {name} was cut off in an earlier run; what it left undone is drawn")
