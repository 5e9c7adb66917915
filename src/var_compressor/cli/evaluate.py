"""The command that judges a model's images: evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from var_compressor.cli.app import MAX_SEED, Compute, app, load_recipe_words
from var_compressor.terminal import print_table, progress

if TYPE_CHECKING:
    from var_compressor.evaluation.evaluate import Evaluation

BENCHMARKS = ("tiny",)
METRICS = ("clip_iqa", "clip_score", "fid", "image_reward", "psnr", "ssim", "lpips")
_LISTS = ("--benchmarks", "--metrics")


class ListsOfWords(TyperCommand):
    """Lets ``--benchmarks`` and ``--metrics`` take all words up to the next option or key=value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread(args))


def spread(words: Sequence[str]) -> list[str]:
    """``--metrics fid psnr`` as ``--metrics fid --metrics psnr``."""
    found: list[str] = []
    option, is_bare = "", False
    for word in [*words, "--"]:
        is_option = word.startswith("-") and word != "-"
        if is_option or ("=" in word and not Path(word).exists()):
            # without words the option stays, so that it is missed by name
            found += [option] if is_bare else []
            option = word if word in _LISTS else ""
            is_bare = bool(option)
            found += [] if option else [word]
            continue
        found += [option, word] if option else [word]
        is_bare = False
    return found[:-1]


@app.command(cls=ListsOfWords)
def evaluate(
    recipes: Annotated[
        list[str], typer.Argument(help="Recipe files, then key=value; collect says how to draw.")
    ],
    artifact: Annotated[
        Path | None,
        typer.Option("--artifact", help="The compressed model; without, full precision is judged."),
    ] = None,
    benchmarks: Annotated[
        list[str] | None,
        typer.Option(help="MJHQ, DCI, tiny, or prompt files; words, or separated by commas."),
    ] = None,
    num_samples: Annotated[int, typer.Option(min=2, help="Prompts of each benchmark.")] = 5000,
    metrics: Annotated[
        list[str] | None,
        typer.Option(help="Words, or separated by commas; all of them if left out."),
    ] = None,
    gen_root: Annotated[
        Path, typer.Option(help="Folder of the model's images; a run goes on with what is there.")
    ] = Path("out/images"),
    ref_root: Annotated[
        Path | None, typer.Option(help="Folder of full precision's; as --gen-root if left out.")
    ] = None,
    weights: Annotated[bool, typer.Option(help="Quantized weights, or full precision's.")] = True,
    activations: Annotated[bool, typer.Option(help="Rounded inputs, or not.")] = True,
    kv: Annotated[bool, typer.Option(help="Quantized KV cache, or 16 bits.")] = True,
    compute: Annotated[
        Compute,
        typer.Option(help="How 4-bit linears are multiplied; w4a4 is what calibration measured."),
    ] = Compute.w4a4,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the images.")] = 0,
    ref_seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=MAX_SEED, help="Of full precision's images, if another: the noise floor."
        ),
    ] = None,
    subset_seed: Annotated[int, typer.Option(min=0, help="Of the choice of prompts.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Images drawn together.")] = 1,
    data_root: Annotated[Path, typer.Option(help="Folder of MJHQ-30K and sDCI.")] = Path("data"),
    metric_weights: Annotated[
        Path | None, typer.Option(help="Folder of the networks that judge.")
    ] = None,
    prompt_cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps prompts' features between runs.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the results; beside the images.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Judge a model's images: against real ones, against full precision's, and by themselves.

    Example: varc evaluate recipes/model/infinity-tiny.yaml recipes/collect/tiny.yaml --artifact
    out/tiny-w4a4 --benchmarks tiny --num-samples 500 --metrics psnr ssim

    A run that was cut off goes on when the same command is given again. Several GPUs and machines:
    torchrun --nproc-per-node N --no-python varc evaluate …
    """
    from var_compressor.evaluation.evaluate import Request
    from var_compressor.evaluation.evaluate import evaluate as run
    from var_compressor.layers.switches import Switches

    request = Request(
        recipe=load_recipe_words(recipes),
        artifact=artifact,
        switches=Switches(weights, activations, kv),
        benchmarks=_listed(benchmarks or BENCHMARKS, may_be_file=True),
        metrics=_listed(metrics or METRICS),
        num_samples=num_samples,
        seed=seed,
        subset_seed=subset_seed,
        batch=batch,
        compute=compute.value,
        gen_root=gen_root,
        ref_root=ref_root or gen_root,
        data_root=data_root,
        metric_weights=metric_weights,
        prompt_cache=prompt_cache,
        out=out,
        ref_seed=ref_seed,
    )
    with progress() as on_progress:
        found = run(
            request,
            on_progress=on_progress,
            note=lambda text: typer.echo(f"note: {text}", err=True),
        )
    if found is not None:
        _print(found, as_json=as_json)


def _listed(words: Sequence[str], *, may_be_file: bool = False) -> tuple[str, ...]:
    found = []
    for word in words:
        is_file = may_be_file and Path(word).exists()
        found += [word] if is_file else [part for part in word.split(",") if part]
    return tuple(dict.fromkeys(found))


def _print(found: Evaluation, *, as_json: bool) -> None:
    import json
    from dataclasses import asdict

    from var_compressor.evaluation import evaluation_report as report
    from var_compressor.evaluation.results import RESULTS_FILE

    path = report.write_page(found)
    print_table(report.COLUMNS, report.table_rows(found.results), stderr=as_json)
    lines = [*report.lines(found.results), f"wrote {found.out / RESULTS_FILE} and {path}"]
    typer.echo("\n".join(lines), err=as_json)
    if as_json:
        typer.echo(json.dumps(asdict(found.results)))
