"""Commands that read and write other people's formats: import-artifact, export."""

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


class ExportDtype(str, Enum):
    """Of what is no code."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


@app.command()
def export(
    artifact: Annotated[Path, typer.Argument(help="Artifact directory.")],
    to: Annotated[Target, typer.Option("--to", help="Whose files to write.")],
    out: Annotated[Path, typer.Option("--out", help="Directory to write; must be new or empty.")],
    dtype: Annotated[
        ExportDtype,
        typer.Option(help="Of what is no code; auto: bfloat16, or float32 to varcompressor."),
    ] = ExportDtype.auto,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write an artifact as nunchaku's packed file, a diffusers folder, or the original's .pt files.

    Example: varc export out/tiny-w4a4 --to nunchaku --out out/tiny-nunchaku
    """
    import torch

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
