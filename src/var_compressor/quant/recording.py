"""What a calibration run draws: one image per prompt, kept as bits.

Shapes: R guidance rows, L tokens, Q bits per token, C embed_dim.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from var_compressor.artifact import ArtifactError, read_tensors, write_atomically
from var_compressor.models.bits import Pyramid
from var_compressor.models.sampling import Sampling, draw_noise, sample_bits, seeded_generators
from var_compressor.models.schedule import Level, Schedule
from var_compressor.models.tensor_files import is_as_sealed, seal_of
from var_compressor.models.transformer import TextFeatures
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.activations import ActivationStore
from var_compressor.quant.calibration import (
    BlockStream,
    CalibrationTrace,
    Progress,
    Recording,
    contexts_of,
    one_layer_cache,
)
from var_compressor.quant.team import SOLO, Team


@dataclass(frozen=True)
class Collection:
    """What to calibrate on: prompts by id, the seed of the first image, and how they are drawn."""

    prompts: Mapping[str, str]
    seed: int
    sampling: Sampling
    aspect_ratio: float = 1.0
    pixel_budget: str | None = None

    def to_dict(self) -> dict[str, Any]:
        text = json.dumps(sorted(self.prompts.items()))
        return {
            "prompts_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "num_prompts": len(self.prompts),
            "seed": self.seed,
            "sampling": json.loads(json.dumps(asdict(self.sampling))),
            "aspect_ratio": self.aspect_ratio,
            "pixel_budget": self.pixel_budget,
        }


def record(
    pipeline: InfinityPipeline,
    collection: Collection,
    store: ActivationStore,
    *,
    on_progress: Progress,
    team: Team = SOLO,
) -> CalibrationTrace:
    """The collection's generations; image number i has seed ``collection.seed + i``.

    Every process of the team draws its share, and all get the whole trace.
    Raises: ValueError for sampling that a pass over all levels at once cannot repeat.
    """
    check_recordable(collection.sampling)
    schedule = pipeline.schedule_for(collection.aspect_ratio, collection.pixel_budget)
    prompts = list(collection.prompts.values())
    texts = {}
    for i in team.mine(len(prompts)):
        text = pipeline.encode([prompts[i]])
        texts[i] = TextFeatures(text.packed_TE.cpu(), text.lens)
        on_progress("encoding", i + 1, len(prompts))
    if pipeline.text_encoder is not None:
        pipeline.text_encoder.release()
    mine = record_trace(
        pipeline,
        texts,
        store,
        schedule=schedule,
        seed=collection.seed,
        sampling=collection.sampling,
        on_progress=on_progress,
    )
    recordings = tuple(team.merged(mine).values())
    guidance = collection.sampling.guidance(schedule, pipeline.transformer.config.depth)
    return CalibrationTrace(recordings, schedule, guidance.is_on)


# --- drawing --------------------------------------------------------------------------------------


def check_recordable(sampling: Sampling) -> None:
    """Raises: ValueError for guidance inside the blocks or an early stop, which a pass over all
    levels at once cannot repeat.
    """
    if set(sampling.cfg_layers) - {0} or sampling.num_levels is not None:
        raise ValueError(
            f"calibration guides the logits and draws every level; sampling has cfg_layers "
            f"{sampling.cfg_layers}, num_levels {sampling.num_levels}"
        )


@torch.inference_mode()
def record_trace(
    pipeline: InfinityPipeline,
    texts: dict[int, TextFeatures],
    store: ActivationStore,
    *,
    schedule: Schedule,
    seed: int,
    sampling: Sampling,
    on_progress: Progress,
) -> dict[int, Recording]:
    """Draw one image per text (number i with ``seed + i``) and keep its bits.

    Level by level: all recordings, with every level so far, go through one block after the other,
    so that blocks can be read one at a time. What ``InfinityPipeline.draw`` would draw.
    """
    check_recordable(sampling)
    model = pipeline.transformer
    guidance = sampling.guidance(schedule, model.config.depth)
    taus = sampling.temperatures(schedule)
    drawings = {i: _Drawing(pipeline, schedule, seed + i) for i in texts}
    contexts = contexts_of(pipeline, texts, guided=guidance.is_on)
    stream = BlockStream(pipeline, schedule, contexts, store)
    new_cache = one_layer_cache(pipeline, schedule)
    drawn_levels = schedule.levels[:-1]
    for level in drawn_levels:
        levels = schedule.levels[: level.index + 1]
        for i, drawing in drawings.items():
            stream.start(i, drawing.tokens_BLQ, levels)
        for index, block in enumerate(model.blocks):
            stream.run(block, new_cache, levels)  # type: ignore[arg-type]
            steps = level.index * model.config.depth + index + 1
            on_progress("recording", steps, len(drawn_levels) * model.config.depth)
        for i, drawing in drawings.items():
            h_RLC = store.get(i)[:, level.offset :]
            logits = pipeline.transformer.guided_logits(
                h_RLC, contexts[i], guidance.scales[level.index]
            )
            drawing.draw(logits / taus[level.index], level, sampling)
    return {i: Recording(texts[i], tuple(drawing.bits)) for i, drawing in drawings.items()}


class _Drawing:
    """One image while it is drawn."""

    def __init__(self, pipeline: InfinityPipeline, schedule: Schedule, seed: int) -> None:
        self.generators = seeded_generators(seed, 1)
        self.num_bits = pipeline.transformer.config.bits_per_token
        self.pyramid: Pyramid = pipeline.new_pyramid(schedule, batch=1)
        self.bits: list[Tensor] = []
        self.tokens_BLQ: Tensor | None = None

    def draw(self, logits_BLQ2: Tensor, level: Level, sampling: Sampling) -> None:
        noise_BLQ2 = draw_noise(self.generators, level, self.num_bits, logits_BLQ2.device)
        bits_BLQ = sample_bits(logits_BLQ2, noise_BLQ2, sampling)
        self.bits.append(bits_BLQ.cpu())
        self.pyramid.add(bits_BLQ, level)
        tokens_BLQ = self.pyramid.tokens_for(self.pyramid.schedule.after(level))
        parts = [tokens_BLQ] if self.tokens_BLQ is None else [self.tokens_BLQ, tokens_BLQ]
        self.tokens_BLQ = torch.cat(parts, dim=1)


# --- on disk --------------------------------------------------------------------------------------


def write_trace(path: Path, trace: CalibrationTrace) -> None:
    """Keep a trace, so that a run which is cut off need not draw again."""
    tensors = {}
    for i, recording in enumerate(trace.recordings):
        tensors[f"{i:04d}.text"] = recording.text.packed_TE.contiguous()
        for level, bits_BLQ in enumerate(recording.bits):
            tensors[f"{i:04d}.bits.{level:02d}"] = bits_BLQ.contiguous()
    write_atomically(path, save(tensors, metadata=seal_of(tensors)))


def read_trace(path: Path, schedule: Schedule, *, guided: bool) -> CalibrationTrace:
    """What ``write_trace`` kept.

    Raises: ArtifactError when the file is damaged.
    """
    tensors = read_tensors(path, "cpu")
    if not is_as_sealed(path, tensors):
        raise ArtifactError(f"{path}: its content changed (sha256 differs); delete it")
    recordings = []
    for name in sorted(name for name in tensors if name.endswith(".text")):
        text_TE, prefix = tensors[name], name.removesuffix("text")
        bits = [tensors[key] for key in sorted(tensors) if key.startswith(f"{prefix}bits.")]
        recordings.append(Recording(TextFeatures(text_TE, (len(text_TE),)), tuple(bits)))
    return CalibrationTrace(tuple(recordings), schedule, guided)


def trace_of_cut_off_run(
    path: Path, pipeline: InfinityPipeline, collection: Collection
) -> CalibrationTrace:
    """The recordings that a run of the same collection kept."""
    schedule = pipeline.schedule_for(collection.aspect_ratio, collection.pixel_budget)
    guidance = collection.sampling.guidance(schedule, pipeline.transformer.config.depth)
    return read_trace(path, schedule, guided=guidance.is_on)
