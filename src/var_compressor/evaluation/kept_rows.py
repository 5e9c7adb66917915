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
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import var_compressor
from var_compressor.artifact import on_cpu, write_atomically, write_json
from var_compressor.machine import device_kind
from var_compressor.models.inspection import sha256_of

JUDGE_FILE = "judge.json"
# a kill costs so much, or this share of the time it took; more often would be many small files
_SECONDS_UNSAVED, _SHARE_UNSAVED = 10, 1 / 20
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

    To be used in a ``with`` block, which ends with all of them on disk. In memory are where they
    are, and those that wait to be written. Processes may share a folder.
    """

    def __init__(self, folder: Path, judge: Mapping[str, Any], device: torch.device) -> None:
        self.judge = {**judge, "runs_on": device_kind(device), "code": code_versions()}
        digest = hashlib.sha256(json.dumps(self.judge, sort_keys=True).encode()).hexdigest()
        self.folder = folder / digest[:16]
        self.places: dict[str, tuple[Path, int]] = {}
        self.unsaved: dict[str, Row] = {}
        self.began = self.saved_at = monotonic()

    def get(self, key: str, measure: Callable[[], Row]) -> Row:
        """The row that was kept under ``key``, or else the one that is measured now.

        All rows have the same columns, on the CPU.
        """
        row = self.unsaved.get(key)
        if row is None and key in self.places:
            row = _row_at(*self.places[key])
        if row is None:
            row = self.unsaved[key] = measure()
            now = monotonic()
            allowed = max(_SECONDS_UNSAVED, _SHARE_UNSAVED * (now - self.began))
            if now - self.saved_at > allowed:
                self._save()
        return row

    def __enter__(self) -> KeptRows:
        if not (self.folder / JUDGE_FILE).is_file():
            write_json(self.folder / JUDGE_FILE, self.judge)
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                keys = _checked_keys(path)
            except FileNotFoundError:
                # another process found it damaged, too
                continue
            except (ValueError, SafetensorError):
                # damaged: what it held is measured again
                path.unlink(missing_ok=True)
                continue
            self._place(keys, path)
        self.began = self.saved_at = monotonic()
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
        path = self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
        write_atomically(path, content)
        self._place(self.unsaved, path)
        self.unsaved = {}

    def _place(self, keys: Iterable[str], path: Path) -> None:
        self.places |= {key: (path, number) for number, key in enumerate(keys)}


def _checked_keys(path: Path) -> list[str]:
    """The keys of a file's rows, in their order.

    Raises: ValueError or SafetensorError for what `KeptRows` has not written; OSError.
    """
    if sha256_of(path) != path.stem:
        raise ValueError(f"{path}: its content changed")
    with safe_open(path, "pt") as file:
        keys = file.get_tensor(_KEYS)
        lengths = [file.get_slice(name).get_shape()[:1] for name in file.keys()]  # noqa: SIM118
    if keys.dtype != torch.uint8 or keys.ndim != 2 or any(n != [len(keys)] for n in lengths):
        raise ValueError(f"{path}: {keys.dtype} {list(keys.shape)} are no keys of its rows")
    return [bytes(key).hex() for key in keys.tolist()]


def _row_at(path: Path, number: int) -> Row | None:
    """None when the file was deleted meanwhile."""
    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name != _KEYS]  # noqa: SIM118
            return {name: file.get_slice(name)[number : number + 1][0] for name in names}
    except FileNotFoundError:
        return None


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
