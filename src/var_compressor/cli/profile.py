"""The command that measures a model before it is compressed: profile."""

from __future__ import annotations

from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from var_compressor.cli.app import app, load_recipe_words
from var_compressor.terminal import print_table, progress


class Probe(str, Enum):
    """Which layers are rounded one at a time."""

    auto = "auto"
    all = "all"
    worst = "worst"
    none = "none"


@app.command()
def profile(
    recipes: Annotated[
        list[str], typer.Argument(help="Recipe files, then key=value; later ones win.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Directory for report, pictures and JSON.")],
    sensitivity: Annotated[
        Probe,
        typer.Option(
            help="Layers to round one at a time, to see what it does to the bits; auto: all of a "
            "small model, the ten worst of a large one."
        ),
    ] = Probe.auto,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a model: outliers, skewed channels, what rounding costs, and which layers suffer.

    Example: varc profile recipes/model/infinity-tiny.yaml recipes/collect/tiny.yaml
    --out out/profile

    A recipe of recipes/svdquant/ says which formats are judged; int4 without. A run that was cut
    off goes on when the same command is given again.
    """
    import json

    from var_compressor.profiling.report import COLUMNS, REPORT_FILE, table_rows
    from var_compressor.profiling.run import profile_recipe

    recipe = load_recipe_words(recipes)
    with progress() as on_progress:
        found = profile_recipe(recipe, out, probe=sensitivity.value, on_progress=on_progress)
    print_table(COLUMNS, table_rows(found), stderr=as_json)
    for one in found["findings"]:
        typer.echo(f"{one['verdict']}. {one['text']}", err=as_json)
        if one["advice"] is not None:
            typer.echo(f"    {one['advice']}", err=as_json)
    typer.echo(f"wrote {out / REPORT_FILE}", err=as_json)
    if find_spec("matplotlib") is None:
        typer.echo("no pictures: pip install 'var-compressor[plots]'", err=as_json)
    if as_json:
        worst = [dict(zip(COLUMNS, row, strict=True)) for row in table_rows(found)]
        kept = {key: found[key] for key in ("bytes", "findings")}
        typer.echo(json.dumps({"out": str(out), "worst": worst, **kept}))
