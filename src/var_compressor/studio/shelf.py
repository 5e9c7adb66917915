"""The models that the studio offers, and those of them that are in memory."""

from __future__ import annotations

import errno
import gc
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from var_compressor.artifact import enclosing_model, find_model, is_artifact, read_manifest
from var_compressor.models.directory import EMBEDDED
from var_compressor.pipeline import InfinityPipeline

T = TypeVar("T")
OUT_OF_MEMORY = (
    "memory ran out while drawing; try a smaller image, one model instead of two, or restart the "
    "studio with --low-memory or --text-encoder-bits 4"
)
# what a comparison needs at a time
MAX_OPEN = 2


class OutOfMemory(ValueError):
    """Too little memory for an order, even with all other models put away."""


@dataclass(frozen=True)
class Offer:
    """A model by the name that visitors see; ``source`` is what `from_pretrained` opens."""

    name: str
    source: str
    is_compressed: bool


@dataclass(frozen=True)
class Opening:
    """How models are opened; as the options of `varc generate` of the same names."""

    dtype: torch.dtype
    compute: str
    text_encoder_bits: int
    low_memory: bool


def offers(sources: Sequence[str]) -> list[Offer]:
    """Every model given and, before an artifact, the full-precision one it was made of.

    A compressed model that needs no other is offered alone where that one is not here. Nothing
    given stands for Infinity-Tiny. Raises: ValueError for a source that is no model.
    """
    found: dict[str, Offer] = {}
    for source in sources or ["infinity-tiny"]:
        folder = find_model(source)
        compressed = is_artifact(folder)
        base = str(read_manifest(folder).base["source"]) if compressed else source
        if not compressed or enclosing_model(folder) is None or _is_here(base):
            find_model(base)
            found.setdefault(base, Offer(f"{_short(base)} · full precision", base, False))
        if compressed:
            found.setdefault(source, Offer(_short(source), source, True))
    by_source = list(found.values())
    names = [offer.name for offer in by_source]
    # two of the same last name are told apart by their whole path
    return [
        offer if names.count(offer.name) == 1 else replace(offer, name=offer.source)
        for offer in by_source
    ]


def _is_here(source: str) -> bool:
    return source in EMBEDDED or Path(source).expanduser().is_dir()


def _short(source: str) -> str:
    path = Path(source)
    return "/".join(path.parts[-2:]) if path.is_dir() else source


class Shelf:
    """Opens a device's models when they are first asked for, and puts away the one longest unused.

    For one thread. Models with the same text encoder share it.
    """

    def __init__(self, offered: Sequence[Offer], device: torch.device, opening: Opening) -> None:
        self.offered = {offer.name: offer for offer in offered}
        self.device, self.opening = device, opening
        self._open: OrderedDict[str, InfinityPipeline] = OrderedDict()

    @property
    def open_names(self) -> list[str]:
        return list(self._open)

    def take(self, name: str) -> InfinityPipeline:
        """Raises: ValueError for a name that is not on offer, or a model that cannot be read."""
        if name not in self.offered:
            raise ValueError(f"{name[:80]}: no such model here; choose {', '.join(self.offered)}")
        if name not in self._open:
            while len(self._open) >= MAX_OPEN:
                self._open.popitem(last=False)
            self._open[name] = self._read(self.offered[name])
        self._open.move_to_end(name)
        return self._open[name]

    def with_room(self, name: str, use: Callable[[InfinityPipeline], T]) -> T:
        """``use`` a model; when memory runs out, once more with every other one put away.

        Raises: OutOfMemory if that is not enough either; the shelf stays usable.
        """
        try:
            return use(self.take(name))
        except (MemoryError, RuntimeError, OSError) as error:
            if not is_out_of_memory(error):
                raise
        # outside of the except clause, whose traceback holds the tensors that were made
        self.put_away(keep=name)
        try:
            return use(self.take(name))
        except (MemoryError, RuntimeError, OSError) as error:
            if not is_out_of_memory(error):
                raise
        self.put_away(keep="")
        raise OutOfMemory(OUT_OF_MEMORY)

    def put_away(self, *, keep: str) -> None:
        """Close every model but one, and give its memory back."""
        for name in [name for name in self._open if name != keep]:
            del self._open[name]
        for pipeline in self._open.values():
            pipeline.free_cache()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _read(self, offer: Offer) -> InfinityPipeline:
        opening = self.opening
        pipeline = InfinityPipeline.from_pretrained(
            offer.source,
            dtype=opening.dtype,
            device=self.device,
            text_encoder_bits=opening.text_encoder_bits,
            compute=opening.compute,
            low_memory=opening.low_memory,
        )
        for other in self._open.values():
            if _same_encoder(pipeline, other):
                pipeline.text_encoder = other.text_encoder
        if pipeline.text_encoder is not None:
            # or the first prompt would seem slow
            pipeline.text_encoder.load()
        return pipeline


def _same_encoder(one: InfinityPipeline, other: InfinityPipeline) -> bool:
    a, b = one.text_encoder, other.text_encoder
    if a is None or b is None:
        return False
    names = ("encoder_dir", "tokenizer_dir", "max_length", "dtype", "device", "nbits")
    return all(getattr(a, name) == getattr(b, name) for name in names)


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, of torch on a CPU (a plain RuntimeError), or of Python."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return "DefaultCPUAllocator" in str(error)
