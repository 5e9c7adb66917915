"""Compare compressed Infinity-Tiny models with full precision on held-out captions.

    python benchmarks/variants.py --out out/variants
    python benchmarks/variants.py --out out/quick --num-captions 8 --variants naive svdquant \\
        --set quant.smooth.num_grids=2 --set quant.low_rank.max_iters=1

Every model draws the same captions of test scenes with the same seeds. Rows that stand finished in
--out are not measured again; a row belongs to its recipe and settings, whatever code made it. Two
further rows are the noise floor: full precision with other seeds. Progress goes to stderr, Markdown
tables to stdout, all numbers to OUT/results.json.

Brackets are 95 % intervals by bootstrap over the images: of the mean; of the paired difference to
full precision; and, for the Fréchet distance to renders of other scenes, of the spread of resamples
around their mean, because resampling itself raises a distance. Renders stay the same in all of
them. The cache of keys and values has 32 bits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from load import commit

from var_compressor.artifact import write_json
from var_compressor.compress import choose_device, collection_of, open_pipeline, quantize
from var_compressor.doctor import examine as examine_machine
from var_compressor.evaluation.agreement import BitAgreement
from var_compressor.evaluation.comparison import (
    Exam,
    Examined,
    Resampling,
    compare,
    examine,
    likeness,
    render_features,
)
from var_compressor.evaluation.demo import transformer_bytes
from var_compressor.evaluation.reader import Reader
from var_compressor.evaluation.scenes import sample_scenes
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.calibration import Progress
from var_compressor.quant.report import final_snr_db, read_report
from var_compressor.recipe import Recipe, load_recipe

SPLIT = "test"
COLLECT = "recipes/collect/tiny.yaml"
MODEL = "recipes/model/infinity-tiny.yaml"
FULL = "full"
# row -> what is added to the seed
OTHER_SEEDS = {"other-seeds-1": 10_000, "other-seeds-2": 20_000}


@dataclass(frozen=True)
class Variant:
    """A row of the table that is compressed, and the recipes and key=value it is made by."""

    title: str
    recipes: tuple[str, ...]
    overrides: tuple[str, ...] = ()


def _svdquant(title: str, *names: str) -> Variant:
    return Variant(title, (MODEL, COLLECT, *(f"recipes/svdquant/{name}.yaml" for name in names)))


def _ablation(title: str, name: str) -> Variant:
    model = f"recipes/model/infinity-tiny-{name}.yaml"
    return Variant(title, (model, COLLECT, "recipes/svdquant/int4.yaml"))


VARIANTS = {
    "naive": _ablation("naive W4A4", "naive"),
    "smoothquant": _ablation("SmoothQuant W4A4", "smoothquant"),
    "svdquant": _svdquant("SVDQuant W4A4", "int4"),
    "gptq": _svdquant("SVDQuant W4A4 + GPTQ", "int4", "gptq"),
    "signed": replace(
        _svdquant("SVDQuant W4A4, signed fc2 inputs", "int4"),
        overrides=("quant.exceptions=[{pattern: ffn.fc2, act: sint4}]",),
    ),
    "w4a8": _svdquant("W4A8", "w4a8"),
    "w4a16": _svdquant("W4A16", "w4a16"),
    "int8": _svdquant("INT8 (W8A8)", "int8"),
    "nvfp4": _svdquant("NVFP4", "nvfp4"),
}


@torch.inference_mode()
def main() -> None:
    args = parse_arguments()
    # full precision means it, also for convolutions on a GPU
    torch.backends.cudnn.allow_tf32 = False
    overrides = [f"model.device={args.device}", "model.dtype=float32", *args.set]
    chosen = {name: VARIANTS[name] for name in args.variants}
    recipes = {
        name: load_recipe(variant.recipes, (*variant.overrides, *overrides))
        for name, variant in chosen.items()
    }
    base = load_recipe([MODEL, COLLECT], overrides)
    settings = settings_of(args)
    wanted = dict.fromkeys((FULL, *OTHER_SEEDS), base) | recipes
    paths = {name: row_path(args.out, name, recipe, settings) for name, recipe in wanted.items()}
    failed = measure_missing(wanted, paths, settings, args)
    rows = [json.loads(path.read_text()) for path in paths.values() if path.is_file()]
    results = {"settings": settings, "batch": args.batch, "failed": failed, "rows": rows}
    write_json(args.out / "results.json", results)
    print("\n\n".join(tables(rows)))
    sys.exit(1 if failed else 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of results and artifacts")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of every variant's recipe"
    )
    parser.add_argument("--num-captions", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0, help="of the first image; the next is +1")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--batch", type=int, default=32, help="images drawn at once")
    parser.add_argument("--resamples", type=int, default=10_000)
    parser.add_argument("--frechet-resamples", type=int, default=200)
    return parser.parse_args()


# --- measuring ------------------------------------------------------------------------------------


def measure_missing(
    wanted: Mapping[str, Recipe],
    paths: Mapping[str, Path],
    settings: Mapping[str, Any],
    args: argparse.Namespace,
) -> dict[str, str]:
    """Write every row that has no file yet; the errors of those that could not be made."""
    missing, failed = [name for name, path in paths.items() if not path.is_file()], {}
    if not missing:
        return {}
    base = wanted[FULL]
    exam = new_exam(base, settings, batch=args.batch)
    full = examine(open_pipeline(base.model), exam, on_progress=progress(FULL))
    for name in missing:
        try:
            row = measure(name, wanted[name], full, exam, args.out / "artifacts")
        except ValueError as error:
            failed[name] = str(error)
            print(f"{name}: left out: {error}", file=sys.stderr)
            continue
        asked = {"name": name, "settings": settings, "recipe": wanted[name].to_dict()}
        write_json(paths[name], asked | row)
    return failed


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a row depends on besides its recipe."""
    return {
        "split": SPLIT,
        "num_captions": args.num_captions,
        "seed": args.seed,
        "num_resamples": args.resamples,
        "num_frechet_resamples": args.frechet_resamples,
    }


def row_path(out: Path, name: str, recipe: Recipe, settings: Mapping[str, Any]) -> Path:
    asked = json.dumps([recipe.to_dict(), settings], sort_keys=True)
    return out / f"{name}-{hashlib.sha256(asked.encode()).hexdigest()[:12]}.json"


def new_exam(base: Recipe, settings: Mapping[str, Any], *, batch: int) -> Exam:
    """Captions of the first test scenes, judged against renders of the next as many."""
    count, device = settings["num_captions"], choose_device(base.model.device)
    reader = Reader.load().to(device)
    others_N = torch.arange(count, 2 * count, device=device)
    return Exam(
        scenes=sample_scenes(torch.arange(count), SPLIT),
        seed=settings["seed"],
        sampling=collection_of(base.collect).sampling,
        batch=batch,
        reader=reader,
        renders_NF=torch.cat(
            [render_features(reader, sample_scenes(ids, SPLIT)) for ids in others_N.split(batch)]
        ),
        resampling=Resampling(
            settings["num_resamples"], settings["num_frechet_resamples"], settings["seed"]
        ),
    )


def measure(
    name: str, recipe: Recipe, full: Examined, exam: Exam, artifacts: Path
) -> dict[str, Any]:
    """All that a row says, as JSON takes it; None where it does not apply."""
    row = {
        "title": "full precision",
        "machine": machine(),
        "commit": commit(),
        "transformer_bytes": transformer_bytes(full.pipeline),
        "marks": asdict(full.marks),
        **dict.fromkeys(("likeness", "agreement", "output_snr_db", "quantize_seconds")),
    }
    if name == FULL:
        return row
    if name in OTHER_SEEDS:
        shifted = replace(exam, seed=exam.seed + OTHER_SEEDS[name])
        found = examine(full.pipeline, shifted, on_progress=progress(name))
        changed = {"marks": asdict(found.marks), "likeness": asdict(likeness(found, full, exam))}
        return row | {"title": f"full precision, seeds + {OTHER_SEEDS[name]}", **changed}
    return row | measure_compressed(name, recipe, full, exam, artifacts / name)


def measure_compressed(
    name: str, recipe: Recipe, full: Examined, exam: Exam, artifact: Path
) -> dict[str, Any]:
    shutil.rmtree(artifact, ignore_errors=True)
    began = perf_counter()
    quantize(recipe, artifact, on_progress=progress(name))
    seconds = perf_counter() - began
    report, _ = read_report(artifact)
    pipeline = InfinityPipeline.from_pretrained(
        artifact, dtype=torch.float32, device=full.pipeline.device
    )
    return {
        "title": VARIANTS[name].title,
        "summary": recipe.quant.summary(),
        "transformer_bytes": transformer_bytes(pipeline),
        "output_snr_db": final_snr_db(report),
        "quantize_seconds": seconds,
        **asdict(compare(full, pipeline, exam, on_progress=progress(name))),
    }


def machine() -> dict[str, Any]:
    found = examine_machine()
    devices = [f"{device.name}: {device.description}" for device in found.devices]
    known = {key: getattr(found, key) for key in ("platform", "num_cpus", "python", "cuda")}
    return {"devices": devices, **known, "torch": torch.__version__}


def progress(name: str) -> Progress:
    def show(stage: str, done: int, total: int) -> None:
        if done == total or sys.stderr.isatty():
            end = "\n" if done == total else "\r"
            print(f"{name}: {stage} {done}/{total}", end=end, file=sys.stderr, flush=True)

    return show


# --- showing --------------------------------------------------------------------------------------

Row = Mapping[str, Any]
ABSENT = "–"


def tables(rows: Sequence[Row]) -> list[str]:
    """Markdown: likeness to full precision, quality of the pictures, agreement by level."""
    found = [
        markdown(LIKENESS, [likeness_cells(row) for row in rows]),
        markdown(QUALITY, [quality_cells(row) for row in rows]),
    ]
    if forced := [row for row in rows if row["agreement"] is not None]:
        num_levels = len(forced[0]["agreement"]["same_bit"])
        header = ["bits equal, % (KL, millinats)", *(f"level {i}" for i in range(num_levels))]
        found.append(markdown(header, [level_cells(row) for row in forced]))
    return found


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


LIKENESS = (
    *("", "output SNR, dB: mean (min)", "bits equal, %", "KL, millinats per bit"),
    *("PSNR, dB", "SSIM", "latent error, %"),
)


def likeness_cells(row: Row) -> list[str]:
    snr, agreement, likeness = row["output_snr_db"], row["agreement"], row["likeness"]
    found = None if agreement is None else BitAgreement(**agreement)
    return [
        row["title"],
        ABSENT if snr is None else f"{snr['mean']:.1f} ({snr['min']:.1f})",
        ABSENT if found is None else f"{100 * found.mean_same_bit:.2f}",
        ABSENT if found is None else f"{1000 * found.mean_kl_nats:.2f}",
        estimate_cell(likeness, "psnr_db", digits=2),
        estimate_cell(likeness, "ssim", digits=3),
        estimate_cell(likeness, "latent_error", digits=1, factor=100),
    ]


QUALITY = (
    *("", "objects right, %", "change", "captions right, %", "change"),
    *("Fréchet distance", "change", "transformer, MiB", "quantized in, s"),
)


def quality_cells(row: Row) -> list[str]:
    marks, likeness, seconds = row["marks"], row["likeness"], row["quantize_seconds"]
    return [
        row["title"],
        estimate_cell(marks, "objects_right", digits=1, factor=100),
        estimate_cell(likeness, "objects_right_change", digits=1, factor=100),
        estimate_cell(marks, "captions_right", digits=1, factor=100),
        estimate_cell(likeness, "captions_right_change", digits=1, factor=100),
        estimate_cell(marks, "frechet", digits=3),
        estimate_cell(likeness, "frechet_change", digits=3),
        f"{row['transformer_bytes'] / 2**20:.2f}",
        ABSENT if seconds is None else f"{seconds:.0f}",
    ]


def level_cells(row: Row) -> list[str]:
    pairs = zip(row["agreement"]["same_bit"], row["agreement"]["kl_nats"], strict=True)
    return [row["title"], *(f"{100 * same:.2f} ({1000 * kl:.2f})" for same, kl in pairs)]


def estimate_cell(
    part: Mapping[str, Any] | None, name: str, *, digits: int, factor: float = 1
) -> str:
    """The value and its interval; absent where nothing was measured."""
    if part is None or part[name] is None:
        return ABSENT
    value, low, high = (f"{factor * part[name][k]:.{digits}f}" for k in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


if __name__ == "__main__":
    main()
