"""Reports of `varc profile`, `varc evaluate` and others, shown inside the page but kept apart.

A report is a file that somebody wrote, with texts from anywhere in it: its frame runs no scripts,
has no origin and loads nothing that is not in the file.
"""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

MAX_REPORTS = 200
MAX_DEPTH = 4
MAX_BYTES = 64 * 2**20
KINDS = (".html", ".png")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_POLICY = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'; font-src data:\">"
)


class Reports:
    """HTML pages and PNGs below some folders, found anew at every look."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """Raises: ValueError for a folder that is none."""
        for folder in folders:
            if not folder.is_dir():
                raise ValueError(f"{folder}: no such directory; give one that holds reports")
        self.folders = [folder.resolve() for folder in folders]

    def found(self) -> dict[str, Path]:
        """Name → file; at most `MAX_REPORTS`, down to `MAX_DEPTH` folders deep, pages first."""
        paths: dict[str, Path] = {}
        for folder in self.folders:
            inside = sorted(_files(folder), key=lambda path: (path.suffix.lower() != ".html", path))
            for path in inside[: MAX_REPORTS - len(paths)]:
                name = f"{folder.name}/{path.relative_to(folder)}"
                # two folders of one name
                paths[name if name not in paths else str(path)] = path
        return paths

    def frame(self, name: str) -> str:
        """HTML that shows a report. Raises: ValueError for one that is not there or too large."""
        path = self.found().get(name)
        if path is None:
            raise ValueError(f"{name[:80]}: no such report any more; look again")
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{name}: is larger than {MAX_BYTES >> 20} MiB; open the file itself")
        content, title = path.read_bytes(), html.escape(name, quote=True)
        if path.suffix.lower() == ".png":
            if not content.startswith(_PNG_SIGNATURE):
                raise ValueError(f"{name}: is not a PNG")
            encoded = base64.b64encode(content).decode("ascii")
            return f'<img class="report" alt="{title}" src="data:image/png;base64,{encoded}">'
        document = html.escape(_POLICY + content.decode("utf-8", "replace"), quote=True)
        return f'<iframe class="report" sandbox="" title="{title}" srcdoc="{document}"></iframe>'


def _files(folder: Path) -> Iterator[Path]:
    for place, names, files in os.walk(folder):
        if len(Path(place).relative_to(folder).parts) >= MAX_DEPTH:
            names.clear()
        names[:] = sorted(name for name in names if not name.startswith("."))
        for name in files:
            path = Path(place, name)
            # a link may lead out of the folder
            if path.suffix.lower() in KINDS and path.resolve().is_relative_to(folder):
                yield path
