"""Scores of what the reader read: objects, captions, and a Fréchet distance of its features.

Shapes: N pictures of a set, F features.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from var_compressor.evaluation.reader import Reading
from var_compressor.evaluation.scenes import SceneTruth

# a detection belongs to a true object when its centre is within this share of the object's radius
MATCH_RADIUS = 0.5
# pixels by which one centre must lie to the side of another for a stated relation to hold
RELATION_MARGIN = 12.0


@dataclass(frozen=True)
class CaptionScore:
    """Of one picture: how many of its caption's objects are in it, and whether all of the caption
    is true of it.
    """

    objects_right: int
    num_objects: int
    caption_right: bool


@dataclass(frozen=True)
class CaptionAccuracy:
    """Over a set of pictures: the share of objects and of captions that are right, from 0 to 1."""

    objects: float
    captions: float
    num_images: int


def match_objects(reading: Reading, truth: SceneTruth, *, by_position: bool) -> int:
    """How many true objects were read with shape, colour, material and size all right.

    With `by_position`, each must be found within half of its radius from its true centre; without,
    anywhere (a multiset match), which is what a picture generated from a caption allows.
    """
    if not by_position:
        wanted, found = (
            Counter(thing.attributes for thing in side.objects) for side in (truth, reading)
        )
        return (wanted & found).total()
    unused = list(reading.objects)
    num_right = 0
    for thing in truth.objects:
        nearest = min(unused, key=lambda seen: math.dist(seen.center, thing.center), default=None)
        if nearest is None or math.dist(nearest.center, thing.center) > MATCH_RADIUS * thing.radius:
            continue
        unused.remove(nearest)
        num_right += nearest.attributes == thing.attributes
    return num_right


def score_caption(reading: Reading, truth: SceneTruth) -> CaptionScore:
    """Whether what was read fits the caption of `truth`, wherever in the picture the objects are.

    The caption is right when the number of objects, all their attributes, the background and the
    stated relations are.
    """
    objects_right = match_objects(reading, truth, by_position=False)
    complete = objects_right == len(truth.objects) == len(reading.objects)
    caption_right = (
        complete and reading.background == truth.background and _relations_hold(reading, truth)
    )
    return CaptionScore(objects_right, len(truth.objects), caption_right)


def _relations_hold(reading: Reading, truth: SceneTruth) -> bool:
    """Whether some assignment of detections to true objects of equal attributes fulfils every
    stated relation.
    """
    for order in itertools.permutations(reading.objects):
        same = all(
            seen.attributes == thing.attributes
            for seen, thing in zip(order, truth.objects, strict=True)
        )
        if same and all(
            _holds(order[r.subject].center, r.kind, order[r.object].center) for r in truth.relations
        ):
            return True
    return False


def _holds(subject_xy: tuple[float, float], kind: str, object_xy: tuple[float, float]) -> bool:
    axis = 0 if kind in ("left", "right") else 1
    lead = object_xy[axis] - subject_xy[axis]
    return (lead if kind in ("left", "above") else -lead) >= RELATION_MARGIN


def caption_accuracy(scores: Sequence[CaptionScore]) -> CaptionAccuracy:
    """Raises: ValueError for an empty list, of which no share exists."""
    if not scores:
        raise ValueError("caption_accuracy got no scores; read at least one picture")
    num_objects = sum(score.num_objects for score in scores)
    objects = sum(score.objects_right for score in scores) / num_objects
    return CaptionAccuracy(
        objects, sum(score.caption_right for score in scores) / len(scores), len(scores)
    )


@dataclass(frozen=True)
class FittedNormal:
    """The normal distribution of a set of features, in float64.

    ``half_RF`` has R = min(N, F) rows, and ``half_RF.T @ half_RF`` is the covariance, which is
    never formed: its small eigenvalues would drown in the rounding of the large ones.
    """

    mean_F: Tensor
    half_RF: Tensor

    @classmethod
    def of(cls, features_NF: Tensor) -> FittedNormal:
        """Raises: ValueError for fewer than two rows, of which there is no covariance."""
        if len(features_NF) < 2:
            raise ValueError(f"features are {tuple(features_NF.shape)}; give two rows or more")
        x_NF = features_NF.double()
        mean_F = x_NF.mean(0)
        half_RF = torch.linalg.qr(x_NF - mean_F, mode="r").R / (len(x_NF) - 1) ** 0.5
        return cls(mean_F, half_RF)

    def frechet_distance(self, other: FittedNormal) -> float:
        """``|m_A - m_B|^2 + Tr A + Tr B - 2 Tr sqrt(A B)``, >= 0, in the features' unit squared.

        Tr sqrt(A B) is the sum of the singular values of H_A H_B^T: no square root of a
        non-symmetric product, and singular covariances do no harm.
        Source: M. Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", arXiv:1706.08500.
        """
        means = (self.mean_F - other.mean_F).square().sum()
        traces = self.half_RF.square().sum() + other.half_RF.square().sum()
        overlap = torch.linalg.svdvals(self.half_RF @ other.half_RF.T).sum()
        return max(float(means + traces - 2 * overlap), 0.0)


def frechet_distance(features_a_NF: Tensor, features_b_NF: Tensor) -> float:
    """Fréchet distance of the normal distributions fitted to two sets of features; see
    `FittedNormal`.

    Raises: ValueError when the sets have other numbers of features or fewer than two rows.
    """
    shapes = tuple(features_a_NF.shape), tuple(features_b_NF.shape)
    if shapes[0][1] != shapes[1][1] or min(shapes[0][0], shapes[1][0]) < 2:
        raise ValueError(
            f"features are {shapes[0]} and {shapes[1]}; "
            "give two equally wide sets of two rows or more"
        )
    return FittedNormal.of(features_a_NF).frechet_distance(FittedNormal.of(features_b_NF))
