"""What every image metric is: a row of numbers per image, and a value over the rows of a set.

Rows are what is stored. They are computed one image at a time, so that a row depends on its image
(and its prompt or reference) alone: any sharding, batch size or order gives the same bits on the
same device and number of threads, and values are reduced from rows sorted by image.

Shapes: B images of a batch, N images of a set, YX pixels, F numbers of a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from var_compressor.evaluation.metrics.weights import WeightFile
from var_compressor.evaluation.scores import frechet_distance

Compares = Literal["reference", "truth", "prompt", "caption", "image", "bits"]


@dataclass(frozen=True)
class MetricSpec:
    """What a metric is and needs.

    ``compares``: each image with the "reference" that full precision drew at the same seed; the set
    of images with the set of "truth" images; each image with its "prompt"; with its "caption", a
    prompt whose scene is known; or the "image" alone. Metrics of "bits" see no images.
    ``backbone`` names the network for the output, "" where there is none.
    """

    name: str
    compares: Compares
    higher_is_better: bool
    meaning: str
    backbone: str = ""
    files: tuple[WeightFile, ...] = ()

    @property
    def reads_prompts(self) -> bool:
        return self.compares in ("prompt", "caption")


class Metric(ABC):
    """An opened metric. Subclasses say what one image's row is; most reduce by the mean."""

    def __init__(self, spec: MetricSpec, device: torch.device) -> None:
        self.spec = spec
        self.device = device

    @torch.inference_mode()
    def rows(
        self, image_B3YX: Tensor, *, prompts: Sequence[str], reference_B3YX: Tensor | None = None
    ) -> Tensor:
        """One row per image on the CPU: float64 ``[B]``, or float32 ``[B, F]`` for features.

        Images are uint8. Prompts and references are needed by the metrics that compare with them.
        Raises: ValueError for other images, or when what is compared with does not fit.
        """
        _check_images(image_B3YX, "images")
        if self.spec.compares == "reference":
            if reference_B3YX is None:
                raise ValueError(f"{self.spec.name} compares with references; none were given")
            _check_images(reference_B3YX, "references")
            if reference_B3YX.shape != image_B3YX.shape:
                raise ValueError(
                    f"{self.spec.name}: images are {tuple(image_B3YX.shape)} and references "
                    f"{tuple(reference_B3YX.shape)}; both must be drawn at the same size"
                )
        if self.spec.reads_prompts and len(prompts) != len(image_B3YX):
            raise ValueError(
                f"{self.spec.name}: {len(prompts)} prompts for {len(image_B3YX)} images"
            )
        found = []
        # TF32 would keep 10 bits of every product, which shows in features and scores
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ):
            for i in range(len(image_B3YX)):
                prompt = prompts[i] if self.spec.reads_prompts else ""
                reference = None if reference_B3YX is None else self._one(reference_B3YX, i)
                found.append(self.row(self._one(image_B3YX, i), prompt, reference).cpu())
        return torch.stack(found) if found else torch.empty(0, dtype=torch.float64)

    def _one(self, image_B3YX: Tensor, i: int) -> Tensor:
        return image_B3YX[i : i + 1].to(self.device)

    @abstractmethod
    def row(self, image_13YX: Tensor, prompt: str, reference_13YX: Tensor | None) -> Tensor:
        """Of one uint8 image on ``self.device``: a float64 scalar, or float32 features ``[F]``."""

    def value(self, rows: Tensor, truth_rows: Tensor | None = None) -> float:
        """Of a set, from its rows sorted by image: the mean, unless the metric says otherwise.

        Raises: ValueError without rows, or without the truth's where the metric compares with it.
        """
        if not len(rows):
            raise ValueError(f"{self.spec.name} got no rows; measure at least one image")
        return float(rows.double().mean())


class SetDistance(Metric):
    """Rows are features, float32 ``[F]``; a set's value is its Fréchet distance to the truth's."""

    def value(self, rows: Tensor, truth_rows: Tensor | None = None) -> float:
        if truth_rows is None or min(len(rows), len(truth_rows)) < 2:
            raise ValueError(
                f"{self.spec.name} is the distance of two sets of two images or more; got "
                f"{len(rows)} and {0 if truth_rows is None else len(truth_rows)} rows"
            )
        return frechet_distance(rows, truth_rows)


def _check_images(image_B3YX: Tensor, what: str) -> None:
    if image_B3YX.dtype != torch.uint8 or image_B3YX.ndim != 4 or image_B3YX.shape[1] != 3:
        raise ValueError(
            f"{what} are {image_B3YX.dtype} {tuple(image_B3YX.shape)}; "
            "metrics take uint8 [B, 3, Y, X]"
        )
