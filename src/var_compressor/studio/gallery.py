"""The images that the studio has drawn: a folder of PNGs that carry their settings."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from var_compressor.images import read_settings, write_png

NUM_SHOWN = 48


@dataclass(frozen=True)
class Entry:
    """A PNG of the gallery and what it was drawn with."""

    path: Path
    settings: dict[str, Any]

    @property
    def caption(self) -> str:
        text = f"{self.settings.get('prompt', '')}"
        return f"{text[:80]}{'…' if len(text) > 80 else ''} · seed {self.settings.get('seed')}"


class Gallery:
    """Names begin with the time, so the folder sorts by age."""

    def __init__(self, folder: Path) -> None:
        """Raises: OSError when the folder cannot be made."""
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)

    def add(self, image: Image.Image, settings: Mapping[str, Any]) -> Path:
        """Write an image under a new name. Raises: OSError when the disk is full."""
        moment = time.time()
        date = time.strftime("%Y%m%d-%H%M%S", time.localtime(moment))
        name = f"{date}-{int(moment % 1 * 1e6):06d}-{secrets.token_hex(3)}.png"
        write_png(image, self.folder / name, settings)
        return self.folder / name

    def newest(self, count: int = NUM_SHOWN) -> list[Entry]:
        """The last ones, newest first; files that are not ours are passed over."""
        entries: list[Entry] = []
        for path in sorted(self.folder.glob("*.png"), reverse=True):
            try:
                entries.append(Entry(path, read_settings(path)))
            except (ValueError, OSError):
                continue
            if len(entries) == count:
                break
        return entries
