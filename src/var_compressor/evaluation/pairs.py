"""Images to look at: the worst ones and those around the median, beside full precision's."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from var_compressor.evaluation.gallery import read_image
from var_compressor.evaluation.measuring import Drawn, Sides
from var_compressor.evaluation.metrics import METRICS
from var_compressor.evaluation.results import REFERENCE
from var_compressor.evaluation.runner import who_sees
from var_compressor.evaluation.sharding import Crew

NUM_SHOWN = 6
# of a picture, in pixels
_SIDE = 384
# metrics that tell one image's likeness, from the one that fits the eye best
_LIKENESS = ("lpips", "ssim", "psnr")


@dataclass(frozen=True)
class Pair:
    """A prompt and its images as PNG: full precision's, if there is one, and the model's."""

    prompt: str
    note: str
    pngs: tuple[bytes, ...]


@dataclass(frozen=True)
class Pairs:
    """``worst`` and ``median`` by a metric; empty without a metric of single images."""

    metric: str
    worst: list[Pair]
    median: list[Pair]


def choose_pairs(drawn: Drawn, rows: Mapping[str, Sides], crew: Crew) -> Pairs | None:
    """The first process gets the images, wherever they are; all take part."""
    of_images = [name for name, sides in rows.items() if sides[""].ndim == 1]
    metric = next(iter([*(m for m in _LIKENESS if m in of_images), *of_images]), None)
    if metric is None:
        return None
    rows_N = rows[metric][""]
    order = torch.argsort(rows_N, descending=not METRICS[metric].higher_is_better, stable=True)
    middle = max(0, (len(order) - NUM_SHOWN) // 2)
    worst, median = order[:NUM_SHOWN].tolist(), order[middle : middle + NUM_SHOWN].tolist()
    pngs = _pngs(drawn, sorted({*worst, *median}), crew)

    def pair(number: int) -> Pair:
        sample = drawn.prompts.samples[number]
        shown = tuple(pngs[number, side] for side in reversed(range(len(drawn.galleries))))
        return Pair(sample.prompt, f"{sample.id}: {metric} {rows_N[number]:.4g}", shown)

    return Pairs(metric, list(map(pair, worst)), list(map(pair, median)))


def image_index(drawn: Drawn, crew: Crew) -> dict[str, dict[str, dict[str, Any]]]:
    """By sample and side, as results call it: an image's file, and the machines that have it."""
    hosts = crew.gathered(socket.gethostname())
    index: dict[str, dict[str, dict[str, Any]]] = {one.id: {} for one in drawn.prompts.samples}
    for side, gallery in zip(("images", REFERENCE), drawn.galleries, strict=False):
        seen_by = who_sees(gallery, drawn.prompts, crew)
        for sample in drawn.prompts.samples:
            index[sample.id][side] = {
                "file": str(gallery.path(drawn.prompts.name, sample)),
                "machines": sorted({hosts[rank] for rank in seen_by[sample.id]}),
            }
    return index


def _pngs(drawn: Drawn, numbers: list[int], crew: Crew) -> dict[tuple[int, int], bytes]:
    """By sample and gallery; each made by the first process that sees the image."""
    mine = {}
    for side, gallery in enumerate(drawn.galleries):
        seen_by = who_sees(gallery, drawn.prompts, crew)
        for number in numbers:
            sample = drawn.prompts.samples[number]
            if seen_by[sample.id][0] == crew.rank:
                mine[number, side] = _thumbnail(gallery.path(drawn.prompts.name, sample))
    return crew.merged(mine)


def _thumbnail(path: Path) -> bytes:
    image_3YX = read_image(path)
    image = Image.fromarray(image_3YX.permute(1, 2, 0).numpy())
    image.thumbnail((_SIDE, _SIDE))
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
