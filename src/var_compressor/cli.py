"""The command `varc`: one sub-command is one short function, heavy imports inside it.

`varc --help` must answer at once, so nothing above a function body may import torch.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from var_compressor import __version__

if TYPE_CHECKING:
    import torch

    from var_compressor.models.convert import WriteOptions
    from var_compressor.models.directory import OnTensor

INTERRUPTED = 130
FAILED = 2

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
    """Tell what this machine can run, and why."""
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
    """Turn official checkpoint files into a model directory."""
    from var_compressor.models.convert import convert_official, model_config, num_bytes

    config = model_config(model)
    total = num_bytes(config, _torch_dtype(dtype), with_vae=True)
    with _byte_progress("converting", total) as on_tensor:
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
    dtype: _Dtype = StoredDtype.bf16,
    overwrite: _Overwrite = False,
) -> None:
    """Write a random model of an exact architecture, for memory and speed work."""
    from var_compressor.models.convert import init_random, model_config, num_bytes

    config = model_config(model)
    total = num_bytes(config, _torch_dtype(dtype), with_vae=vae)
    with _byte_progress("writing", total) as on_tensor:
        options = _write_options(dtype, overwrite, on_tensor)
        init_random(config, out, seed=seed, with_vae=vae, options=options)
    typer.echo(f"wrote {out}")


@app.command("inspect")
def inspect_command(
    path: Annotated[Path, typer.Argument(help="File or directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    hashes: Annotated[bool, typer.Option("--hashes", help="Add the files' sha256.")] = False,
) -> None:
    """Tell what a checkpoint, model directory or artifact is: parts, sizes, provenance."""
    import json

    from var_compressor.models.inspection import inspect_path, to_text

    found = inspect_path(path, with_hashes=hashes)
    typer.echo(json.dumps(found.to_dict(), indent=2) if as_json else to_text(found))


def _torch_dtype(dtype: StoredDtype) -> torch.dtype:
    import torch

    return {StoredDtype.bf16: torch.bfloat16, StoredDtype.fp32: torch.float32}[dtype]


def _write_options(dtype: StoredDtype, overwrite: bool, on_tensor: OnTensor) -> WriteOptions:
    from var_compressor.models.convert import WriteOptions

    return WriteOptions(_torch_dtype(dtype), overwrite=overwrite, on_tensor=on_tensor)


@contextmanager
def _byte_progress(what: str, total_bytes: int) -> Iterator[OnTensor]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total_bytes)
        yield lambda name, num_bytes: progress.advance(task, num_bytes)


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
