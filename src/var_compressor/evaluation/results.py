"""What an evaluation found, on disk: results.json, and beside it the rows behind its numbers.

    results.json        what was evaluated, how, and every number with its interval
    rows.safetensors    one row per image and metric, from which differences between two results
                        are found image by image

The rows of a benchmark are in the order of its ``ids``; each metric has one for every id. They are
named ``<benchmark>/<metric>`` for the model's own images, ``<benchmark>/<metric>/reference``
for the full-precision images of the same prompts and seeds (where those were drawn and the metric
does not compare with them), and ``<benchmark>/<metric>/truth`` for real images.

Shapes: N images, F numbers per image (none: one value, and the metric is their mean).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save
from torch import Tensor

from var_compressor import __version__
from var_compressor.artifact import on_cpu, read_tensors, write_atomically, write_json
from var_compressor.evaluation.statistics import SizedFrechet
from var_compressor.models.inspection import sha256_of

FORMAT = "var-compressor-results/1"
RESULTS_FILE, ROWS_FILE = "results.json", "rows.safetensors"
REFERENCE, TRUTH = "reference", "truth"

T = TypeVar("T")


class ResultsError(ValueError):
    """Results that cannot be read; the message names the file and the way out."""


@dataclass(frozen=True)
class Subject:
    """The model that drew.

    ``base`` is the full-precision model, ``artifact`` the compressed one or None; ``sha256`` tells
    one set of weights and parameters from another. ``weights``, ``activations`` and ``kv``: which
    kinds of quantization were on. ``summary``: the gist in words, such as "W4A4 g64 rank 32, INT8
    KV cache". Bytes: of the transformer as it was evaluated, and of the KV cache of one image;
    full precision counts in 16 bits.
    """

    base: str
    artifact: str | None
    sha256: str
    summary: str
    weights: bool
    activations: bool
    kv: bool
    weight_bytes: int
    kv_bytes_per_image: int

    @property
    def is_full_precision(self) -> bool:
        return not (self.weights or self.activations or self.kv)


@dataclass(frozen=True)
class Drawing:
    """How images were drawn.

    ``sampling`` as `models.sampling.Sampling`; ``compute``: how 4-bit linears were multiplied as it
    was asked, ``paths``: what that came to on this machine; ``runs_on``: a GPU's name, or "cpu"
    with its threads; ``batch``: images drawn together.
    """

    seed: int
    sampling: dict[str, Any]
    aspect_ratio: float
    pixel_budget: str
    compute: str
    paths: list[str]
    dtype: str
    runs_on: str
    batch: int


@dataclass(frozen=True)
class MetricResult:
    """A metric's value with the ends of its 95 % interval, over ``num_samples`` images.

    ``backbone``: the network that judged, or "". ``compares``: each image with the "reference" that
    full precision drew, or with its "prompt", the "image" alone, or all of them with the "truth".
    ``by_size``: a distance between distributions for fewer images, too.
    """

    value: float
    low: float
    high: float
    num_samples: int
    backbone: str
    compares: str
    higher_is_better: bool
    by_size: list[SizedFrechet] = field(default_factory=list)


@dataclass(frozen=True)
class Change:
    """The model's value minus full precision's on the same images, with its paired interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Failure:
    """A prompt of which there is no image, and why."""

    id: str
    prompt: str
    reason: str


@dataclass(frozen=True)
class BenchmarkResult:
    """One set of prompts.

    ``ids``: the images that every number is over, in the order of the rows; ``prompts_sha256`` is
    of the chosen prompts in that order, failed ones included. ``metrics`` are of the model's
    images, ``reference`` of full precision's, ``changes`` between them; ``skipped`` tells why a
    metric that was asked for is missing. ``images``: the folders of the model's PNGs ("images") and
    of full precision's ("reference").
    """

    num_samples: int
    subset_seed: int
    prompts_sha256: str
    seconds_per_image: float
    metrics: dict[str, MetricResult]
    reference: dict[str, MetricResult]
    changes: dict[str, Change]
    skipped: dict[str, str]
    failed: list[Failure]
    notes: list[str]
    images: dict[str, str]
    ids: list[str]


@dataclass(frozen=True)
class Results:
    """All of one evaluation. ``machine``: what it ran on, by name."""

    subject: Subject
    drawing: Drawing
    machine: dict[str, Any]
    benchmarks: dict[str, BenchmarkResult]
    created_by: str = f"var-compressor {__version__}"


def rows_name(benchmark: str, metric: str, side: str = "") -> str:
    """Name of a tensor of rows; ``side`` is REFERENCE, TRUTH, or "" for the model's own images."""
    return "/".join(part for part in (benchmark, metric, side) if part)


def write_results(folder: Path, results: Results, rows: Mapping[str, Tensor]) -> Path:
    """Write both files; results.json, which pins the other by its hash, goes last."""
    write_atomically(folder / ROWS_FILE, save(on_cpu(rows)))
    digest = sha256_of(folder / ROWS_FILE)
    write_json(folder / RESULTS_FILE, {"format": FORMAT, "rows_sha256": digest, **asdict(results)})
    return folder / RESULTS_FILE


def read_results(source: str | Path) -> Results:
    """The results in a directory, or of a results.json.

    Raises: ResultsError when they are missing, foreign or malformed.
    """
    content, path = _content(source)
    with _named(path):
        wanted = {"format", "rows_sha256", *(one.name for one in fields(Results))}
        if content.keys() != wanted:
            raise ValueError(f"keys differ: {sorted(content.keys() ^ wanted)}")
        return Results(
            subject=_made(Subject, content["subject"]),
            drawing=_made(Drawing, content["drawing"]),
            machine=_dict(content["machine"], "machine"),
            benchmarks={
                name: _benchmark(entry)
                for name, entry in _dict(content["benchmarks"], "benchmarks").items()
            },
            created_by=str(content["created_by"]),
        )


def read_rows(source: str | Path) -> dict[str, Tensor]:
    """The rows that belong to results.

    Raises: ResultsError when they are missing or of other results.
    """
    content, path = _content(source)
    rows = path.with_name(ROWS_FILE)
    if not rows.is_file():
        raise ResultsError(f"{rows}: missing; copy it along with {RESULTS_FILE}")
    if sha256_of(rows) != content.get("rows_sha256"):
        raise ResultsError(f"{rows}: is not the file of {path}; copy both again")
    return read_tensors(rows, "cpu")


def _content(source: str | Path) -> tuple[dict[str, Any], Path]:
    path = Path(source)
    path = path / RESULTS_FILE if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResultsError(f"{path}: no such file; `varc evaluate` writes one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ResultsError(f"{path}: not readable ({error}); evaluate again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ResultsError(f"{path}: not of format {FORMAT!r}; evaluate again")
    return content, path


def _benchmark(entry: Any) -> BenchmarkResult:
    entry = dict(_dict(entry, "benchmark"))
    for name, make in (("metrics", _metric), ("reference", _metric), ("changes", _change)):
        parts = _dict(entry.get(name), name)
        entry[name] = {key: make(part) for key, part in parts.items()}
    if not isinstance(entry.get("failed"), list):
        raise ValueError("failed is no list")
    entry["failed"] = [_made(Failure, one) for one in entry["failed"]]
    return _made(BenchmarkResult, entry)


def _metric(entry: Any) -> MetricResult:
    found = _numbered(_made(MetricResult, entry))
    return replace(found, by_size=[_made(SizedFrechet, one) for one in found.by_size])


def _change(entry: Any) -> Change:
    return _numbered(_made(Change, entry))


def _numbered(found: T) -> T:
    for name in ("value", "low", "high"):
        if not isinstance(number := getattr(found, name), int | float):
            raise ValueError(f"{name} is {number!r}, expected a number")
    return found


def _made(cls: type[T], entry: Any) -> T:
    entry = _dict(entry, cls.__name__)
    known = {one.name for one in fields(cls)}  # type: ignore[arg-type]
    if differing := sorted(known ^ entry.keys()):
        raise ValueError(f"{cls.__name__}: {differing[0]} is missing or foreign")
    return cls(**entry)


def _dict(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {type(value).__name__}, expected dict")
    return value


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ResultsError(f"{path}: malformed: {error}; evaluate again") from None
