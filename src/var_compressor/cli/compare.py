"""Commands over several results: compare, ablate, reproduce."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from var_compressor.cli.app import FAILED, MAX_SEED, app
from var_compressor.terminal import print_table, progress

if TYPE_CHECKING:
    from var_compressor.evaluation.reproduce import BenchSpec, Timed
    from var_compressor.recipe import Recipe

TINY_RECIPES = (
    "recipes/model/infinity-tiny.yaml",
    "recipes/collect/tiny.yaml",
    "recipes/svdquant/int4.yaml",
)


def tell(line: str) -> None:
    typer.echo(line, err=True)


@app.command()
def compare(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="Directories that `varc evaluate` wrote; differences are to the first."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Directory for page, plots and JSON.")] = Path(
        "out/compare"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare results over the same prompts: paired differences, bytes, latency.

    Example: varc compare out/full out/w4a4 out/w4a4-kv8 --out out/compare
    """
    import json

    from var_compressor.evaluation import compare_page
    from var_compressor.evaluation.compare import METHOD, compare_all

    with progress() as on_progress:
        found = compare_all(results, on_progress=on_progress)
    written = compare_page.write_comparison(found, out)
    for benchmark in found.benchmarks:
        for columns, rows in compare_page.tables(benchmark):
            print_table(columns, rows, stderr=as_json)
        for note in benchmark.notes:
            typer.echo(f"note: {note}", err=as_json)
    typer.echo(METHOD, err=as_json)
    for path in written:
        typer.echo(f"wrote {path}", err=as_json)
    if as_json:
        typer.echo(json.dumps(found.to_dict()))


@app.command()
def ablate(
    recipes: Annotated[
        list[str] | None,
        typer.Argument(help="Recipe files, then key=value; Infinity-Tiny's if there is no file."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Directory of everything made.")] = Path(
        "out/ablation"
    ),
    benchmark: Annotated[str, typer.Option(help="tiny, MJHQ, DCI, or a prompt file.")] = "tiny",
    num_samples: Annotated[int, typer.Option(min=2, help="Images of every line.")] = 16,
    methods: Annotated[
        str, typer.Option(help="Separated by commas.")
    ] = "naive,smoothquant,svdquant",
    metrics: Annotated[
        str | None, typer.Option(help="Separated by commas; those that need no download.")
    ] = None,
    group_prompts: Annotated[
        int, typer.Option(min=2, help="Prompts that tell what each group of layers costs.")
    ] = 8,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of images and subset.")] = 0,
    data_root: Annotated[Path, typer.Option(help="Folder of MJHQ-30K and sDCI.")] = Path("data"),
    metric_weights: Annotated[
        Path | None, typer.Option(help="Folder of the networks that judge.")
    ] = None,
) -> None:
    """Measure each kind of quantization by itself: weights, inputs, cache; naive, smooth, SVDQuant.

    Example: varc ablate --num-samples 128 --out out/ablation

    A run that was cut off goes on when the same command is given again.
    """
    from var_compressor.evaluation import ablation, ablation_page
    from var_compressor.recipe import split_arguments

    files, overrides = split_arguments(recipes or [])
    grid = ablation.Grid(
        recipes=tuple(files) or TINY_RECIPES,
        overrides=tuple(overrides),
        methods=tuple(filter(None, methods.split(","))),
        benchmark=benchmark,
        metrics=tuple(filter(None, metrics.split(","))) if metrics else ablation.METRICS,
        num_samples=num_samples,
        group_prompts=group_prompts,
        seed=seed,
        data_root=data_root,
        metric_weights=metric_weights,
    )
    with progress() as on_progress:
        found = ablation.ablate(grid, out, on_progress=on_progress, tell=tell)
    for columns, rows in ablation_page.tables(found).values():
        print_table(columns, rows, stderr=False)
    for path in ablation_page.write_ablation(found, out):
        typer.echo(f"wrote {path}")


@app.command()
def reproduce(
    recipe: Annotated[
        Path, typer.Argument(help="recipes/reproduce/infinity-8b.yaml, or one of your own.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value on top of its recipes.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Directory of everything made.")] = Path(
        "out/reproduce"
    ),
    num_samples: Annotated[
        int | None, typer.Option(min=2, help="Other than the recipe says.")
    ] = None,
    data_root: Annotated[Path, typer.Option(help="Folder of MJHQ-30K and sDCI.")] = Path("data"),
    metric_weights: Annotated[
        Path | None, typer.Option(help="Folder of the networks that judge.")
    ] = None,
) -> None:
    """Measure a published table again: quantize, calibrate, evaluate, time; one page.

    Example: varc reproduce recipes/reproduce/infinity-8b.yaml model.path=models/infinity-8b

    What this machine lacks is listed before any work. A run that was cut off goes on when the same
    command is given again.
    """
    from dataclasses import replace

    from var_compressor.evaluation import reproduce as steps
    from var_compressor.evaluation import reproduce_page
    from var_compressor.recipe import load_recipe

    asked = steps.read_reproduction(recipe)
    if num_samples is not None:
        asked = replace(asked, num_samples=num_samples)
    merged = load_recipe(asked.recipes, overrides or [])
    places = steps.Places(data_root, metric_weights)
    if lacking := steps.missing(asked, merged, places):
        tell(f"varc: {recipe}: missing on this machine ({len(lacking)}):")
        for line in lacking:
            tell(f"- {line}")
        raise typer.Exit(FAILED)
    with progress() as on_progress:
        found = steps.reproduce(
            asked, merged, out, places, bench=_bench, on_progress=on_progress, tell=tell
        )
    print_table(*reproduce_page.main_table(found), stderr=False)
    for line in reproduce_page.lines(found):
        typer.echo(line)
    for path in reproduce_page.write_reproduction(found, out):
        typer.echo(f"wrote {path}")


def _bench(artifact: Path, recipe: Recipe, spec: BenchSpec, out: Path) -> Timed:
    """Time an artifact and full precision in turns, as `varc bench` does; details go to ``out``."""
    from var_compressor.artifact import write_json
    from var_compressor.bench import report, sources
    from var_compressor.bench.session import Settings, benchmark
    from var_compressor.compress import choose_device, choose_dtype, sampling_of
    from var_compressor.evaluation.reproduce import COMPRESSED, FULL, Timed
    from var_compressor.interop.kv_quant_calib import use_cache

    device, collect = choose_device(recipe.model.device), recipe.collect
    dtype = choose_dtype(recipe.model.dtype, device)
    choice = sources.Choice(str(artifact), None, "auto", False, True, device, dtype)
    settings = Settings(
        *(spec.prompt, 1, collect.seed, spec.runs, collect.aspect_ratio, collect.pixel_budget),
        sampling=sampling_of(collect),
    )
    with progress() as on_progress:
        result = benchmark(
            sources.saved(choice, use_cache),
            settings,
            device=device,
            dtype=dtype,
            on_progress=on_progress,
        )
    write_json(out / report.RESULTS_FILE, report.to_json(result))
    names = (COMPRESSED, FULL)
    return Timed(
        machine=result.machine["name"],
        seconds={
            name: median(run.total_s for run in one.runs)
            for name, one in zip(names, result.measured, strict=True)
        },
        peak_bytes={
            name: one.memory.peak for name, one in zip(names, result.measured, strict=True)
        },
        columns=report.columns(result),
        rows=report.table_rows(result),
    )
