"""Where the hidden states of a calibration run are kept: on the device, in RAM, then on disk.

Where they lie never changes a result.
"""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class MemoryBounds:
    """Bytes of hidden states kept on the GPU and in RAM; what exceeds both goes to disk.

    None leaves it to the machine: 40 % of the GPU's memory, half of the RAM that is free.
    """

    gpu_bytes: int | None = None
    ram_bytes: int | None = None

    @staticmethod
    def of(*, gpu: str | None, ram: str | None) -> MemoryBounds:
        """Bounds as people write them; see ``parse_bytes``."""
        return MemoryBounds(*(None if size is None else parse_bytes(size) for size in (gpu, ram)))

    def resolved(self, device: torch.device) -> tuple[int, int]:
        """(bytes on the device, bytes in RAM); a CPU is its own RAM."""
        ram = self.ram_bytes
        if ram is None:
            ram = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        if device.type == "cpu":
            return ram, 0
        gpu = self.gpu_bytes
        if gpu is None:
            gpu = int(0.4 * torch.cuda.get_device_properties(device).total_memory)
        return gpu, ram


def parse_bytes(text: str) -> int:
    """Bytes of "512MiB", "4GiB", "4G" or "1000000".

    Raises: ValueError for anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise ValueError(f"{text!r} is no size; write it like 4GiB or 512MiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


class ActivationStore:
    """Tensors by key, each in the first place that has room for it: device, RAM, disk."""

    def __init__(self, device: torch.device, bounds: MemoryBounds, folder: Path) -> None:
        self.device, self.folder = device, folder
        self.room = dict(zip(("device", "ram"), bounds.resolved(device), strict=True))
        self.places: dict[Hashable, str] = {}
        self._tensors: dict[Hashable, Tensor] = {}

    def put(self, key: Hashable, x: Tensor) -> None:
        """Keep ``x`` (on the device), in place of what the key held.

        Raises: OSError when the disk is full.
        """
        held = self._tensors.get(key)
        if held is not None and (held.shape != x.shape or held.dtype != x.dtype):
            self._forget(key)
        if key not in self.places:
            place = self._choose_place(x.nbytes)
            makers = {"device": lambda: x, "ram": lambda: _in_ram(x)}
            self._tensors[key] = makers.get(place, lambda: self._on_disk(key, x))()
            self.places[key] = place
        if self.places[key] == "device":
            self._tensors[key] = x
        else:
            self._tensors[key].copy_(x)

    def get(self, key: Hashable) -> Tensor:
        return self._tensors[key].to(self.device)

    def close(self) -> None:
        """Forget everything and delete the files."""
        for key in list(self.places):
            self._forget(key)

    def _choose_place(self, num_bytes: int) -> str:
        for place, room in self.room.items():
            if num_bytes <= room:
                self.room[place] -= num_bytes
                return place
        return "disk"

    def _forget(self, key: Hashable) -> None:
        place, held = self.places.pop(key), self._tensors.pop(key)
        if place == "disk":
            self._path(key).unlink(missing_ok=True)
        else:
            self.room[place] += held.nbytes

    def _path(self, key: Hashable) -> Path:
        # a name that the artifact's writer clears after a kill
        return self.folder / f".activations-{key}.{os.getpid()}.tmp"

    def _on_disk(self, key: Hashable, x: Tensor) -> Tensor:
        path = self._path(key)
        try:
            with path.open("wb") as file:
                # writing into a mapped file on a full disk would kill the process
                os.posix_fallocate(file.fileno(), 0, x.nbytes)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        flat = torch.from_file(str(path), shared=True, size=x.numel(), dtype=x.dtype)
        return flat.view(x.shape)


def _in_ram(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.device.type == "cuda")


@contextmanager
def activation_store(
    device: torch.device, bounds: MemoryBounds, folder: Path
) -> Iterator[ActivationStore]:
    store = ActivationStore(device, bounds, folder)
    try:
        yield store
    finally:
        store.close()
