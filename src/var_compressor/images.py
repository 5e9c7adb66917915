"""Images on disk: PNGs that carry the settings they were drawn with."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from var_compressor import __version__
from var_compressor.artifact import write_atomically

SETTINGS_KEY = "var-compressor"


def check_png_path(path: Path) -> None:
    """Find out before the work that an image can be written: the folder is made.

    Raises: ValueError when the name does not end in .png, OSError when the folder takes no file.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: images are written as PNG; end the name in .png")
    if path.is_dir():
        raise ValueError(f"{path}: is a directory; give a file name")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path.parent))


def write_png(image: Image.Image, path: Path, settings: Mapping[str, Any]) -> None:
    """Write ``image`` whole or not at all, with ``settings`` as JSON in a PNG text field.

    Raises: as `check_png_path`.
    """
    check_png_path(path)
    info = PngInfo()
    info.add_itxt(SETTINGS_KEY, json.dumps({"version": __version__, **settings}))
    buffer = BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    write_atomically(path, buffer.getvalue())


def read_settings(path: Path) -> dict[str, Any]:
    """What `write_png` put beside the image; the pixels are not decoded.

    Raises: ValueError when the file is no PNG, or carries no settings of ours; OSError when it
    cannot be read.
    """
    content = path.read_bytes()
    try:
        with Image.open(BytesIO(content), formats=["PNG"]) as image:
            text = image.info.get(SETTINGS_KEY)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise ValueError(f"{path.name}: is not a readable PNG") from None
    if not isinstance(text, str):
        raise ValueError(f"{path.name}: carries no settings; give a PNG that varc has written")
    try:
        settings = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{path.name}: its settings are damaged")
    return settings
