"""Images on disk: PNGs that carry the settings they were drawn with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from var_compressor import __version__
from var_compressor.artifact import write_atomically

SETTINGS_KEY = "var-compressor"


def write_png(image: Image.Image, path: Path, settings: Mapping[str, Any]) -> None:
    """Write ``image`` whole or not at all, with ``settings`` as JSON in a PNG text field.

    Raises: ValueError when the name does not end in .png.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: images are written as PNG; end the name in .png")
    info = PngInfo()
    info.add_itxt(SETTINGS_KEY, json.dumps({"version": __version__, **settings}))
    buffer = BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    write_atomically(path, buffer.getvalue())
