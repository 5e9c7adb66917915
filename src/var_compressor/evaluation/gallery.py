"""A folder of drawn images that a killed run can go on with.

    ROOT/<model>-<key>/identity.json          all that determines the images, in words
    ROOT/<model>-<key>/<benchmark>/<id>.png   an image, with its prompt and seed inside

The key is a hash of the identity: other settings are another folder, so that images are never taken
for what they are not.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import BoundedSemaphore
from types import TracebackType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from var_compressor.artifact import write_json
from var_compressor.evaluation.benchmarks import Sample, image_seed
from var_compressor.images import SETTINGS_KEY, write_png

IDENTITY_FILE = "identity.json"
_RUNNING = ".running"
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")
# encoding a PNG lets other Python threads run
_WRITERS, _WAITING = 2, 16


@dataclass(frozen=True)
class Gallery:
    """The images of one model, drawn in one way; ``identity`` is JSON."""

    root: Path
    label: str
    identity: dict[str, Any]

    @property
    def key(self) -> str:
        text = json.dumps(self.identity, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def folder(self) -> Path:
        return self.root / f"{self.label}-{self.key}"

    @property
    def seed(self) -> int:
        return self.identity["seed"]

    def images(self, benchmark: str) -> Path:
        """The folder of a benchmark's images."""
        if _PLAIN.fullmatch(benchmark):
            return self.folder / benchmark
        return self.folder / f"set-{hashlib.sha256(benchmark.encode()).hexdigest()[:12]}"

    def path(self, benchmark: str, sample: Sample) -> Path:
        """Where a sample's image is; another prompt of the same id is another file."""
        digest = hashlib.sha256(json.dumps([sample.id, sample.prompt]).encode()).hexdigest()
        name = sample.id if _PLAIN.fullmatch(sample.id) else "sample"
        return self.images(benchmark) / f"{name}.{digest[:12]}.png"

    def settings(self, benchmark: str, sample: Sample) -> dict[str, Any]:
        """What an image carries with it."""
        return {
            "benchmark": benchmark,
            "id": sample.id,
            "prompt": sample.prompt,
            "seed": image_seed(benchmark, sample.prompt, self.seed),
            "key": self.key,
        }

    def open(self) -> None:
        """Make the folder, and say in it what determines its images."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / IDENTITY_FILE).is_file():
            write_json(self.folder / IDENTITY_FILE, self.identity)

    def names(self, benchmark: str) -> set[str]:
        """File names of the images that are there."""
        folder = self.images(benchmark)
        if not folder.is_dir():
            return set()
        return {entry.name for entry in os.scandir(folder) if not entry.name.startswith(".")}

    def is_whole(self, benchmark: str, sample: Sample) -> bool:
        """Whether the image is there, undamaged, and what it should be; by its checksums."""
        path = self.path(benchmark, sample)
        try:
            with Image.open(path, formats=["PNG"]) as image:
                found = json.loads(image.info[SETTINGS_KEY])
                image.verify()
        except (OSError, SyntaxError, ValueError, KeyError):
            return False
        wanted = self.settings(benchmark, sample)
        return isinstance(found, dict) and wanted.items() <= found.items()

    def clear(self, benchmark: str) -> None:
        """Remove what killed writers left unfinished."""
        for path in self.images(benchmark).glob(".*.tmp"):
            path.unlink(missing_ok=True)

    # --- processes that draw ----------------------------------------------------------------------

    def take_leftovers(self) -> list[str]:
        """Processes that began to draw and never came to their end, by name; asked once."""
        found = []
        for path in self.folder.glob(f"{_RUNNING}-*"):
            found.append(path.name.removeprefix(f"{_RUNNING}-"))
            path.unlink(missing_ok=True)
        return sorted(found)

    def mark_running(self, rank: int) -> Path:
        """A file that says that this process draws; to be removed when it is done."""
        path = self.folder / f"{_RUNNING}-{socket.gethostname()}-process-{rank}-pid-{os.getpid()}"
        path.touch()
        return path


def read_image(path: Path) -> Tensor:
    """uint8 RGB ``[3, Y, X]``.

    Raises: ValueError naming a file that was damaged since it was checked.
    """
    with _opened(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def read_carried(path: Path) -> Mapping[str, Any]:
    """What an image carries with it; its pixels are not decoded. Raises: as `read_image`."""
    with _opened(path) as image:
        return json.loads(image.info[SETTINGS_KEY])


def read_content(path: Path) -> bytes:
    """The bytes of an image. Raises: as `read_image`."""
    with _readable(path):
        return path.read_bytes()


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    with _readable(path), Image.open(path, formats=["PNG"]) as image:
        yield image


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SyntaxError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path}: not readable ({error}); start the same command again to draw it again"
        ) from None


class Writer:
    """Writes images in the background; so many wait at most, or `put` waits.

    Leaving the ``with`` block waits for all of them. Raises: what writing ran into, at the next
    call.
    """

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(_WRITERS, thread_name_prefix="images")
        self.room = BoundedSemaphore(_WAITING)
        self.waiting: list[Future] = []

    def put(self, image_3YX: Tensor, path: Path, settings: Mapping[str, Any]) -> None:
        """Write a uint8 image whole or not at all."""
        self._check()
        self.room.acquire()
        self.waiting.append(self.pool.submit(self._write, image_3YX, path, settings))

    def _write(self, image_3YX: Tensor, path: Path, settings: Mapping[str, Any]) -> None:
        try:
            picture = Image.fromarray(image_3YX.permute(1, 2, 0).contiguous().numpy())
            write_png(picture, path, settings)
        finally:
            self.room.release()

    def _check(self) -> None:
        done = [one for one in self.waiting if one.done()]
        self.waiting = [one for one in self.waiting if not one.done()]
        for one in done:
            one.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.pool.shutdown(wait=True)
        if error is None:
            self._check()


def slug(*words: str) -> str:
    """Words as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(words)).strip("-.")[:80] or "model"
