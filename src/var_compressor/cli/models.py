"""Commands about models and the machine: doctor, convert, init, inspect, version."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from var_compressor import __version__
from var_compressor.cli.app import app
from var_compressor.terminal import byte_progress, progress

if TYPE_CHECKING:
    import torch

    from var_compressor.models.convert import WriteOptions
    from var_compressor.models.directory import OnTensor


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    measure: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Time the compute paths at this model's shapes, and keep what `packed` goes by.",
        ),
    ] = None,
) -> None:
    """Tell what this machine can run, and why.

    Example: varc doctor --measure infinity-8b
    """
    import json

    from var_compressor import doctor

    if measure is not None:
        with progress() as on_progress:
            path = doctor.measure(measure, on_progress)
        typer.echo(f"wrote {path}", err=as_json)
    report = doctor.examine()
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else doctor.to_text(report))


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

    from var_compressor.artifact import is_artifact, is_unfinished
    from var_compressor.artifact_inspection import inspect_artifact
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
def version() -> None:
    """Print the version."""
    typer.echo(f"var-compressor {__version__}")
