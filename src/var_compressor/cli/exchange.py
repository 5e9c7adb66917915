"""Commands that take models in and pass them on: import-artifact, export, push."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from var_compressor.cli.app import app
from var_compressor.terminal import print_table, progress

if TYPE_CHECKING:
    from var_compressor.interop.import_original import Imported
    from var_compressor.publishing import ModelFiles


@app.command("import-artifact")
def import_artifact(
    directory: Annotated[
        Path, typer.Argument(help="With model.pt, scale.pt, smooth.pt, branch.pt.")
    ],
    base: Annotated[
        str, typer.Option(help="The model it was made of: a model directory, or a hub id.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Artifact directory to write.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="key=value, or recipe files, of what the files do not say."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Turn the .pt files of VAR-Compressor's original into an artifact.

    Example: varc import-artifact runs/int4_rank32 --base infinity-2b --out out/2b-w4a4

    Codes are recovered exactly, and every one is proved. The files do not say how inputs are read:
    4 bits and signed, as the original does, unless key=value says otherwise, such as
    quant.act.allow_unsigned=true. kv_quant_calib.pt beside them comes along.
    """
    from var_compressor.interop.import_original import import_artifact as run
    from var_compressor.interop.import_original import settings_of

    recipe = settings_of(directory, settings or [])
    with progress() as on_progress:
        imported = run(directory, base, out, recipe, on_progress=on_progress)
    if as_json:
        typer.echo(json.dumps({"out": str(out), **_told(imported)}))
        return
    columns = ("linear", "blocks", "codes", "inexact", "ambiguous", "storage dB", "base dB")
    print_table(columns, _rows(imported), stderr=False)
    cache = ", with its KV cache" if imported.has_kv else ""
    typer.echo(f"wrote {out}: {imported.manifest.num_weight_bytes / 2**20:.1f} MiB{cache}")


def _told(imported: Imported) -> dict[str, Any]:
    codes = [linear["codes"] for block in imported.blocks for linear in block]
    totals = {
        key: sum(one[key] for one in codes) for key in ("num_codes", "num_inexact", "num_ambiguous")
    }
    return {**totals, "blocks": imported.blocks, "has_kv": imported.has_kv}


def _rows(imported: Imported) -> list[tuple[str, ...]]:
    """A row per linear; of its blocks, sums and the lowest ratios."""
    rows = []
    for name in dict.fromkeys(linear["name"] for block in imported.blocks for linear in block):
        found = [linear for block in imported.blocks for linear in block if linear["name"] == name]
        codes = [linear["codes"] for linear in found]
        sums = (
            sum(one[f"num_{key}"] for one in codes) for key in ("codes", "inexact", "ambiguous")
        )
        lowest = (min(one[key] for one in found) for key in ("storage_snr_db", "base_snr_db"))
        rows.append((name, str(len(found)), *map(str, sums), *(f"{snr:.1f}" for snr in lowest)))
    return rows


class Target(str, Enum):
    """Whose files an artifact becomes."""

    nunchaku = "nunchaku"
    nunchaku_lite = "nunchaku-lite"
    varcompressor = "varcompressor"
    hub = "hub"


ResultsOption = Annotated[
    list[Path] | None,
    typer.Option(help="Folder of what `evaluate` found, for the model card; may be repeated."),
]


class ExportDtype(str, Enum):
    """Of what is no code."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


@app.command()
def export(
    artifact: Annotated[
        Path, typer.Argument(help="Artifact directory; to hub, any model directory.")
    ],
    to: Annotated[Target, typer.Option("--to", help="Whose files to write.")],
    out: Annotated[Path, typer.Option("--out", help="Directory to write; must be new or empty.")],
    dtype: Annotated[
        ExportDtype,
        typer.Option(help="Of what is no code; auto: bfloat16, or float32 to varcompressor."),
    ] = ExportDtype.auto,
    name: Annotated[
        str | None, typer.Option(help="To hub: the id org/name that its card tells people to open.")
    ] = None,
    results: ResultsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write an artifact as nunchaku's packed file, a diffusers folder, the original's .pt files, or
    as the folder with a model card that `push` would send.

    Example: varc export out/tiny-w4a4 --to nunchaku --out out/tiny-nunchaku
    """
    import torch

    if to is Target.hub:
        _export_folder(artifact, out, name, results or [], as_json=as_json)
        return
    if name is not None or results:
        raise ValueError(f"--name and --results are for a model card; --to {to.value} has none")
    default = "float32" if to is Target.varcompressor else "bfloat16"
    chosen: torch.dtype = getattr(torch, default if dtype is ExportDtype.auto else dtype.value)
    if to is Target.varcompressor:
        found = _export_original(artifact, out, chosen)
    else:
        found = _export_nunchaku(artifact, out, chosen, lite=to is Target.nunchaku_lite)
    if as_json:
        typer.echo(json.dumps({"out": str(out), **found}))
        return
    for line in found["notes"]:
        typer.echo(f"note: {line}")
    typer.echo(f"wrote {', '.join(str(out / name) for name in found['files'])}")


def _export_original(artifact: Path, out: Path, dtype: Any) -> dict[str, Any]:
    from var_compressor.interop.export_original import export_original

    exported = export_original(artifact, out, dtype=dtype)
    return {"files": exported.files, "notes": exported.notes}


def _export_nunchaku(artifact: Path, out: Path, dtype: Any, *, lite: bool) -> dict[str, Any]:
    from var_compressor.interop.nunchaku import export_nunchaku

    packed = export_nunchaku(artifact, out, dtype=dtype, lite=lite)
    counts = ", ".join(f"{number} {kind}" for kind, number in packed.counts.items())
    notes = [
        f"linears: {counts}",
        f"rounding factors, branches and zeros to 16 bits leaves {packed.snr_db:.1f} dB or more",
        *(f"{name} in 16 bits: {why}" for name, why in packed.why.items()),
    ]
    return {"files": packed.files, "notes": notes, "counts": packed.counts, "snr_db": packed.snr_db}


@app.command()
def push(
    source: Annotated[
        str, typer.Argument(help="Artifact, compressed or full-precision model directory.")
    ],
    repo_id: Annotated[str, typer.Argument(help="Hub id, org/name; made if it is not there.")],
    results: ResultsOption = None,
    private: Annotated[bool, typer.Option("--private", help="A new one is not public.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the files and the card, and send nothing.")
    ] = False,
) -> None:
    """Put a model on the Hugging Face hub, with a model card, in one commit.

    Example: varc push out/2b-w4a4 me/infinity-2b-w4a4 --results out/eval-2b --dry-run

    What it needs to draw goes along: VAE and, from a local folder, text encoder. A README.md that
    lies in the directory is kept, unless --results are given. After an interruption, give the
    command again: files that arrived are not sent again. Log in with `hf auth login`, or set
    HF_TOKEN.
    """
    from var_compressor.models.hub import README
    from var_compressor.publishing import push as send

    files = _published(source, repo_id, results or [])
    if dry_run:
        rows = [(name, f"{one.num_bytes:,}") for name, one in files.items()]
        print_table(("file", "bytes"), rows, stderr=False)
        card = files[README].content
        typer.echo(card.decode() if isinstance(card, bytes) else card.read_text(encoding="utf-8"))
        return
    url = send(files, repo_id, token=None, private=private, commit_message=message)
    total = sum(one.num_bytes for one in files.values())
    typer.echo(f"pushed {len(files)} files, {total / 2**20:.1f} MiB: {url}")


def _published(source: str, name: str, results: list[Path]) -> ModelFiles:
    from var_compressor.artifact import find_model, is_artifact
    from var_compressor.evaluation.card import measured
    from var_compressor.publishing import published, source_files

    artifact = folder if is_artifact(folder := find_model(source)) else None
    rows = [row for one in results for row in measured(one, artifact)]
    return published(source_files(source), name, rows)


def _export_folder(
    source: Path, out: Path, name: str | None, results: list[Path], *, as_json: bool
) -> None:
    from var_compressor.models.hub import is_repo_id
    from var_compressor.models.new_directory import new_directory
    from var_compressor.publishing import write_files

    if name is not None and not is_repo_id(name):
        raise ValueError(f"--name is {name!r}, expected a hub id, org/name")
    files = _published(str(source), name or out.name, results)
    with new_directory(out, overwrite=False) as folder:
        write_files(folder, files)
    if as_json:
        typer.echo(json.dumps({"out": str(out), "files": sorted(files)}))
        return
    total = sum(one.num_bytes for one in files.values())
    typer.echo(f"wrote {out}: {len(files)} files, {total / 2**20:.1f} MiB")
