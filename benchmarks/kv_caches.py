"""Compare KV caches of Infinity-Tiny on held-out captions, with full-precision and W4A4 weights.

    python benchmarks/kv_caches.py --out out/kv-caches
    python benchmarks/kv_caches.py --out out/quick --num-captions 8 --weights full --caches int8 \\
        --resamples 100 --frechet-resamples 10

Every cache draws the same captions of test scenes with the same seeds, and is compared with the
32-bit cache of the same weights: what it draws, pixel by pixel, what it would draw next given that
cache's bits, and what the reader sees in its images. Bytes are those allocated for one image with
guidance. Rows that stand finished in --out are not measured again; the W4A4 weights are made once.
Progress goes to stderr, Markdown tables to stdout, all numbers to OUT/results.json.

One row more is the 32-bit cache with outputs off by one part in a million. Inputs rounded to 4 bits
on the fly turn any difference into other codes here and there: no cache of W4A4 weights can be
expected to agree with the 32-bit one much better than this row does.

Brackets are 95 % intervals by bootstrap over the images, as in variants.py.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from load import commit
from torch import Tensor
from variants import (
    ABSENT,
    COLLECT,
    MODEL,
    Row,
    estimate_cell,
    machine,
    markdown,
    new_exam,
    progress,
    settings_of,
)

from var_compressor.artifact import is_artifact, write_json
from var_compressor.compress import collection_of, open_pipeline, quantize
from var_compressor.evaluation.agreement import BitAgreement
from var_compressor.evaluation.comparison import (
    Exam,
    Examined,
    compare,
    examine,
    forced_agreement,
)
from var_compressor.layers.kv_cache import PlainCache
from var_compressor.models.schedule import Level, Schedule
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.kv_calibration import calibrate_kv
from var_compressor.recipe import Recipe, load_recipe
from var_compressor.spec import KVSpec

WEIGHTS = {"full": "full precision", "w4a4": "SVDQuant W4A4"}
PLAIN, FLOOR = "32-bit", "32-bit-noise"
NOISE = 1e-6


@dataclass(frozen=True)
class Cache:
    """A row of the table, and how its cache is made; None for those of 32 bits."""

    title: str
    spec: KVSpec | None


# three quarters of the 8-bit cache of one image of Infinity-Tiny
_MIXED_BYTES = 3 * 2 * 2 * 265 * 256 * 8 // 4

CACHES = {
    PLAIN: Cache("32-bit", None),
    FLOOR: Cache("32-bit, outputs off by 1e-6", None),
    # every level in the format's 16-bit part
    "bf16": Cache("bf16", KVSpec(dynamic=True, plain_levels=15)),
    "int8": Cache("INT8", KVSpec()),
    "int8-unweighted": Cache("INT8, plain MSE", KVSpec(weighting="none")),
    "int8-shared": Cache("INT8, the original's percentile", KVSpec(mode="shared_percentile")),
    "int8-dynamic": Cache("INT8, scales per level", KVSpec(dynamic=True)),
    "fp8": Cache("FP8", KVSpec("fp8")),
    "int4": Cache("INT4", KVSpec("int4")),
    "int4-unweighted": Cache("INT4, plain MSE", KVSpec("int4", weighting="none")),
    "int4-dynamic": Cache("INT4, scales per level", KVSpec("int4", dynamic=True)),
    "int4-plain-4": Cache("INT4, 4 levels in 16 bits", KVSpec("int4", plain_levels=4)),
    "mixed": Cache("8 and 4 bits, 3/4 of INT8", KVSpec(budget=str(_MIXED_BYTES))),
    "mixed-dynamic": Cache(
        "8 and 4 bits, scales per level, 3/4 of INT8",
        KVSpec(dynamic=True, budget=str(_MIXED_BYTES)),
    ),
    **{
        f"{name}-keep-{percent}": Cache(
            f"{title}, {percent} % kept", KVSpec(format, dynamic=dynamic, keep=percent / 100)
        )
        for name, title, format, dynamic in (
            ("int8", "INT8", "int8", False),
            ("int4", "INT4", "int4", False),
            ("int4-dynamic", "INT4, scales per level", "int4", True),
        )
        for percent in (50, 25, 10)
    },
}


class NoisyCache(PlainCache):
    """The plain cache with outputs off by about what another order of sums does; repeatable."""

    def attend_level(self, layer: int, level: Level, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        generator = torch.Generator(q.device).manual_seed(100 * layer + level.index)
        noise = torch.randn(q.shape, generator=generator, device=q.device)
        return super().attend_level(layer, level, q, k, v) * (1 + NOISE * noise)


class NoisyPipeline(InfinityPipeline):
    """A pipeline whose cache is noisy."""

    def new_cache(self, schedule: Schedule, *, rows: int) -> NoisyCache:
        model = self.transformer
        return NoisyCache(
            model.config, schedule, rows=rows, dtype=model.block_dtype, device=self.device
        )


@torch.inference_mode()
def main() -> None:
    args = parse_arguments()
    # full precision means it, also for convolutions on a GPU
    torch.backends.cudnn.allow_tf32 = False
    overrides = [f"model.device={args.device}", "model.dtype=float32", *args.set]
    base = load_recipe([MODEL, COLLECT, "recipes/svdquant/int4.yaml"], overrides)
    settings, rows = settings_of(args), []
    exam: Exam | None = None
    truth: Examined | None = None
    for weights in args.weights:
        caches = {name: CACHES[name] for name in (PLAIN, FLOOR, *args.caches)}
        paths = {
            name: row_path(args.out, weights, name, base, settings, cache.spec)
            for name, cache in caches.items()
        }
        if not all(path.is_file() for path in paths.values()):
            exam = exam or new_exam(base, settings, batch=args.batch)
            pipeline = open_weights(weights, base, args.out)
            reference = examine(pipeline, exam, on_progress=progress(f"{weights} {PLAIN}"))
            truth = truth or (
                reference
                if weights == "full"
                else examine(open_pipeline(base.model), exam, on_progress=progress("full"))
            )
            measure_missing(weights, reference, truth, caches, paths, base, exam)
        rows += [json.loads(path.read_text()) for path in paths.values()]
    write_json(args.out / "results.json", {"settings": settings, "batch": args.batch, "rows": rows})
    print("\n\n".join(tables(rows)))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    others = [name for name in CACHES if name not in (PLAIN, FLOOR)]
    parser.add_argument("--out", type=Path, required=True, help="folder of results and artifacts")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--caches", nargs="+", choices=others, default=others)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe"
    )
    parser.add_argument("--num-captions", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0, help="of the first image; the next is +1")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--batch", type=int, default=32, help="images drawn at once")
    parser.add_argument("--resamples", type=int, default=10_000)
    parser.add_argument("--frechet-resamples", type=int, default=200)
    return parser.parse_args()


# --- measuring ------------------------------------------------------------------------------------


def row_path(
    out: Path,
    weights: str,
    name: str,
    base: Recipe,
    settings: Mapping[str, Any],
    spec: KVSpec | None,
) -> Path:
    asked = [base.to_dict(), settings, None if spec is None else asdict(spec)]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
    return out / f"{weights}-{name}-{digest}.json"


def open_weights(weights: str, base: Recipe, out: Path) -> InfinityPipeline:
    """The model with these weights; compressed ones are kept in --out, by their recipe."""
    if weights == "full":
        return open_pipeline(base.model)
    text = json.dumps(base.to_dict(), sort_keys=True)
    artifact = out / "artifacts" / f"{weights}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    if not is_artifact(artifact):
        quantize(base, artifact, on_progress=progress(weights))
    return open_pipeline(replace(base.model, path=str(artifact)))


def measure_missing(
    weights: str,
    reference: Examined,
    truth: Examined,
    caches: Mapping[str, Cache],
    paths: Mapping[str, Path],
    base: Recipe,
    exam: Exam,
) -> None:
    """``truth`` is full precision with the 32-bit cache, whatever the weights."""
    for name, cache in caches.items():
        if paths[name].is_file():
            continue
        row = {"title": cache.title, "weights": WEIGHTS[weights], "cache": name}
        row |= {"machine": machine(), "commit": commit()}
        if name == FLOOR:
            measured, pipeline = measure_floor(f"{weights} {name}", reference, exam)
        else:
            measured, pipeline = measure(f"{weights} {name}", cache.spec, reference, base, exam)
        agreement = forced_agreement(truth, pipeline, exam, on_progress=progress(name))
        write_json(paths[name], row | measured | {"truth_agreement": asdict(agreement)})


UNCALIBRATED = ("spec", "output_snr_db", "attention_kept", "calibrate_seconds")


def measure_floor(
    name: str, reference: Examined, exam: Exam
) -> tuple[dict[str, Any], InfinityPipeline]:
    """``measure`` of the noisy 32-bit cache."""
    own = reference.pipeline
    pipeline = NoisyPipeline(own.transformer, own.vae, own.text_encoder)
    found = compare(reference, pipeline, exam, on_progress=progress(name))
    told = {"bytes_per_image": bytes_per_image(pipeline)}
    return dict.fromkeys(UNCALIBRATED) | told | asdict(found), pipeline


def measure(
    name: str, spec: KVSpec | None, reference: Examined, base: Recipe, exam: Exam
) -> tuple[dict[str, Any], InfinityPipeline]:
    """What a row says, None where it does not apply; and the model with that cache."""
    if spec is None:
        row = {
            **dict.fromkeys(("likeness", "agreement", *UNCALIBRATED)),
            "bytes_per_image": bytes_per_image(reference.pipeline),
            "marks": asdict(reference.marks),
        }
        return row, reference.pipeline
    began = perf_counter()
    found = calibrate_kv(
        reference.pipeline, collection_of(base.collect), spec, on_progress=progress(name)
    )
    seconds = perf_counter() - began
    # the same weights; only the cache is another
    pipeline = copy.copy(reference.pipeline)
    pipeline.kv_params = found.params
    layers = found.kv["layers"]
    row = {
        "spec": asdict(spec),
        "bytes_per_image": bytes_per_image(pipeline),
        "output_snr_db": sum(layer["output_snr_db"] for layer in layers) / len(layers),
        "attention_kept": sum(layer["attention_kept"] for layer in layers) / len(layers),
        "calibrate_seconds": seconds,
        **asdict(compare(reference, pipeline, exam, on_progress=progress(name))),
    }
    return row, pipeline


def bytes_per_image(pipeline: InfinityPipeline) -> int:
    """Of the cache with guidance."""
    return pipeline.new_cache(pipeline.schedule_for(1.0, None), rows=2).num_bytes


# --- showing --------------------------------------------------------------------------------------


def tables(rows: Sequence[Row]) -> list[str]:
    """Markdown: for every kind of weights, likeness to the 32-bit cache and quality."""
    found = []
    for title in dict.fromkeys(row["weights"] for row in rows):
        own = [row for row in rows if row["weights"] == title]
        found.append(markdown((title, *LIKENESS), [likeness_cells(row) for row in own]))
        found.append(markdown((title, *QUALITY), [quality_cells(row) for row in own]))
    return found


LIKENESS = (
    *("KiB per image", "attention kept, %", "output SNR, dB", "bits equal, %"),
    *("KL, millinats per bit", "PSNR, dB", "SSIM", "bits equal to full precision, %"),
)


def likeness_cells(row: Row) -> list[str]:
    agreement, likeness = row["agreement"], row["likeness"]
    found = None if agreement is None else BitAgreement(**agreement)
    kept, snr = row["attention_kept"], row["output_snr_db"]
    return [
        row["title"],
        f"{row['bytes_per_image'] / 2**10:.0f}",
        ABSENT if kept is None else f"{100 * kept:.1f}",
        ABSENT if snr is None else f"{snr:.1f}",
        ABSENT if found is None else f"{100 * found.mean_same_bit:.2f}",
        ABSENT if found is None else f"{1000 * found.mean_kl_nats:.3f}",
        estimate_cell(likeness, "psnr_db", digits=2),
        estimate_cell(likeness, "ssim", digits=3),
        f"{100 * BitAgreement(**row['truth_agreement']).mean_same_bit:.2f}",
    ]


QUALITY = (
    *("objects right, %", "change", "captions right, %", "change"),
    *("Fréchet distance", "change", "calibrated in, s"),
)


def quality_cells(row: Row) -> list[str]:
    marks, likeness, seconds = row["marks"], row["likeness"], row["calibrate_seconds"]
    return [
        row["title"],
        estimate_cell(marks, "objects_right", digits=1, factor=100),
        estimate_cell(likeness, "objects_right_change", digits=1, factor=100),
        estimate_cell(marks, "captions_right", digits=1, factor=100),
        estimate_cell(likeness, "captions_right_change", digits=1, factor=100),
        estimate_cell(marks, "frechet", digits=3),
        estimate_cell(likeness, "frechet_change", digits=3),
        ABSENT if seconds is None else f"{seconds:.1f}",
    ]


if __name__ == "__main__":
    main()
