"""The reader: a small network that reads a scene's objects and background back from a picture.

It is trained on renders (`training/reader.py`), so what it says about a generated picture is as
good as its measured accuracy on fresh renders, which stands in `metrics.json` beside its weights.
It has three uses: caption accuracy and a Fréchet distance between two sets of pictures
(`scores.py`), and a perceptual loss for training an image codec
(`Reader.feature_maps`).

Shapes: B pictures, C channels, H W pixels, Y X cells of 16x16 pixels, O object slots, N pictures of
a set, F features.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from var_compressor.evaluation.scenes import (
    BACKGROUNDS,
    COLORS,
    MATERIALS,
    SHAPES,
    SIZES,
    SceneBatch,
)

EMBEDDED = Path(__file__).parents[1] / "assets/infinity-tiny/reader/model.safetensors"

STRIDE = 16
ATTRIBUTES = {
    "shape": len(SHAPES),
    "color": len(COLORS),
    "material": len(MATERIALS),
    "size": len(SIZES),
}

MIN_CONFIDENCE = 0.4
MAX_DETECTIONS = 8
# pixels; the centres of two true objects are at least 63 apart
MIN_CENTER_DISTANCE = 36.0

# ---------------------------------------------------------------- the network


@dataclass(frozen=True)
class ReaderConfig:
    """Channels at strides 2, 4, 8 and 16, and the number of residual blocks at stride 16."""

    widths: tuple[int, int, int, int] = (24, 48, 96, 128)
    num_blocks: int = 2


class ReaderOutput(NamedTuple):
    """Logits per cell (`background_BG`: per picture). `offset_B2YX` is the centre's place relative
    to the cell's, in cells.
    """

    objectness_BYX: Tensor
    offset_B2YX: Tensor
    shape_BKYX: Tensor
    color_BKYX: Tensor
    material_BKYX: Tensor
    size_BKYX: Tensor
    background_BG: Tensor


class ReadObject(NamedTuple):
    """A detection: attribute indices as in `TrueObject`, centre in pixels, confidence from 0 to
    1.
    """

    shape: int
    color: int
    material: int
    size: int
    center: tuple[float, float]
    confidence: float

    @property
    def attributes(self) -> tuple[int, int, int, int]:
        return (self.shape, self.color, self.material, self.size)


@dataclass(frozen=True)
class Reading:
    """What the reader sees in one picture, the surest object first."""

    objects: tuple[ReadObject, ...]
    background: int


class ConvNorm(nn.Sequential):
    """Convolution 3x3, batch norm, ReLU."""

    def __init__(self, num_in: int, num_out: int, *, stride: int) -> None:
        super().__init__(
            nn.Conv2d(num_in, num_out, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(num_out),
            nn.ReLU(inplace=True),
        )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around which the input is added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_in = ConvNorm(width, width, stride=1)
        self.conv_out = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.relu(x_BCHW + self.norm(self.conv_out(self.conv_in(x_BCHW))))


class Reader(nn.Module):
    """Finds object centres on a grid of stride 16 and classifies each; pictures are [B, 3, H, W] in
    [-1, 1].
    """

    def __init__(self, config: ReaderConfig) -> None:
        super().__init__()
        self.config = config
        first, second, third, last = config.widths
        self.stages = nn.ModuleList(
            [
                ConvNorm(3, first, stride=2),
                nn.Sequential(
                    ConvNorm(first, second, stride=2), ConvNorm(second, second, stride=1)
                ),
                nn.Sequential(ConvNorm(second, third, stride=2), ConvNorm(third, third, stride=1)),
                nn.Sequential(
                    ConvNorm(third, last, stride=2),
                    *(ResidualBlock(last) for _ in range(config.num_blocks)),
                ),
            ]
        )
        to_logits = nn.Conv2d(last, 3 + sum(ATTRIBUTES.values()), 1)
        # few cells hold a centre: start from that prior, as focal losses ask for
        assert to_logits.bias is not None
        nn.init.constant_(to_logits.bias[:1], -4.0)
        self.cell_head = nn.Sequential(ConvNorm(last, last, stride=1), to_logits)
        self.background_head = nn.Linear(third + last, len(BACKGROUNDS))

    def feature_maps(self, image_B3HW: Tensor) -> list[Tensor]:
        """Maps of strides 2, 4, 8 and 16, differentiable with respect to the picture.

        Raises: ValueError when the sides are no multiples of 16.
        """
        height, width = image_B3HW.shape[-2:]
        if height % STRIDE or width % STRIDE:
            raise ValueError(
                f"picture is {height}x{width}; resize it to multiples of {STRIDE} on both sides"
            )
        maps, x_BCHW = [], image_B3HW
        for stage in self.stages:
            x_BCHW = stage(x_BCHW)
            maps.append(x_BCHW)
        return maps

    def features(self, image_B3HW: Tensor) -> Tensor:
        """[B, F] the means of the two coarsest maps, for `frechet_distance`."""
        return _pool(self.feature_maps(image_B3HW))

    def forward(self, image_B3HW: Tensor) -> ReaderOutput:
        maps = self.feature_maps(image_B3HW)
        cells_BKYX = self.cell_head(maps[-1])
        sizes = [1, 2, *ATTRIBUTES.values()]
        objectness_B1YX, offset, shape, color, material, size = cells_BKYX.split(sizes, dim=1)
        background_BG = self.background_head(_pool(maps))
        return ReaderOutput(
            objectness_B1YX[:, 0], offset, shape, color, material, size, background_BG
        )

    @torch.inference_mode()
    def read(self, image_B3HW: Tensor) -> list[Reading]:
        """What each picture shows. Use it in eval mode: in train mode, batch norm mixes the
        pictures.
        """
        output = self(image_B3HW)
        score_BYX = output.objectness_BYX.float().sigmoid()
        is_peak_BYX = score_BYX == F.max_pool2d(score_BYX[:, None], 3, stride=1, padding=1)[:, 0]
        num_kept = min(MAX_DETECTIONS, score_BYX[0].numel())
        score_BK, cell_BK = (score_BYX * is_peak_BYX).flatten(1).topk(num_kept)
        attributes_BK4 = torch.stack(
            [self._at(output[2 + i].argmax(1), cell_BK) for i in range(4)], dim=-1
        )
        width = score_BYX.shape[2]
        x_BK = (cell_BK % width + 0.5 + self._at(output.offset_B2YX[:, 0], cell_BK)) * STRIDE
        y_BK = (cell_BK // width + 0.5 + self._at(output.offset_B2YX[:, 1], cell_BK)) * STRIDE
        columns = (score_BK, x_BK, y_BK, attributes_BK4, output.background_BG.argmax(1))
        return [
            _reading(*row) for row in zip(*(column.tolist() for column in columns), strict=True)
        ]

    @staticmethod
    def _at(map_BYX: Tensor, cell_BK: Tensor) -> Tensor:
        return map_BYX.flatten(1).gather(1, cell_BK)

    def save(self, path: Path) -> None:
        """Write the weights as bfloat16 to `path` and the configuration to `config.json` beside
        it.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: tensor.to(torch.bfloat16).contiguous().cpu()
            for name, tensor in self._stored().items()
        }
        save_file(tensors, path)
        (path.parent / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path = EMBEDDED) -> Reader:
        """A reader in eval mode and float32 from `path` (safetensors) and the `config.json` beside
        it.

        Raises: ValueError naming the tensor and the shapes where the file does not fit the
        configuration.
        """
        path = Path(path)
        for needed in (path, path.parent / "config.json"):
            if not needed.is_file():
                raise ValueError(
                    f"{needed} is missing; run `python training/reader.py --out {path.parent}`"
                )
        config = json.loads((path.parent / "config.json").read_text())
        reader = cls(ReaderConfig(widths=tuple(config["widths"]), num_blocks=config["num_blocks"]))
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(
                f"{path} is no safetensors file ({error}); train the reader again"
            ) from error
        expected = reader._stored()
        for name in sorted(expected.keys() | tensors.keys()):
            found, wanted = (
                tuple(t[name].shape) if name in t else "nothing" for t in (tensors, expected)
            )
            if found != wanted:
                raise ValueError(
                    f"{path}: {name} holds {found}, its config.json asks for {wanted}; "
                    "train the reader again"
                )
        reader.load_state_dict(
            {name: tensor.float() for name, tensor in tensors.items()}, strict=False
        )
        return reader.eval()

    def _stored(self) -> dict[str, Tensor]:
        """The state without batch norm's step counters, which inference does not read."""
        return {
            name: t
            for name, t in self.state_dict().items()
            if not name.endswith("num_batches_tracked")
        }


def _pool(maps: list[Tensor]) -> Tensor:
    return torch.cat([map_BCHW.float().mean(dim=(2, 3)) for map_BCHW in maps[-2:]], dim=1)


def _reading(
    scores: list[float],
    xs: list[float],
    ys: list[float],
    attributes: list[list[int]],
    background: int,
) -> Reading:
    """Detections by falling confidence, without those near a surer one."""
    kept: list[ReadObject] = []
    for score, x, y, indices in zip(scores, xs, ys, attributes, strict=True):
        near = any(math.dist(thing.center, (x, y)) < MIN_CENTER_DISTANCE for thing in kept)
        if score >= MIN_CONFIDENCE and not near:
            shape, color, material, size = indices
            kept.append(ReadObject(shape, color, material, size, (x, y), score))
    return Reading(tuple(kept), background)


# ---------------------------------------------------------------- training loss

PEAK_WIDTH = 0.9  # cells; width of the bump around a centre in which a miss is penalised less


def reader_loss(output: ReaderOutput, scenes: SceneBatch) -> Tensor:
    """Scalar: focal loss of the centres, and attributes and offsets around them, and the
    background's class.

    Source of the centre loss: X. Zhou et al., "Objects as Points" (CenterNet), arXiv:1904.07850,
    eq. 1.
    """
    height, width = output.objectness_BYX.shape[1:]
    offset_BO2YX = _offsets_to_centers(scenes, height, width)
    distance_BOYX = offset_BO2YX.square().sum(2)
    distance_BOYX = distance_BOYX.masked_fill(~scenes.present_BO[:, :, None, None], 1e4)
    nearest_BYX, slot_BYX = distance_BOYX.min(dim=1)
    is_center_BYX = (offset_BO2YX.abs().amax(2) <= 0.5) & scenes.present_BO[:, :, None, None]
    centers = _center_loss(output.objectness_BYX.float(), nearest_BYX, is_center_BYX.any(1))

    weight_BYX = torch.exp(-nearest_BYX) * (nearest_BYX < 2.25)
    truth_by_name = {
        "shape": scenes.shape_BO,
        "color": scenes.color_BO,
        "material": scenes.material_BO,
    }
    truth_by_name["size"] = scenes.size_BO
    attributes = output.objectness_BYX.new_zeros(())
    for index, truth_BO in enumerate(truth_by_name.values()):
        target_BYX = truth_BO.gather(1, slot_BYX.flatten(1)).view_as(slot_BYX)
        entropy_BYX = F.cross_entropy(output[2 + index].float(), target_BYX, reduction="none")
        attributes = attributes + (entropy_BYX * weight_BYX).sum()
    slot_B12YX = slot_BYX[:, None, None].expand(-1, 1, 2, -1, -1)
    target_B2YX = offset_BO2YX.gather(1, slot_B12YX)[:, 0]
    error_BYX = F.smooth_l1_loss(
        output.offset_B2YX.float(), target_B2YX, reduction="none", beta=0.2
    ).sum(1)
    per_weight = (attributes + (error_BYX * weight_BYX).sum()) / weight_BYX.sum()
    return (
        centers
        + per_weight
        + 0.5 * F.cross_entropy(output.background_BG.float(), scenes.background_B)
    )


def _offsets_to_centers(scenes: SceneBatch, height: int, width: int) -> Tensor:
    """[B, O, 2, Y, X]: from every cell's middle to every object's centre, in cells, x first."""
    device = scenes.center_BO2.device
    x_X = torch.arange(width, device=device) + 0.5
    y_Y = torch.arange(height, device=device) + 0.5
    cell_2YX = torch.stack([x_X.expand(height, width), y_Y[:, None].expand(height, width)])
    return scenes.center_BO2[..., None, None] / STRIDE - cell_2YX


def _center_loss(logit_BYX: Tensor, distance2_BYX: Tensor, is_center_BYX: Tensor) -> Tensor:
    """Penalty-reduced focal loss, per object."""
    bump_BYX = torch.exp(-distance2_BYX / (2 * PEAK_WIDTH**2))
    score_BYX = logit_BYX.sigmoid()
    hit_BYX = (1 - score_BYX).square() * F.logsigmoid(logit_BYX)
    miss_BYX = (1 - bump_BYX) ** 4 * score_BYX.square() * F.logsigmoid(-logit_BYX)
    return -torch.where(is_center_BYX, hit_BYX, miss_BYX).sum() / is_center_BYX.sum()
