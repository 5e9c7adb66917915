"""`varc evaluate`: draw the prompts of benchmarks, measure the images, write down what was found.

Full-precision images of the same prompts and seeds are drawn where a metric compares with them.
Everything but the last step is done by all processes together.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from var_compressor.artifact import write_json
from var_compressor.compress import choose_device, sampling_of
from var_compressor.evaluation.benchmarks import Sample, open_benchmarks, prompts_sha256
from var_compressor.evaluation.bit_rows import measure_bits
from var_compressor.evaluation.gallery import Gallery, slug
from var_compressor.evaluation.measuring import (
    NEEDS_REFERENCE,
    Drawn,
    Measured,
    Sides,
    check_metrics,
    measure_rows,
    median_seconds,
    summarize,
    why_not,
)
from var_compressor.evaluation.metrics import BIT_METRICS, METRICS
from var_compressor.evaluation.pairs import Pairs, choose_pairs, image_index
from var_compressor.evaluation.results import (
    BenchmarkResult,
    Drawing,
    Failure,
    Results,
    Subject,
    rows_name,
    write_results,
)
from var_compressor.evaluation.runner import Note, Plan, PromptSet, draw_sets
from var_compressor.evaluation.sharding import Crew, crew_of_environment
from var_compressor.evaluation.subject import Model, model_of
from var_compressor.layers.switches import Switches
from var_compressor.machine import machine_of
from var_compressor.models.sampling import Sampling
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.calibration import Progress
from var_compressor.quant.team import local_device
from var_compressor.recipe import Recipe

# beside the results: where every image is
INDEX_FILE = "images.json"
# beside the images: what was measured of them
ROWS_FOLDER = "rows"


@dataclass(frozen=True)
class Request:
    """What to evaluate, on what, and where images go.

    ``recipe.collect`` says how images are drawn. ``seed`` is of the images, ``subset_seed`` of the
    choice of ``num_samples`` prompts. The model's images go below ``gen_root``, and what was
    measured of any; full precision's below ``ref_root``; results to ``out``, beside the images for
    None. ``ref_seed`` is of full precision's images where they are to differ from the model's by
    chance, too.
    """

    recipe: Recipe
    artifact: Path | None
    switches: Switches
    benchmarks: tuple[str, ...]
    metrics: tuple[str, ...]
    num_samples: int
    seed: int
    subset_seed: int
    batch: int
    compute: str
    gen_root: Path
    ref_root: Path
    data_root: Path
    metric_weights: Path | None
    prompt_cache: Path | None
    out: Path | None
    ref_seed: int | None = None

    @property
    def sampling(self) -> Sampling:
        return sampling_of(self.recipe.collect)


@dataclass(frozen=True)
class Evaluation:
    """What was found, where it was written, and images to look at, by benchmark."""

    results: Results
    out: Path
    pairs: dict[str, Pairs]


def evaluate(request: Request, *, on_progress: Progress, note: Note) -> Evaluation | None:
    """Do all of it, together with the other processes that torchrun started.

    ``on_progress`` and ``note`` are told by the first process alone, which also gets the result;
    the others get None.
    Raises: ValueError for what cannot be evaluated, before any work where it can be known;
    ProcessLost when another process died.
    """
    device = local_device(choose_device(request.recipe.model.device))
    with crew_of_environment(device) as crew:
        if not crew.is_first:
            on_progress, note = _silent, _silent
        return _Run(request, crew, on_progress, note).evaluated()


def _silent(*_: object) -> None:
    return


class _Opened:
    """A model that is opened when it is first asked for, and closed for good."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.pipeline: InfinityPipeline | None = None

    def __call__(self) -> InfinityPipeline:
        if self.pipeline is None:
            self.pipeline = self.model.open()
        return self.pipeline

    def close(self) -> None:
        self.pipeline = None
        _free_memory()


class _Run:
    """One evaluation, by one of its processes."""

    def __init__(self, request: Request, crew: Crew, on_progress: Progress, note: Note) -> None:
        self.request, self.crew = request, crew
        self.on_progress, self.note = on_progress, note
        unknown = [name for name in request.metrics if name not in METRICS]
        if unknown:
            raise ValueError(f"no metric is called {unknown[0]!r}; there are {', '.join(METRICS)}")
        self.model, self.notes = model_of(
            request.recipe,
            request.artifact,
            request.switches,
            compute=request.compute,
            prompt_cache=request.prompt_cache,
        )
        self.schedule = self.model.schedule(request.recipe)
        # or every prompt would fail by it
        request.sampling.temperatures(self.schedule)
        request.sampling.guidance(self.schedule, depth=1)
        self.sets = self._sets()
        self.rows_root = request.gen_root / ROWS_FOLDER
        self.missing = check_metrics(
            request.metrics,
            weights_dir=request.metric_weights,
            crew=crew,
            on_progress=on_progress,
        )
        if not isinstance(request.sampling.cfg, float | int):
            why = "bits are compared with one cfg for all levels; set collect.cfg to a number"
            self.missing |= dict.fromkeys(BIT_METRICS, why)

    def evaluated(self) -> Evaluation | None:
        for text in self.notes:
            self.note(text)
        drawn, failed, described = self._draw_all()
        rows, skipped = self._rows(drawn)
        seconds, pairs, index = {}, {}, {}
        for one in drawn:
            name = one.prompts.name
            seconds[name] = median_seconds(one, self.crew)
            if chosen := choose_pairs(one, rows[name], self.crew):
                pairs[name] = chosen
            index[name] = image_index(one, self.crew)
        found = None
        if self.crew.is_first:
            benchmarks, measured = {}, {}
            for number, one in enumerate(drawn):
                name = one.prompts.name
                self.on_progress("intervals", number, len(drawn))
                measured[name] = summarize(rows[name], self.crew.device)
                benchmarks[name] = self._result(
                    one, failed[name], measured[name], skipped[name], seconds[name]
                )
            self.on_progress("intervals", len(drawn), len(drawn))
            machine = {**machine_of(self.crew.device), "num_processes": self.crew.size}
            results = Results(*described, machine, benchmarks)
            out = self.request.out or drawn[0].gallery.folder
            write_results(out, results, _all_rows(measured))
            write_json(out / INDEX_FILE, index)
            found = Evaluation(results, out, pairs)
        # the others stay until all is written
        self.crew.gathered(None)
        return found

    # --- drawing ----------------------------------------------------------------------------------

    def _draw_all(
        self,
    ) -> tuple[list[Drawn], dict[str, list[Failure]], tuple[Subject, Drawing]]:
        """Every benchmark's images, the prompts without one, and what the model is."""
        wanted = [METRICS[name].compares in NEEDS_REFERENCE for name in self.request.metrics]
        reference, lost = None, {}
        seed = self.request.seed
        ref_seed = seed if self.request.ref_seed is None else self.request.ref_seed
        differs = self.model.artifact is not None or seed != ref_seed
        if differs and any(wanted):
            full = _Opened(self.model.full_precision)
            reference = self._gallery(full.model, ref_seed)
            lost = self._draw(reference, full)
        opened = _Opened(self.model)
        gallery = self._gallery(self.model, seed)
        described = self.model.describe(opened(), self.schedule, gallery.identity)
        more = self._draw(gallery, opened)
        drawn, failed = [], {}
        for one in self.sets:
            failures = {f.id: f for f in (*lost.get(one.name, ()), *more[one.name])}
            kept = PromptSet(one.name, tuple(s for s in one.samples if s.id not in failures))
            drawn.append(Drawn(kept, gallery, reference))
            failed[one.name] = [failures[id] for id in sorted(failures)]
        return drawn, failed, described

    def _sets(self) -> list[PromptSet]:
        request, sets = self.request, []
        for one in open_benchmarks(request.benchmarks, request.data_root):
            samples = one.choose(request.num_samples, seed=request.subset_seed)
            if len(samples) < request.num_samples:
                self.notes.append(f"{one.name} has {len(samples)} prompts; all are taken")
            sets.append(PromptSet(one.name, samples))
        return sets

    def _gallery(self, model: Model, seed: int) -> Gallery:
        request = self.request

        def identity() -> dict:
            found = model.identity(request.sampling, self.schedule, seed=seed)
            if request.batch > 1:
                # a batch's images depend on who is in it
                chosen: list[Sample] = [s for one in self.sets for s in one.samples]
                found |= {"batch": request.batch, "prompts_sha256": prompts_sha256(chosen)}
            return found

        root = request.ref_root if model.artifact is None else request.gen_root
        gallery = Gallery(root, slug(model.label), self.crew.told(identity))
        kinds = self.crew.gathered(model.runs_on)
        if len(set(kinds)) > 1:
            raise ValueError(
                f"process {self.crew.rank} runs on {model.runs_on}, others on {', '.join(kinds)}: "
                "their images would differ; start processes on like devices"
            )
        return gallery

    def _draw(self, gallery: Gallery, opened: _Opened) -> dict[str, list[Failure]]:
        failed = draw_sets(
            gallery,
            self.sets,
            Plan(self.schedule, self.request.sampling, self.request.batch),
            opened=opened,
            crew=self.crew,
            on_progress=self.on_progress,
            note=self.note,
        )
        opened.close()
        return failed

    # --- measuring --------------------------------------------------------------------------------

    def _rows(
        self, drawn: Sequence[Drawn]
    ) -> tuple[dict[str, dict[str, Sides]], dict[str, dict[str, str]]]:
        """Of every benchmark: rows by metric, and why a metric has none."""
        bits: dict[str, dict[str, Sides]] = {}
        rows: dict[str, dict[str, Sides]] = {one.prompts.name: {} for one in drawn}
        skipped: dict[str, dict[str, str]] = {one.prompts.name: {} for one in drawn}
        for name in self.request.metrics:
            measurable = []
            for one in drawn:
                if why := self.missing.get(name) or why_not(METRICS[name], one):
                    skipped[one.prompts.name][name] = why
                else:
                    measurable.append(one)
            if not measurable:
                continue
            if name in BIT_METRICS:
                bits = bits or self._bits(measurable)
                found = [bits[one.prompts.name][name] for one in measurable]
            else:
                found = measure_rows(
                    name,
                    measurable,
                    weights_dir=self.request.metric_weights,
                    rows_root=self.rows_root,
                    crew=self.crew,
                    on_progress=self.on_progress,
                )
            for one, sides in zip(measurable, found, strict=True):
                rows[one.prompts.name][name] = sides
            _free_memory()
        return rows, skipped

    def _bits(self, drawn: Sequence[Drawn]) -> dict[str, dict[str, Sides]]:
        """Rows of every metric of bits, by benchmark."""
        found = measure_bits(
            self.model,
            drawn,
            self.schedule,
            self.request.sampling,
            rows_root=self.rows_root,
            crew=self.crew,
            on_progress=self.on_progress,
        )
        return {one.prompts.name: sides for one, sides in zip(drawn, found, strict=True)}

    def _result(
        self,
        drawn: Drawn,
        failed: list[Failure],
        measured: Measured,
        skipped: dict[str, str],
        seconds: float,
    ) -> BenchmarkResult:
        name = drawn.prompts.name
        chosen = next(one.samples for one in self.sets if one.name == name)
        images = {"images": drawn.gallery, "reference": drawn.reference}
        return BenchmarkResult(
            num_samples=len(drawn.prompts.samples),
            subset_seed=self.request.subset_seed,
            prompts_sha256=prompts_sha256(chosen),
            seconds_per_image=seconds,
            metrics=measured.metrics,
            reference=measured.reference,
            changes=measured.changes,
            skipped=skipped,
            failed=failed,
            notes=self.notes,
            images={side: str(one.images(name)) for side, one in images.items() if one},
            ids=[one.id for one in drawn.prompts.samples],
        )


def _all_rows(measured: dict[str, Measured]) -> dict[str, torch.Tensor]:
    return {
        rows_name(benchmark, metric, side): rows
        for benchmark, found in measured.items()
        for metric, sides in found.rows.items()
        for side, rows in sides.items()
    }


def _free_memory() -> None:
    # takes half a second, which only a GPU's memory is worth
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
