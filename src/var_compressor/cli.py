"""The command `varc`: one sub-command is one short function, heavy imports inside it.

`varc --help` must answer at once, so nothing above a function body may import torch.
"""

from __future__ import annotations

import errno
import os
import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from var_compressor import __version__
from var_compressor.terminal import (
    byte_progress,
    print_bench,
    print_memory_plan,
    print_plan,
    print_run,
    print_table,
    progress,
)

if TYPE_CHECKING:
    import torch

    from var_compressor.models.convert import WriteOptions
    from var_compressor.models.directory import OnTensor
    from var_compressor.recipe import Recipe

INTERRUPTED = 130
FAILED = 2
MAX_SEED = 2**63 - 1
BENCH_PROMPT = "a large red metal cube on a wooden floor."

app = typer.Typer(
    name="varc",
    help="Compress Infinity text-to-image models to 4 bits and draw images with them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tell what this machine can run, and why.

    Example: varc doctor --json
    """
    import json

    from var_compressor.doctor import examine, to_text

    report = examine()
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else to_text(report))


class StoredDtype(str, Enum):
    """How blocks and VAE are written; everything else stays float32."""

    bf16 = "bf16"
    fp32 = "fp32"


_Out = Annotated[Path, typer.Option("--out", help="Directory to write; must be new or empty.")]
_Dtype = Annotated[StoredDtype, typer.Option(help="Dtype of blocks and VAE.")]
_Overwrite = Annotated[bool, typer.Option(help="Replace a model that is there already.")]


@app.command()
def convert(
    model: Annotated[str, typer.Option(help="infinity-2b, infinity-8b, …")],
    transformer: Annotated[Path, typer.Option(help="Official .pth, or a folder of shards.")],
    vae: Annotated[Path, typer.Option(help="Official VAE .pth.")],
    out: _Out,
    text_encoder: Annotated[
        str, typer.Option(help="flan-t5-xl folder or hub id.")
    ] = "google/flan-t5-xl",
    copy_text_encoder: Annotated[
        bool, typer.Option(help="Copy the T5 folder; without it, the directory refers to it.")
    ] = False,
    dtype: _Dtype = StoredDtype.bf16,
    overwrite: _Overwrite = False,
) -> None:
    """Turn official checkpoint files into a model directory.

    Example: varc convert --model infinity-2b --transformer infinity_2b_reg.pth
    --vae infinity_vae_d32reg.pth --text-encoder google/flan-t5-xl --out infinity-2b
    """
    from var_compressor.models.convert import convert_official, model_config, num_bytes

    config = model_config(model)
    total = num_bytes(config, _torch_dtype(dtype), with_vae=True, with_text_encoder=False)
    with byte_progress("converting", total) as on_tensor:
        convert_official(
            config,
            out,
            transformer=transformer,
            vae=vae,
            text_encoder=text_encoder,
            copy_text_encoder=copy_text_encoder,
            options=_write_options(dtype, overwrite, on_tensor),
        )
    typer.echo(f"wrote {out}")
    if not copy_text_encoder:
        typer.echo(f"its text encoder stays at {text_encoder} (--copy-text-encoder copies it)")


@app.command()
def init(
    model: Annotated[str, typer.Argument(help="infinity-2b, infinity-8b, …")],
    out: _Out,
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
    vae: Annotated[bool, typer.Option(help="Write a VAE too.")] = True,
    text_encoder: Annotated[
        bool,
        typer.Option("--text-encoder", help="Write a random T5 too, with Infinity-Tiny's words."),
    ] = False,
    dtype: _Dtype = StoredDtype.bf16,
    overwrite: _Overwrite = False,
) -> None:
    """Write a random model of an exact architecture, for memory and speed work.

    Example: varc init infinity-8b --no-vae --out random-8b
    """
    from var_compressor.models.convert import init_random, model_config, num_bytes

    config = model_config(model)
    parts = {"with_vae": vae, "with_text_encoder": text_encoder}
    total = num_bytes(config, _torch_dtype(dtype), **parts)
    with byte_progress("writing", total) as on_tensor:
        options = _write_options(dtype, overwrite, on_tensor)
        init_random(config, out, seed=seed, **parts, options=options)
    typer.echo(f"wrote {out}")


@app.command("inspect")
def inspect_command(
    path: Annotated[Path, typer.Argument(help="File, directory, or infinity-tiny.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    hashes: Annotated[bool, typer.Option("--hashes", help="Add the files' sha256.")] = False,
) -> None:
    """Tell what a checkpoint, model directory or artifact is: parts, sizes, provenance.

    Example: varc inspect infinity-tiny --json
    """
    import json

    from var_compressor.artifact import inspect_artifact, is_artifact, is_unfinished
    from var_compressor.models.inspection import inspect_path, to_text

    inspect = inspect_artifact if is_artifact(path) or is_unfinished(path) else inspect_path
    found = inspect(path, with_hashes=hashes)
    typer.echo(json.dumps(found.to_dict(), indent=2) if as_json else to_text(found))


def _torch_dtype(dtype: StoredDtype) -> torch.dtype:
    import torch

    return {StoredDtype.bf16: torch.bfloat16, StoredDtype.fp32: torch.float32}[dtype]


def _write_options(dtype: StoredDtype, overwrite: bool, on_tensor: OnTensor) -> WriteOptions:
    from var_compressor.models.convert import WriteOptions

    return WriteOptions(_torch_dtype(dtype), overwrite=overwrite, on_tensor=on_tensor)


@app.command()
def quantize(
    recipes: Annotated[
        list[str], typer.Argument(help="Recipe files, then key=value; later ones win.")
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Artifact directory to write.")] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Show the resolved recipe, and stop.")
    ] = False,
    plan_only: Annotated[
        bool, typer.Option("--plan", help="Show what becomes of each linear, and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    gpu_activations: Annotated[
        str | None,
        typer.Option(help="Hidden states kept on the GPU, e.g. 4GiB; 40 % of it by default."),
    ] = None,
    ram_activations: Annotated[
        str | None,
        typer.Option(help="Hidden states kept in RAM, then on disk; half of what is free."),
    ] = None,
) -> None:
    """Compress a model: 4-bit weights and activations with a low-rank branch (SVDQuant).

    Example: varc quantize recipes/model/infinity-tiny.yaml recipes/collect/tiny.yaml
    recipes/svdquant/int4.yaml --out out/tiny-w4a4

    One block at a time is in memory. A run that was cut off goes on when the same command is given
    again. Several GPUs: torchrun --nproc-per-node N --no-python varc quantize …
    """
    recipe = _load_recipe(recipes)
    if print_config:
        typer.echo(recipe.to_yaml(), nl=False)
        return
    if out is None and not plan_only:
        raise ValueError("--out is missing; name the directory to write the artifact to")
    from var_compressor.compress import quantize as run
    from var_compressor.compress import transformer_config
    from var_compressor.quant.activations import MemoryBounds
    from var_compressor.quant.plan import plan
    from var_compressor.quant.team import team_of_environment

    planned = plan(recipe.quant, transformer_config(recipe.model, may_be_absent=plan_only))
    if out is None or plan_only:
        print_plan(planned, as_json=as_json, stderr=False)
        return
    memory = MemoryBounds.of(gpu=gpu_activations, ram=ram_activations)
    with team_of_environment() as team:
        if team.is_first:
            print_plan(planned, as_json=False, stderr=True)
        with progress(quiet=not team.is_first) as on_progress:
            manifest = run(recipe, out, on_progress=on_progress, memory=memory, team=team)
    if not team.is_first:
        return
    print_run(out, planned.before_bytes, manifest.num_weight_bytes, as_json=as_json)
    if recipe.quant.kv.format != "bf16" and not as_json:
        typer.echo(f"next: varc calibrate-kv {shlex.join(recipes)} --artifact {out}")


class KVFile(str, Enum):
    """How calibrated KV ranges are written."""

    safetensors = "safetensors"
    pt = "pt"


@app.command("calibrate-kv")
def calibrate_kv(
    recipes: Annotated[list[str], typer.Argument(help="Recipe files, then key=value.")],
    artifact: Annotated[
        Path | None,
        typer.Option("--artifact", help="Calibrate this artifact, and add the result to it."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Directory for the result alone, for `generate --kv`."),
    ] = None,
    kv_budget: Annotated[
        str | None,
        typer.Option(help="Bytes of one image's cache, e.g. 2GiB: bits and levels are chosen."),
    ] = None,
    file_format: Annotated[
        KVFile, typer.Option("--format", help="pt: kv_quant_calib.pt, as the original has it.")
    ] = KVFile.safetensors,
) -> None:
    """Find how to store the KV cache: ranges per head and channel, bits, and levels to keep.

    Example: varc calibrate-kv recipes/model/infinity-tiny.yaml recipes/collect/tiny.yaml
    --artifact out/tiny-w4a4 quant.kv.format=int4

    Without --artifact, the full-precision model of the recipe is calibrated.
    """
    from var_compressor.artifact import check_no_artifact
    from var_compressor.compress import calibrate_cache, store_cache
    from var_compressor.interop import kv_quant_calib
    from var_compressor.quant.kv_report import COLUMNS, choice_text, table_rows

    if artifact is None and out is None:
        raise ValueError("--artifact or --out is missing; name where the result goes")
    if file_format == KVFile.pt and out is None:
        raise ValueError(f"--format pt writes OUT/{kv_quant_calib.FILE}; give --out")
    budget = [] if kv_budget is None else [f'quant.kv.budget="{kv_budget}"']
    recipe = _load_recipe([*recipes, *budget])
    if file_format == KVFile.pt:
        kv_quant_calib.check_writable(recipe.quant.kv)
    if out is not None:
        check_no_artifact(out)
    with progress() as on_progress:
        found = calibrate_cache(recipe, artifact, on_progress=on_progress)
    print_table(COLUMNS, table_rows(found.kv), stderr=False)
    typer.echo(choice_text(found.kv))
    if file_format == KVFile.pt and out is not None:
        kv_quant_calib.write(out / kv_quant_calib.FILE, found)
        typer.echo(f"wrote {out / kv_quant_calib.FILE}")
        return
    for path in store_cache(found, artifact, out):
        typer.echo(f"wrote {path}")


class Compute(str, Enum):
    """How compressed linears are multiplied."""

    auto = "auto"
    w4a4 = "w4a4"
    w4a8 = "w4a8"
    w4a16 = "w4a16"
    bf16 = "bf16"


_Compute = Annotated[
    Compute, typer.Option(help="How 4-bit linears are multiplied; auto: what is fastest here.")
]
_LowMemory = Annotated[
    bool, typer.Option("--low-memory", help="Take the least memory, at some cost of time.")
]


@app.command("plan")
def plan_command(
    model: Annotated[
        str, typer.Option(help="infinity-2b, infinity-8b, …, a model directory, or an artifact.")
    ],
    budget: Annotated[str, typer.Option(help="Memory of the device, e.g. 8GiB.")],
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 1,
    aspect_ratio: Annotated[float, typer.Option(help="Height / width; nearest is taken.")] = 1.0,
    pixel_budget: Annotated[str | None, typer.Option(help="0.06M, 0.25M, 0.60M or 1M.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of the longest prompt.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Choose weights, cache, text encoder and steps that fit a device, and predict their peak.

    Example: varc plan --model infinity-8b --budget 8GiB
    """
    from var_compressor.footprint import Request
    from var_compressor.models.schedule import Schedule
    from var_compressor.planning import model_shape, plan_memory
    from var_compressor.quant.activations import parse_bytes

    shape, budget_bytes = model_shape(model), parse_bytes(budget)
    schedule = Schedule.of(aspect_ratio, pixel_budget or shape.transformer.pixel_budget)
    prompt_tokens = min(prompt_tokens, shape.transformer.text_maxlen)
    request = Request(schedule, batch, prompt_tokens)
    planned = plan_memory(shape, request, budget_bytes=budget_bytes)
    print_memory_plan(planned, as_json=as_json)
    if planned.missing_bytes:
        raise ValueError(
            f"{model} does not fit {budget}: the smallest setup lacks {planned.missing_bytes} "
            "bytes; give a larger budget, a smaller batch or a smaller pixel budget"
        )


@app.command()
def generate(
    prompt: Annotated[list[str], typer.Argument(help="One or more prompts.")],
    out: Annotated[Path, typer.Option("--out", help="PNG to write; with more prompts, x-0.png …")],
    model: Annotated[
        str, typer.Option(help="infinity-tiny, a model directory, an artifact, or a hub id.")
    ] = "infinity-tiny",
    kv: Annotated[
        Path | None,
        typer.Option(help="What `calibrate-kv --out` wrote: a directory, or kv_quant_calib.pt."),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Of the first image; the next gets seed + 1.")
    ] = 0,
    negative: Annotated[str | None, typer.Option(help="Negative prompt.")] = None,
    cfg: Annotated[float, typer.Option(help="Guidance; 1 is off.")] = 3.0,
    tau: Annotated[float, typer.Option(help="Temperature.")] = 0.5,
    top_p: Annotated[float, typer.Option(help="0 keeps every bit value.")] = 0.97,
    aspect_ratio: Annotated[float, typer.Option(help="Height / width; nearest is taken.")] = 1.0,
    pixel_budget: Annotated[str | None, typer.Option(help="0.06M, 0.25M, 0.60M or 1M.")] = None,
    prompt_cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps prompts' features between runs.")
    ] = None,
    release_text_encoder: Annotated[
        bool,
        typer.Option(
            "--release-text-encoder/--keep-text-encoder", help="Free its memory before drawing."
        ),
    ] = False,
    text_encoder_bits: Annotated[
        int, typer.Option(help="Of its weights: 16, 8 or 4; fewer take less memory.")
    ] = 16,
    strip_rows: Annotated[
        int | None, typer.Option(min=1, help="Decode in strips of so many rows, to save memory.")
    ] = None,
    compute: _Compute = Compute.auto,
    low_memory: _LowMemory = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = "auto",
) -> None:
    """Draw images, with a full-precision model or an artifact.

    Example: varc generate "a large red metal cube on a wooden floor." --seed 0 --out cube.png
    """
    from var_compressor.compress import choose_device, choose_dtype
    from var_compressor.evaluation.images import check_png_path, write_png
    from var_compressor.interop.kv_quant_calib import use_cache
    from var_compressor.models.sampling import Sampling
    from var_compressor.pipeline import InfinityPipeline

    chosen = choose_device(device)
    paths = [out]
    if len(prompt) > 1:
        paths = [out.with_stem(f"{out.stem}-{i}") for i in range(len(prompt))]
    for path in paths:
        check_png_path(path)
    pipeline = InfinityPipeline.from_pretrained(
        model,
        dtype=choose_dtype(dtype, chosen),
        device=chosen,
        text_encoder_cache=prompt_cache,
        text_encoder_bits=text_encoder_bits,
        compute=compute.value,
    )
    pipeline.records_graphs = False
    if low_memory:
        pipeline.save_memory()
    if kv is not None:
        use_cache(pipeline, kv)
    num_levels = len(pipeline.schedule_for(aspect_ratio, pixel_budget).levels)
    with progress() as on_progress:
        generation = pipeline.generate(
            prompt,
            seed=seed,
            sampling=Sampling(cfg=cfg, tau=tau, top_p=top_p),
            negative=None if negative is None else [negative] * len(prompt),
            aspect_ratio=aspect_ratio,
            pixel_budget=pixel_budget,
            text_encoder="release" if release_text_encoder else "keep",
            vae_strip_rows=strip_rows,
            on_level=lambda level, latent: on_progress("level", level.index + 1, num_levels),
        )
    shared = {
        "model": model,
        "kv": None if kv is None else str(kv),
        "cfg": cfg,
        "tau": tau,
        "top_p": top_p,
        "negative": negative,
    }
    shared |= {"aspect_ratio": aspect_ratio, "pixel_budget": pixel_budget}
    shared |= {"text_encoder_bits": text_encoder_bits}
    for i, (image, path) in enumerate(zip(generation.pil, paths, strict=True)):
        write_png(image, path, {"prompt": prompt[i], "seed": seed + i, **shared})
        typer.echo(f"wrote {path}")


class Baseline(str, Enum):
    """What a model is compared with."""

    bf16 = "bf16"
    none = "none"


@app.command()
def bench(
    model: Annotated[
        str, typer.Argument(help="As `generate --model`; a preset name with --shapes-only.")
    ],
    kv: Annotated[
        str | None,
        typer.Option(help="As `generate --kv`; int8 or int4 with --shapes-only."),
    ] = None,
    compute: _Compute = Compute.auto,
    low_memory: _LowMemory = False,
    baseline: Annotated[
        Baseline, typer.Option(help="bf16: the model at full precision, in turns (A B A B …).")
    ] = Baseline.bf16,
    prompt: Annotated[str, typer.Option(help="Drawn in every run.")] = BENCH_PROMPT,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the first image.")] = 0,
    runs: Annotated[int, typer.Option(min=1, help="Timed runs of each model.")] = 5,
    batch: Annotated[int, typer.Option(min=1, help="Images per run.")] = 1,
    aspect_ratio: Annotated[float, typer.Option(help="Height / width; nearest is taken.")] = 1.0,
    pixel_budget: Annotated[str | None, typer.Option(help="0.06M, 0.25M, 0.60M or 1M.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path, typer.Option("--out", help="Directory of the results.")] = Path(
        "out/bench"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    shapes_only: Annotated[
        bool, typer.Option("--shapes-only", help="Random weights of a preset, without files.")
    ] = False,
) -> None:
    """Time a model by stage and kind, measure its memory, and compare it with full precision.

    Example: varc bench out/tiny-w4a4 --runs 10 --out out/bench-tiny
    """
    from var_compressor.bench import sources
    from var_compressor.bench.session import Settings, benchmark
    from var_compressor.compress import choose_device, choose_dtype
    from var_compressor.interop.kv_quant_calib import use_cache
    from var_compressor.models.schedule import Schedule

    chosen = choose_device(device)
    dtype = choose_dtype("auto", chosen)
    Schedule.of(aspect_ratio, pixel_budget or "1M")
    choice = sources.Choice(
        model, kv, compute.value, low_memory, baseline is Baseline.bf16, chosen, dtype
    )
    found = sources.random(choice, seed=seed) if shapes_only else sources.saved(choice, use_cache)
    out.mkdir(parents=True, exist_ok=True)
    settings = Settings(prompt, batch, seed, runs, aspect_ratio, pixel_budget)
    with progress() as on_progress:
        result = benchmark(found, settings, device=chosen, dtype=dtype, on_progress=on_progress)
    print_bench(result, out, as_json=as_json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Directory for the artifact and page.")] = Path(
        "out/demo"
    ),
    num_prompts: Annotated[int, typer.Option(min=1, help="Images drawn by each model.")] = 48,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the first image.")] = 0,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value on top of the demo's recipe.")
    ] = None,
) -> None:
    """Compress Infinity-Tiny, draw the same prompts with both models, and compare them.

    Example: varc demo --num-prompts 8 quant.weight.rounding=gptq --out out/gptq
    """
    import json

    from rich.console import Console
    from rich.table import Table

    from var_compressor.evaluation.demo import (
        run_demo,
        table_rows,
        write_grid,
        write_json,
        write_page,
    )
    from var_compressor.models.sampling import Sampling

    recipe = _load_recipe(
        [
            "recipes/model/infinity-tiny.yaml",
            "recipes/collect/tiny.yaml",
            "recipes/svdquant/int4.yaml",
            *(overrides or []),
        ]
    )
    collect = recipe.collect
    sampling = Sampling(cfg=collect.cfg, tau=collect.tau, top_k=collect.top_k, top_p=collect.top_p)
    with progress() as on_progress:
        result = run_demo(
            recipe,
            out,
            num_prompts=num_prompts,
            seed=seed,
            sampling=sampling,
            on_progress=on_progress,
        )
    write_page(result, out / "index.html")
    write_grid(result, out / "grid.png", columns=min(8, num_prompts))
    write_json(result, out / "result.json")
    table = Table("Infinity-Tiny", "full precision", "compressed")
    for row in table_rows(result):
        table.add_row(*row)
    Console().print(table)
    typer.echo(f"page: {out / 'index.html'}")
    typer.echo(json.dumps(result.to_dict()))


def _load_recipe(words: list[str]) -> Recipe:
    from var_compressor.recipe import load_recipe, split_arguments

    return load_recipe(*split_arguments(words))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"var-compressor {__version__}")


def main() -> NoReturn:
    """Entry point: errors a user can mend are one line on stderr, and exit code 2."""
    try:
        app()
    except (KeyboardInterrupt, SystemExit) as stop:
        # typer turns Ctrl-C inside a command into this exit code, without a word
        code = INTERRUPTED if isinstance(stop, KeyboardInterrupt) else stop.code
        if code == INTERRUPTED:
            _fail("interrupted", code=INTERRUPTED)
        raise
    except (ValueError, OSError, RuntimeError) as error:
        line = _one_line(error)
        if line is None or os.environ.get("VARC_TRACEBACK") == "1":
            raise
        _fail(line, code=FAILED)
    sys.exit(0)


def _fail(line: str, *, code: int) -> NoReturn:
    typer.echo(f"varc: {line}", err=True)
    sys.exit(code)


def _one_line(error: BaseException) -> str | None:
    """What to tell the user; None for an error that is a fault of ours and needs a traceback."""
    # by name, because importing torch to ask would defeat the lazy imports
    if type(error).__name__ == "OutOfMemoryError":
        return "the GPU ran out of memory; try a smaller batch, or --device cpu"
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        if error.errno == errno.ENOSPC:
            return f"{place}no space left on the disk; free some and run the same command again"
        return f"{place}{error.strerror}"
    if isinstance(error, ValueError | OSError):
        return " ".join(str(error).split()) or type(error).__name__
    return None


if __name__ == "__main__":
    main()
