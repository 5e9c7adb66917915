"""Metrics of captions whose scene is known: what the reader reads in an image of Infinity-Tiny.

Shapes: F features of the reader, YX pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from var_compressor.evaluation.captions import captions
from var_compressor.evaluation.metrics.metric import Metric, MetricSpec, SetDistance
from var_compressor.evaluation.reader import Reader
from var_compressor.evaluation.scenes import SceneTruth, sample_scenes, truths
from var_compressor.evaluation.scores import score_caption

CAPTION_ACCURACY = MetricSpec(
    name="caption_accuracy",
    compares="caption",
    higher_is_better=True,
    meaning="share of images of which all is true that the caption says, as the reader sees it",
    backbone="reader of Infinity-Tiny",
)
READER_FID = MetricSpec(
    name="reader_fid",
    compares="truth",
    higher_is_better=False,
    meaning="Fréchet distance to rendered scenes in the reader's features",
    backbone="reader of Infinity-Tiny",
)
# those of the benchmark "tiny"
NUM_SCENES = 10_000


class CaptionAccuracy(Metric):
    """1 for an image that its caption is true of, else 0."""

    def __init__(self, spec: MetricSpec, reader: Reader, device: torch.device) -> None:
        super().__init__(spec, device)
        self.reader = reader

    @classmethod
    def opened(
        cls, spec: MetricSpec, files: Mapping[str, Path], device: torch.device
    ) -> CaptionAccuracy:
        return cls(spec, Reader.load().to(device), device)

    def row(self, image_13YX: Tensor, prompt: str, reference_13YX: Tensor | None) -> Tensor:
        truth = scene_of(prompt)
        if truth is None:
            raise ValueError(f"{self.spec.name}: {prompt!r} is no caption of a known scene")
        (reading,) = self.reader.read(_signed(image_13YX))
        return torch.tensor(score_caption(reading, truth).caption_right, dtype=torch.float64)


class ReaderDistance(SetDistance):
    """The Fréchet distance in the features of the reader."""

    def __init__(self, spec: MetricSpec, reader: Reader, device: torch.device) -> None:
        super().__init__(spec, device)
        self.reader = reader

    @classmethod
    def opened(
        cls, spec: MetricSpec, files: Mapping[str, Path], device: torch.device
    ) -> ReaderDistance:
        return cls(spec, Reader.load().to(device), device)

    def row(self, image_13YX: Tensor, prompt: str, reference_13YX: Tensor | None) -> Tensor:
        return self.reader.features(_signed(image_13YX))[0]


def scene_of(caption: str) -> SceneTruth | None:
    """What a caption of Infinity-Tiny's test scenes says is there; None for another prompt."""
    number = _numbers().get(caption)
    return None if number is None else truths(sample_scenes(torch.tensor([number]), "test"))[0]


@cache
def _numbers() -> dict[str, int]:
    """Numbers of the scenes by caption. Scenes of one caption differ in what it does not say."""
    texts = captions(sample_scenes(torch.arange(NUM_SCENES), "test"))
    return {text: number for number, text in enumerate(texts)}


def _signed(image_13YX: Tensor) -> Tensor:
    return image_13YX.float() / 127.5 - 1
