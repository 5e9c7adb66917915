"""LPIPS: how different two images look, by AlexNet's features and linear heads fitted to people's
judgements (version 0.1).

Shapes: B images, C channels, YX places.
Sources: R. Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
arXiv:1801.03924; A. Krizhevsky, "One weird trick for parallelizing convolutional neural networks",
arXiv:1404.5997, for this AlexNet.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_compressor.evaluation.metrics.metric import Metric, MetricSpec
from var_compressor.evaluation.metrics.weights import WeightFile, load_strictly

ALEXNET_FILE = WeightFile(
    names=("alexnet-owt-7be5be79.pth", "alexnet-owt-4df8aa71.pth"),
    source="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
)
# torchmetrics and lpips bring the heads along
HEADS_FILE = WeightFile(
    names=("lpips_alex_v0.1.pth", "alex.pth"),
    source="https://github.com/richzhang/PerceptualSimilarity (lpips/weights/v0.1/alex.pth)",
    also_in=("package:torchmetrics/functional/image/lpips_models", "package:lpips/weights/v0.1"),
    sha256_prefix="df73285e35b22355",
)
LPIPS = MetricSpec(
    name="lpips",
    compares="reference",
    higher_is_better=False,
    meaning="learned perceptual distance, 0 for an equal image",
    backbone="AlexNet, LPIPS 0.1",
    files=(ALEXNET_FILE, HEADS_FILE),
)

# of [-1, 1]: the mean and spread of ImageNet's pixels, rounded as the heads were fitted with
_SHIFT = (-0.030, -0.088, -0.188)
_SPREAD = (0.458, 0.448, 0.450)
_EPS = 1e-10
_WIDTHS = (64, 192, 384, 256, 256)
# the smallest side that leaves a place after the last pool
_MIN_SIDE = 31


class AlexNet(nn.Module):
    """The convolutions alone; their names are the published file's."""

    def __init__(self) -> None:
        super().__init__()
        kernels = {0: (11, 4, 2), 3: (5, 1, 2), 6: (3, 1, 1), 8: (3, 1, 1), 10: (3, 1, 1)}
        widths = pairwise((3, *_WIDTHS))
        self.features = nn.ModuleDict(
            {
                str(i): nn.Conv2d(num_in, num_out, kernel, stride, padding)
                for (i, (kernel, stride, padding)), (num_in, num_out) in zip(
                    kernels.items(), widths, strict=True
                )
            }
        )

    def forward(self, x_BCYX: Tensor) -> list[Tensor]:
        """What each convolution gives after its ReLU."""
        maps = []
        for name, conv in self.features.items():
            if name in ("3", "6"):
                x_BCYX = F.max_pool2d(x_BCYX, kernel_size=3, stride=2)
            x_BCYX = F.relu(conv(x_BCYX))
            maps.append(x_BCYX)
        return maps


class Heads(nn.Module):
    """One weight per channel and map; names are the published file's."""

    def __init__(self) -> None:
        super().__init__()
        for i, width in enumerate(_WIDTHS):
            # the file was saved with a dropout in front of every head
            head = nn.ModuleDict({"1": nn.Conv2d(width, 1, 1, bias=False)})
            self.add_module(f"lin{i}", nn.ModuleDict({"model": head}))

    def forward(self, squares: list[Tensor]) -> Tensor:
        """``[B]``: every map's weighted channels, averaged over places, summed over maps."""
        total = squares[0].new_zeros(len(squares[0]))
        for i, square_BCYX in enumerate(squares):
            total = total + self.get_submodule(f"lin{i}.model.1")(square_BCYX).mean((1, 2, 3))
        return total


class Lpips(Metric):
    """Rows are distances, float64; a set's value is their mean."""

    def __init__(
        self, spec: MetricSpec, network: AlexNet, heads: Heads, device: torch.device
    ) -> None:
        super().__init__(spec, device)
        self.network = network
        self.heads = heads

    @classmethod
    def opened(cls, spec: MetricSpec, files: Mapping[str, Path], device: torch.device) -> Lpips:
        with torch.device("meta"):
            network, heads = AlexNet(), Heads()
        load_strictly(network, files[ALEXNET_FILE.name], others=r"classifier\..*", device=device)
        load_strictly(heads, files[HEADS_FILE.name], others="", device=device)
        return cls(spec, network, heads, device)

    def row(self, image_13YX: Tensor, prompt: str, reference_13YX: Tensor | None) -> Tensor:
        assert reference_13YX is not None
        if min(image_13YX.shape[2:]) < _MIN_SIDE:
            raise ValueError(
                f"lpips of images of {image_13YX.shape[2]} x {image_13YX.shape[3]} pixels: its "
                f"network needs {_MIN_SIDE} on each side"
            )
        pairs = zip(*(self._directions(x) for x in (image_13YX, reference_13YX)), strict=True)
        squares = [(a_BCYX - b_BCYX).square() for a_BCYX, b_BCYX in pairs]
        return self.heads(squares)[0].double()

    def _directions(self, image_B3YX: Tensor) -> list[Tensor]:
        """Every map, each place's channels at length 1."""
        x_B3YX = image_B3YX.float() / 127.5 - 1
        shift, spread = (x_B3YX.new_tensor(v)[:, None, None] for v in (_SHIFT, _SPREAD))
        maps = self.network((x_B3YX - shift) / spread)
        return [x_BCYX / (x_BCYX.norm(dim=1, keepdim=True) + _EPS) for x_BCYX in maps]
