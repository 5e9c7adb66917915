"""One model against full precision: the same captions and seeds, what differs and by how much.

Every model draws the same captions of known scenes, image i with seed + i. What it drew is compared
with full precision pixel by pixel, and judged by the reader. Intervals are of the images drawn:
they say how far a number would move with other captions.

Shapes: N images of an exam, B images of a batch, F features of the reader.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from var_compressor.evaluation.agreement import (
    BitAgreement,
    bit_agreement,
    pooled,
    psnr_db,
    ssim,
)
from var_compressor.evaluation.captions import captions
from var_compressor.evaluation.reader import Reader
from var_compressor.evaluation.rendering import render
from var_compressor.evaluation.scenes import SceneBatch, truths
from var_compressor.evaluation.scores import FittedNormal, frechet_distance, score_caption
from var_compressor.evaluation.statistics import (
    Estimate,
    bootstrap_mean,
    bootstrap_ratio,
    centered_estimate,
    distance_estimate,
    paired_difference,
    resampled_frechet,
)
from var_compressor.models.sampling import Sampling
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.calibration import Progress


@dataclass(frozen=True)
class Resampling:
    """How intervals are found; the Fréchet distance, slow to compute, gets fewer resamples."""

    num_resamples: int
    num_frechet_resamples: int
    seed: int


@dataclass(frozen=True)
class Exam:
    """What every model is asked to draw, ``batch`` images at a time, and how it is judged.

    Image i is drawn for the caption of scene i with ``seed + i``. ``renders_NF`` are features of
    rendered scenes that no caption is taken from.
    Raises: ValueError for a cfg that differs by level, which teacher forcing cannot repeat.
    """

    scenes: SceneBatch
    seed: int
    sampling: Sampling
    batch: int
    reader: Reader
    renders_NF: Tensor
    resampling: Resampling

    def __post_init__(self) -> None:
        if not isinstance(self.sampling.cfg, float | int):
            raise ValueError(
                "models are compared with one cfg for all levels; set collect.cfg to a number"
            )

    def batches(self) -> Iterator[slice]:
        for start in range(0, len(self.scenes), self.batch):
            yield slice(start, start + self.batch)


@dataclass(frozen=True)
class Answers:
    """What one model drew for an exam and what the reader saw in it, all on the CPU.

    ``bits`` uint8 ``[N, L, Q]`` per level; images in [-1, 1]; counts of objects per image.
    """

    bits: tuple[Tensor, ...]
    latent_NDYX: Tensor
    image_N3YX: Tensor
    objects_right_N: Tensor
    objects_N: Tensor
    caption_right_N: Tensor
    features_NF: Tensor


@dataclass(frozen=True)
class Marks:
    """How good one model's pictures are: shares from 0 to 1, and the Fréchet distance to renders
    in the reader's features.
    """

    objects_right: Estimate
    captions_right: Estimate
    frechet: Estimate


@dataclass(frozen=True)
class Examined:
    """A model with its answers and marks; ``frechet_R`` is the distance of resampled images, by
    which the distances of two models pair up.
    """

    pipeline: InfinityPipeline
    answers: Answers
    marks: Marks
    frechet_R: Tensor


@dataclass(frozen=True)
class Likeness:
    """How near one model's pictures are to full precision's: means over the images.

    ``latent_error`` is the norm of the latents' difference over the norm of full precision's.
    Changes are this model's number minus full precision's.
    """

    psnr_db: Estimate
    ssim: Estimate
    latent_error: Estimate
    objects_right_change: Estimate
    captions_right_change: Estimate
    frechet_change: Estimate


@dataclass(frozen=True)
class Comparison:
    """One model against full precision; ``agreement`` is on the bits full precision drew."""

    marks: Marks
    likeness: Likeness
    agreement: BitAgreement


def compare(
    full: Examined, other: InfinityPipeline, exam: Exam, *, on_progress: Progress
) -> Comparison:
    """Let ``other`` draw what ``full`` drew in the same exam, and compare them."""
    found = examine(other, exam, on_progress=on_progress)
    return Comparison(
        marks=found.marks,
        likeness=likeness(found, full, exam),
        agreement=forced_agreement(full, other, exam, on_progress=on_progress),
    )


@torch.inference_mode()
def examine(pipeline: InfinityPipeline, exam: Exam, *, on_progress: Progress) -> Examined:
    """Let a model draw all captions, and mark what it drew."""
    schedule = pipeline.schedule_for(1.0, None)
    texts, parts = captions(exam.scenes), []
    for rows in exam.batches():
        drawn = pipeline.draw(
            pipeline.encode(texts[rows]),
            schedule,
            seed=exam.seed + rows.start,
            sampling=exam.sampling,
            with_trace=True,
        )
        image_B3YX = pipeline.vae.decode(drawn.latent_BDYX).float()
        seen = exam.reader.read(image_B3YX), exam.reader.features(image_B3YX).cpu()
        parts.append((drawn.latent_BDYX.cpu(), image_B3YX.cpu(), *seen, drawn.trace.bits))
        on_progress("drawing", min(rows.stop, len(texts)), len(texts))
    latents, images, readings, features, bits = zip(*parts, strict=True)
    scores = [
        score_caption(reading, truth)
        for reading, truth in zip(chain(*readings), truths(exam.scenes), strict=True)
    ]
    columns_N3 = torch.tensor([(s.objects_right, s.num_objects, s.caption_right) for s in scores])
    objects_right_N, objects_N, caption_right_N = columns_N3.unbind(1)
    answers = Answers(
        bits=tuple(torch.cat(level).cpu() for level in zip(*bits, strict=True)),
        latent_NDYX=torch.cat(latents),
        image_N3YX=torch.cat(images),
        objects_right_N=objects_right_N,
        objects_N=objects_N,
        caption_right_N=caption_right_N,
        features_NF=torch.cat(features),
    )
    frechet_R = resampled_frechet(
        answers.features_NF,
        FittedNormal.of(exam.renders_NF),
        num_resamples=exam.resampling.num_frechet_resamples,
        seed=exam.resampling.seed,
    )
    return Examined(pipeline, answers, mark(answers, frechet_R, exam), frechet_R)


def mark(answers: Answers, frechet_R: Tensor, exam: Exam) -> Marks:
    """A model's marks, with intervals over its images."""
    how = {"num_resamples": exam.resampling.num_resamples, "seed": exam.resampling.seed}
    return Marks(
        objects_right=bootstrap_ratio(answers.objects_right_N, answers.objects_N, **how),
        captions_right=bootstrap_mean(answers.caption_right_N, **how),
        frechet=distance_estimate(
            frechet_distance(answers.features_NF, exam.renders_NF), frechet_R
        ),
    )


@torch.inference_mode()
def likeness(found: Examined, full: Examined, exam: Exam) -> Likeness:
    """How near what a model drew is to what full precision drew, image by image."""
    how = {"num_resamples": exam.resampling.num_resamples, "seed": exam.resampling.seed}
    a, b = found.answers, full.answers
    psnr_N, ssim_N = image_likeness(a.image_N3YX, b.image_N3YX, batch=exam.batch)
    norms_N = [
        z_NDYX.flatten(1).norm(dim=1) for z_NDYX in (a.latent_NDYX - b.latent_NDYX, b.latent_NDYX)
    ]
    change = found.marks.frechet.value - full.marks.frechet.value
    return Likeness(
        psnr_db=bootstrap_mean(psnr_N, **how),
        ssim=bootstrap_mean(ssim_N, **how),
        latent_error=bootstrap_mean(norms_N[0] / norms_N[1], **how),
        objects_right_change=paired_difference(
            a.objects_right_N, b.objects_right_N, a.objects_N, **how
        ),
        captions_right_change=paired_difference(
            a.caption_right_N, b.caption_right_N, torch.ones_like(a.objects_N), **how
        ),
        frechet_change=centered_estimate(change, found.frechet_R - full.frechet_R),
    )


def image_likeness(
    image_N3YX: Tensor, reference_N3YX: Tensor, *, batch: int
) -> tuple[Tensor, Tensor]:
    """PSNR in dB and SSIM of every image."""
    pairs = list(zip(image_N3YX.split(batch), reference_N3YX.split(batch), strict=True))
    psnr_N, ssim_N = (torch.cat([score(*pair) for pair in pairs]) for score in (psnr_db, ssim))
    return psnr_N, ssim_N


def forced_agreement(
    full: Examined, other: InfinityPipeline, exam: Exam, *, on_progress: Progress
) -> BitAgreement:
    """Both models' next bits, given the bits that full precision drew."""
    assert isinstance(exam.sampling.cfg, float | int)
    texts, parts = captions(exam.scenes), []
    for rows in exam.batches():
        text = full.pipeline.encode(texts[rows])
        bits = [level_NLQ[rows] for level_NLQ in full.answers.bits]
        parts.append(bit_agreement(full.pipeline, other, text, bits, cfg=exam.sampling.cfg))
        on_progress("teacher forcing", min(rows.stop, len(texts)), len(texts))
    return pooled(parts)


@torch.inference_mode()
def render_features(reader: Reader, scenes: SceneBatch) -> Tensor:
    """The reader's features of the scenes as they are rendered, on the CPU."""
    return reader.features(render(scenes)).cpu()
