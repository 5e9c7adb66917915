"""The application itself: its name, the options that commands share, and how errors end.

`varc --help` must answer at once, so nothing above a function body may import torch.
"""

from __future__ import annotations

import errno
import os
import sys
from enum import Enum
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from var_compressor.recipe import Recipe

INTERRUPTED = 130
FAILED = 2
MAX_SEED = 2**63 - 1

app = typer.Typer(
    name="varc",
    help="Compress Infinity text-to-image models to 4 bits and draw images with them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Compute(str, Enum):
    """How compressed linears are multiplied."""

    auto = "auto"
    packed = "packed"
    w4a4 = "w4a4"
    w4a8 = "w4a8"
    w4a16 = "w4a16"
    w8a8 = "w8a8"
    bf16 = "bf16"
    nunchaku = "nunchaku"


ComputeOption = Annotated[
    Compute,
    typer.Option(
        help="How 4-bit linears are multiplied; auto: the fastest that there is room for; packed: "
        "the fastest whose weights stay in 4 bits; nunchaku: its kernels, where it is installed."
    ),
]
LowMemoryOption = Annotated[
    bool, typer.Option("--low-memory", help="Take the least memory, at some cost of time.")
]


def load_recipe_words(words: list[str]) -> Recipe:
    from var_compressor.recipe import load_recipe, split_arguments

    return load_recipe(*split_arguments(words))


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
