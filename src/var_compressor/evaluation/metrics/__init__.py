"""Image metrics: what each compares, the weights it needs, and where they are looked for.

``METRICS`` says what there is; ``open_metric`` finds a metric's weights and gives a `Metric`, whose
``rows`` are stored per image and whose ``value`` reduces them. Missing weights are a
`MetricUnavailable`, with one line that says what is missing, where it was looked for, where it is
published and where to put it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from var_compressor.evaluation.metrics.bits import (
    BIT_AGREEMENT,
    BIT_KL,
    FIRST_DIVERGENCE,
    LATENT_ERROR,
)
from var_compressor.evaluation.metrics.clip import CLIP_IQA, CLIP_SCORE, ClipIqa, ClipScore
from var_compressor.evaluation.metrics.image_reward import IMAGE_REWARD, ImageReward
from var_compressor.evaluation.metrics.inception import CLEAN_FID, FID, InceptionDistance
from var_compressor.evaluation.metrics.lpips import LPIPS, Lpips
from var_compressor.evaluation.metrics.metric import Metric, MetricSpec
from var_compressor.evaluation.metrics.pixels import PSNR, SSIM, Psnr, Ssim
from var_compressor.evaluation.metrics.scenes import (
    CAPTION_ACCURACY,
    READER_FID,
    CaptionAccuracy,
    ReaderDistance,
)
from var_compressor.evaluation.metrics.weights import MetricUnavailable, file_hashes, find_files

__all__ = [
    "BIT_METRICS",
    "METRICS",
    "Metric",
    "MetricSpec",
    "MetricUnavailable",
    "find_weights",
    "open_metric",
    "weights_sha256",
]

Opener = Callable[[MetricSpec, Mapping[str, Path], torch.device], Metric]

_OPENERS: dict[str, tuple[MetricSpec, Opener]] = {
    spec.name: (spec, opener)
    for spec, opener in (
        (PSNR, Psnr.opened),
        (SSIM, Ssim.opened),
        (LPIPS, Lpips.opened),
        (FID, InceptionDistance.opened),
        (CLEAN_FID, InceptionDistance.opened),
        (CLIP_SCORE, ClipScore.opened),
        (CLIP_IQA, ClipIqa.opened),
        (IMAGE_REWARD, ImageReward.opened),
        (CAPTION_ACCURACY, CaptionAccuracy.opened),
        (READER_FID, ReaderDistance.opened),
    )
}
# computed from what models draw, by `evaluation.bit_rows`: there is no `Metric` to open
BIT_METRICS = {spec.name: spec for spec in (BIT_AGREEMENT, BIT_KL, FIRST_DIVERGENCE, LATENT_ERROR)}
METRICS: dict[str, MetricSpec] = {
    **{name: spec for name, (spec, _) in _OPENERS.items()},
    **BIT_METRICS,
}


def open_metric(name: str, *, weights_dir: Path | None, device: torch.device | str) -> Metric:
    """The metric of that name, its weights loaded on ``device``.

    Files are looked for in ``weights_dir`` (else in $VARC_METRIC_WEIGHTS), in the caches of
    torch.hub and the Hugging Face hub, and last on the hub itself where they are published there.
    Raises: ValueError for an unknown name, MetricUnavailable when something it needs is missing,
    CheckpointError when a file is not what it should be.
    """
    files = find_weights(name, weights_dir=weights_dir)
    spec, opened = _OPENERS[name]
    return opened(spec, files, torch.device(device))


def weights_sha256(name: str, *, weights_dir: Path | None) -> dict[str, str]:
    """Of all files that `open_metric` reads, by name. Raises: as `find_weights`."""
    spec, _ = _OPENERS[name]
    return file_hashes(spec.files, find_weights(name, weights_dir=weights_dir))


def find_weights(name: str, *, weights_dir: Path | None) -> dict[str, Path]:
    """Where the files are that `open_metric` reads, by their names.

    Raises: ValueError for an unknown name, MetricUnavailable when something is missing.
    """
    if name not in _OPENERS:
        raise ValueError(f"no metric of images is called {name!r}; there are {', '.join(_OPENERS)}")
    spec, _ = _OPENERS[name]
    return find_files(spec.name, spec.files, weights_dir)
