"""Metrics of bits for benchmarks: rows per image, by all processes together.

Bits come from the images, which carry them. Both models are in memory at once, and each image is
compared alone, so that its row does not depend on which process found it.

Shapes: N images, S levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from var_compressor.evaluation.bitwise import DrawRequest, bitwise_rows, unpacked_bits
from var_compressor.evaluation.gallery import read_carried, read_content
from var_compressor.evaluation.kept_rows import KeptRows, Row, row_key
from var_compressor.evaluation.measuring import Drawn, Sides, owners_of
from var_compressor.evaluation.metrics import BIT_METRICS
from var_compressor.evaluation.sharding import Crew
from var_compressor.evaluation.subject import Model
from var_compressor.models.sampling import Sampling
from var_compressor.models.schedule import Schedule
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.calibration import Progress

# side of rows that have a number per level
LEVELS = "levels"


@torch.inference_mode()
def measure_bits(
    model: Model,
    drawn: Sequence[Drawn],
    schedule: Schedule,
    sampling: Sampling,
    *,
    rows_root: Path,
    crew: Crew,
    on_progress: Progress,
) -> list[dict[str, Sides]]:
    """Rows of every metric of BIT_METRICS for several benchmarks, in the order of their samples.

    Those that differ by level have ``[N, S]`` beside, as the side LEVELS. Rows are kept below
    ``rows_root``; no model is opened where all are there.
    Raises: ValueError for a cfg per level, or for an image that carries no bits.
    """
    compare = _Compare(model, schedule, sampling)
    found = []
    for one in drawn:
        assert one.reference is not None
        owners = owners_of(one, crew)
        mine = [number for number, owner in enumerate(owners) if owner == crew.rank]
        judge = {"bits of": [gallery.identity for gallery in one.galleries]}
        rows: dict[str, dict[int, Tensor]] = {}
        with KeptRows(rows_root, judge, crew.device) as kept:
            for done, number in enumerate(mine):
                for column, value in kept.get(*compare.row_of(one, number)).items():
                    rows.setdefault(column, {})[number] = value
                on_progress(f"bits, {one.prompts.name}", done + 1, len(mine))
        found.append(_gathered(rows, len(owners), crew))
    return found


@dataclass(frozen=True)
class _Compare:
    """A compressed model and its full-precision one, image by image."""

    model: Model
    schedule: Schedule
    sampling: Sampling

    @cached_property
    def pipelines(self) -> tuple[InfinityPipeline, InfinityPipeline]:
        full, other = self.model.full_precision.open(), self.model.open()
        # one text encoder in memory: both models read the same
        other.text_encoder = full.text_encoder
        return full, other

    def row_of(self, drawn: Drawn, number: int) -> tuple[str, Callable[[], Row]]:
        """The key of one image's row, and what computes it."""
        assert drawn.reference is not None
        name, sample = drawn.prompts.name, drawn.prompts.samples[number]
        paths = [gallery.path(name, sample) for gallery in (drawn.reference, drawn.gallery)]
        seed = drawn.gallery.settings(name, sample)["seed"]

        def row() -> Row:
            request = DrawRequest(
                (sample.prompt,),
                (seed,),
                self.sampling,
                self.schedule.aspect_ratio,
                self.schedule.pixel_budget,
            )
            full, other = self.pipelines
            full_bits, other_bits = (_carried(path, self.schedule, full) for path in paths)
            columns = bitwise_rows(full, other, request, full_bits=full_bits, other_bits=other_bits)
            return {name: values[0] for name, values in columns.items()}

        return row_key(*map(read_content, paths), sample.prompt.encode()), row


def _carried(path: Path, schedule: Schedule, pipeline: InfinityPipeline) -> list[Tensor]:
    carried = read_carried(path)
    try:
        config = pipeline.transformer.config
        return unpacked_bits([carried["bits"]], schedule, config.bits_per_token)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path}: carries no usable bits ({error}); delete it, draw again"
        ) from None


def _gathered(rows: dict[str, dict[int, Tensor]], count: int, crew: Crew) -> dict[str, Sides]:
    found: dict[str, Sides] = {}
    for name in BIT_METRICS:
        for column, side in ((name, ""), (f"{name}_level", LEVELS)):
            # a process without images has no columns of its own
            if any(crew.gathered(column in rows)):
                whole = crew.whole(rows.get(column, {}), count)
                assert whole is not None
                found.setdefault(name, {})[side] = whole
    return found
