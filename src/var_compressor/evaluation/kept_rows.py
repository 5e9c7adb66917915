"""Rows of images that were measured before, so that measuring goes on after a kill, too.

    FOLDER/<judge>/judge.json               what measured them, in words
    FOLDER/<judge>/<sha256>.safetensors     rows by key, named by the hash of the file

A key is a hash of all that one row is computed from: the bytes of its image, of what it is compared
with, and its prompt. The judge is everything else, the code of this package included, so that a row
is never taken for what it is not. The folder may be deleted at any time.

Shapes: N rows of a file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

import var_compressor
from var_compressor.artifact import on_cpu, write_atomically, write_json
from var_compressor.machine import device_kind

JUDGE_FILE = "judge.json"
# so much work is lost by a kill
_SECONDS_UNSAVED = 10
# they read, resize and cut images and texts, or do the sums
_LIBRARIES = ("numpy", "pillow", "scikit-image", "torch", "transformers")
_KEYS = "keys"  # uint8 [N, 32]

Row = Mapping[str, Tensor]


def row_key(*parts: bytes) -> str:
    """Of the parts that one row is computed from, in their order."""
    hashes = [hashlib.sha256(part).hexdigest() for part in parts]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


class KeptRows:
    """Rows of one judge; ``judge`` is JSON and names what measures, with its weights.

    To be used in a ``with`` block, which ends with all of them on disk. Processes may share a
    folder.
    """

    def __init__(self, folder: Path, judge: Mapping[str, Any], device: torch.device) -> None:
        self.judge = {**judge, "runs_on": device_kind(device), "code": code_versions()}
        digest = hashlib.sha256(json.dumps(self.judge, sort_keys=True).encode()).hexdigest()
        self.folder = folder / digest[:16]
        self.rows: dict[str, Row] = {}
        self.unsaved: dict[str, Row] = {}
        self.saved_at = monotonic()

    def get(self, key: str, measure: Callable[[], Row]) -> Row:
        """The row that was kept under ``key``, or else the one that is measured now.

        All rows have the same columns, on the CPU.
        """
        if key not in self.rows:
            self.rows[key] = self.unsaved[key] = measure()
            if monotonic() - self.saved_at > _SECONDS_UNSAVED:
                self._save()
        return self.rows[key]

    def __enter__(self) -> KeptRows:
        if not (self.folder / JUDGE_FILE).is_file():
            write_json(self.folder / JUDGE_FILE, self.judge)
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                self.rows |= _read(path)
            except (OSError, ValueError, SafetensorError):
                # damaged: what it held is measured again
                path.unlink(missing_ok=True)
        self.saved_at = monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._save()

    def _save(self) -> None:
        self.saved_at = monotonic()
        if not self.unsaved:
            return
        columns = next(iter(self.unsaved.values()))
        tensors = {
            name: torch.stack([row[name] for row in self.unsaved.values()]) for name in columns
        }
        tensors[_KEYS] = torch.tensor([list(bytes.fromhex(key)) for key in self.unsaved]).byte()
        content = save(on_cpu(tensors))
        name = f"{hashlib.sha256(content).hexdigest()}.safetensors"
        write_atomically(self.folder / name, content)
        self.unsaved = {}


def _read(path: Path) -> dict[str, Row]:
    """Raises: ValueError, SafetensorError or OSError for what `KeptRows` has not written."""
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != path.stem:
        raise ValueError(f"{path}: its content changed")
    columns = load(content)
    keys = [bytes(key).hex() for key in columns.pop(_KEYS, torch.empty(0)).tolist()]
    if any(len(column) != len(keys) for column in columns.values()):
        raise ValueError(f"{path}: {len(keys)} keys for other numbers of rows")
    return {
        key: {name: column[i] for name, column in columns.items()} for i, key in enumerate(keys)
    }


@cache
def code_versions() -> dict[str, str]:
    """A hash of all files of this package, and the versions of the libraries that measure."""
    root = Path(var_compressor.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(root)} {path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    found = {"var_compressor": digest.hexdigest()}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "none"
    return found
