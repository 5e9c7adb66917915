"""The command `varc`: one sub-command is one short function, heavy imports inside it."""

# imported for the commands that they register, in the order of `varc --help`
from var_compressor.cli import models, profile, compress, draw, evaluate, compare, studio, exchange  # noqa: F401, I001
from var_compressor.cli.app import app, main

__all__ = ["app", "main"]
