"""Commands that compress: quantize, calibrate-kv."""

from __future__ import annotations

import shlex
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from var_compressor.cli.app import app, load_recipe_words
from var_compressor.terminal import print_plan, print_run, print_table, progress


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
    recipe = load_recipe_words(recipes)
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
    recipe = load_recipe_words([*recipes, *budget])
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
