"""Metrics of bits for benchmarks: rows per image, by all processes together.

Bits come from the images, which carry them. Both models are in memory at once, and each image is
compared alone, so that its row does not depend on which process found it.

Shapes: N images, S levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from var_compressor.evaluation.bitwise import DrawRequest, bitwise_rows, unpacked_bits
from var_compressor.evaluation.gallery import Gallery, read_image
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
    crew: Crew,
    on_progress: Progress,
) -> list[dict[str, Sides]]:
    """Rows of every metric of BIT_METRICS for several benchmarks, in the order of their samples.

    Those that differ by level have ``[N, S]`` beside, as the side LEVELS.
    Raises: ValueError for a cfg per level, or for an image that carries no bits.
    """
    full, other = model.full_precision.open(), model.open()
    # one text encoder in memory: both models read the same
    other.text_encoder = full.text_encoder
    found = []
    for one in drawn:
        assert one.reference is not None
        name, samples = one.prompts.name, one.prompts.samples
        owners = owners_of(one, crew)
        mine = [number for number, owner in enumerate(owners) if owner == crew.rank]
        rows: dict[str, dict[int, Tensor]] = {}
        for done, number in enumerate(mine):
            sample = samples[number]
            seed = one.gallery.settings(name, sample)["seed"]
            request = DrawRequest(
                (sample.prompt,), (seed,), sampling, schedule.aspect_ratio, schedule.pixel_budget
            )
            full_bits, other_bits = (
                _carried(gallery, one, number, schedule, full)
                for gallery in (one.reference, one.gallery)
            )
            columns = bitwise_rows(full, other, request, full_bits=full_bits, other_bits=other_bits)
            for column, values in columns.items():
                rows.setdefault(column, {})[number] = values[0]
            on_progress(f"bits, {name}", done + 1, len(mine))
        found.append(_gathered(rows, len(samples), crew))
    return found


def _carried(
    gallery: Gallery, drawn: Drawn, number: int, schedule: Schedule, pipeline: InfinityPipeline
) -> list[Tensor]:
    path = gallery.path(drawn.prompts.name, drawn.prompts.samples[number])
    _, carried = read_image(path)
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
