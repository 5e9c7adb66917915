"""PSNR and SSIM of an image against the one that full precision drew, in float64: what scikit-image
finds, on any device.

Shapes: B images, YX pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from var_compressor.evaluation.agreement import SSIM_WINDOW, psnr_db, ssim
from var_compressor.evaluation.metrics.metric import Metric, MetricSpec

PSNR = MetricSpec(
    name="psnr",
    compares="reference",
    higher_is_better=True,
    meaning="peak signal-to-noise ratio in dB, 100 at most: an equal image counts as 100",
)
SSIM = MetricSpec(
    name="ssim",
    compares="reference",
    higher_is_better=True,
    meaning="structural similarity, 1 for an equal image; Gaussian window of 11 pixels, sigma 1.5",
)


class Psnr(Metric):
    """Decibels per image; the set's value is their mean.

    Without a ceiling one equal image would make the mean infinite, so a row is 100 at most; an
    error of one grey level in every pixel is 48.
    """

    @classmethod
    def opened(cls, spec: MetricSpec, files: Mapping[str, Path], device: torch.device) -> Psnr:
        return cls(spec, device)

    def row(self, image_13YX: Tensor, prompt: str, reference_13YX: Tensor | None) -> Tensor:
        assert reference_13YX is not None
        return psnr_db(_signed(image_13YX), _signed(reference_13YX))[0]


class Ssim(Metric):
    """Per image over all three channels; the set's value is their mean."""

    @classmethod
    def opened(cls, spec: MetricSpec, files: Mapping[str, Path], device: torch.device) -> Ssim:
        return cls(spec, device)

    def row(self, image_13YX: Tensor, prompt: str, reference_13YX: Tensor | None) -> Tensor:
        assert reference_13YX is not None
        if min(image_13YX.shape[2:]) < SSIM_WINDOW:
            raise ValueError(
                f"ssim of images of {image_13YX.shape[2]} x {image_13YX.shape[3]} pixels: its "
                f"window needs {SSIM_WINDOW} on each side"
            )
        return ssim(_signed(image_13YX), _signed(reference_13YX))[0]


def _signed(image_B3YX: Tensor) -> Tensor:
    """0..255 to [-1, 1] in float64."""
    return image_B3YX.double() / 127.5 - 1
