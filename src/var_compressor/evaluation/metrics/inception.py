"""Fréchet Inception distance: Inception-v3 as its 2015 TensorFlow graph computes it, and two ways
to bring an image to the 299 x 299 pixels that it takes.

The graph differs from the later Inception-v3 in its pools: an average leaves out the padding, and
the last block's pool branch takes a maximum. Tensor names are those of the published file.

Shapes: B images, C channels, YX places, F = 2048 features.
Sources: C. Szegedy et al., "Rethinking the Inception Architecture for Computer Vision",
arXiv:1512.00567; M. Heusel et al., arXiv:1706.08500, for the distance; G. Parmar et al., "On
Aliased Resizing and Surprising Subtleties in GAN Evaluation", arXiv:2104.11222, for the resizing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_compressor.evaluation.metrics.metric import MetricSpec, SetDistance
from var_compressor.evaluation.metrics.resize import pil_resize, tensorflow_resize
from var_compressor.evaluation.metrics.weights import WeightFile, load_strictly

SIDE = 299
NUM_FEATURES = 2048

INCEPTION_FILE = WeightFile(
    names=(
        "pt_inception-2015-12-05-6726825d.pth",
        "weights-inception-2015-12-05-6726825d.pth",
    ),
    source=(
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth"
    ),
    sha256_prefix="6726825d",
)
FID = MetricSpec(
    name="fid",
    compares="truth",
    higher_is_better=False,
    meaning="Fréchet distance of Inception features, resized by TensorFlow 1's bilinear",
    backbone="Inception-v3 2015-12-05",
    files=(INCEPTION_FILE,),
)
CLEAN_FID = MetricSpec(
    name="clean_fid",
    compares="truth",
    higher_is_better=False,
    meaning="Fréchet distance of Inception features, resized by antialiased bicubic (clean-fid)",
    backbone="Inception-v3 2015-12-05",
    files=(INCEPTION_FILE,),
)


class InceptionDistance(SetDistance):
    """The Fréchet distance in the features of Inception-v3."""

    def __init__(self, spec: MetricSpec, network: InceptionV3, device: torch.device) -> None:
        super().__init__(spec, device)
        self.network = network
        self.resize = _clean_resize if spec.name == CLEAN_FID.name else tensorflow_resize

    @classmethod
    def opened(
        cls, spec: MetricSpec, files: Mapping[str, Path], device: torch.device
    ) -> InceptionDistance:
        with torch.device("meta"):
            network = InceptionV3()
        # the classifier's head, and counters that some versions of torch store
        others = r"fc\.(weight|bias)|.*\.num_batches_tracked"
        load_strictly(network, files[INCEPTION_FILE.name], others=others, device=device)
        return cls(spec, network, device)

    def row(self, image_13YX: Tensor, prompt: str, reference_13YX: Tensor | None) -> Tensor:
        pixels_13YX = self.resize(image_13YX, SIDE)
        return self.network((pixels_13YX - 128) / 128)[0]


def _clean_resize(image_13YX: Tensor, side: int) -> Tensor:
    """Every channel by Pillow in float, cut to 0..255 without rounding."""
    return pil_resize(image_13YX, (side, side)).clamp(0, 255)


# --- the network ----------------------------------------------------------------------------------


class Norm(nn.Module):
    """Batch norm by stored statistics alone, with the graph's epsilon."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.empty(num_channels))

    def forward(self, x_BCYX: Tensor) -> Tensor:
        mean, var, weight, bias = map(
            self.get_buffer, ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x_BCYX, mean, var, weight, bias, eps=0.001)


class ConvNorm(nn.Module):
    """Convolution without bias, norm, ReLU."""

    def __init__(
        self,
        num_in: int,
        num_out: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_in, num_out, kernel, stride, padding, bias=False)
        self.bn = Norm(num_out)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x_BCYX)))


def _same(num_in: int, num_out: int, *kernel: int) -> ConvNorm:
    """Padded so that the size stays."""
    height, width = kernel * 2 if len(kernel) == 1 else kernel
    return ConvNorm(num_in, num_out, (height, width), padding=(height // 2, width // 2))


def _halving(num_in: int, num_out: int) -> ConvNorm:
    return ConvNorm(num_in, num_out, 3, stride=2)


_average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_max_halving = partial(F.max_pool2d, kernel_size=3, stride=2)


# layers by their names, one after the other; a pair at the end is a fork
Route = tuple[str | tuple[str, str], ...]


class Mixed(nn.Module):
    """Branches side by side, concatenated over channels.

    Both outputs of a fork count. Last comes ``pool``, and ``branch_pool`` after it where there is
    one.
    """

    def __init__(
        self,
        layers: dict[str, ConvNorm],
        routes: tuple[Route, ...],
        pool: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.routes = routes
        self.pool = pool

    def forward(self, x_BCYX: Tensor) -> Tensor:
        outputs = [part for route in self.routes for part in self._follow(route, x_BCYX)]
        pooled_BCYX = self.pool(x_BCYX)
        if "branch_pool" in self._modules:
            pooled_BCYX = self.get_submodule("branch_pool")(pooled_BCYX)
        return torch.cat([*outputs, pooled_BCYX], dim=1)

    def _follow(self, route: Route, x_BCYX: Tensor) -> list[Tensor]:
        for step in route:
            if isinstance(step, tuple):
                return [self.get_submodule(name)(x_BCYX) for name in step]
            x_BCYX = self.get_submodule(step)(x_BCYX)
        return [x_BCYX]


def _chain(name: str, length: int) -> tuple[str, ...]:
    return tuple(f"{name}_{i}" for i in range(1, length + 1))


def _mixed_35(num_in: int, num_pool: int) -> Mixed:
    """Over 35 x 35 places."""
    layers = {
        "branch1x1": _same(num_in, 64, 1),
        "branch5x5_1": _same(num_in, 48, 1),
        "branch5x5_2": _same(48, 64, 5),
        "branch3x3dbl_1": _same(num_in, 64, 1),
        "branch3x3dbl_2": _same(64, 96, 3),
        "branch3x3dbl_3": _same(96, 96, 3),
        "branch_pool": _same(num_in, num_pool, 1),
    }
    routes = (("branch1x1",), _chain("branch5x5", 2), _chain("branch3x3dbl", 3))
    return Mixed(layers, routes, _average)


def _mixed_35_to_17(num_in: int) -> Mixed:
    layers = {
        "branch3x3": _halving(num_in, 384),
        "branch3x3dbl_1": _same(num_in, 64, 1),
        "branch3x3dbl_2": _same(64, 96, 3),
        "branch3x3dbl_3": _halving(96, 96),
    }
    return Mixed(layers, (("branch3x3",), _chain("branch3x3dbl", 3)), _max_halving)


def _mixed_17(num_in: int, num_inner: int) -> Mixed:
    """Over 17 x 17 places: 7 x 7 kernels as a row and a column."""
    layers = {
        "branch1x1": _same(num_in, 192, 1),
        "branch7x7_1": _same(num_in, num_inner, 1),
        "branch7x7_2": _same(num_inner, num_inner, 1, 7),
        "branch7x7_3": _same(num_inner, 192, 7, 1),
        "branch7x7dbl_1": _same(num_in, num_inner, 1),
        "branch7x7dbl_2": _same(num_inner, num_inner, 7, 1),
        "branch7x7dbl_3": _same(num_inner, num_inner, 1, 7),
        "branch7x7dbl_4": _same(num_inner, num_inner, 7, 1),
        "branch7x7dbl_5": _same(num_inner, 192, 1, 7),
        "branch_pool": _same(num_in, 192, 1),
    }
    routes = (("branch1x1",), _chain("branch7x7", 3), _chain("branch7x7dbl", 5))
    return Mixed(layers, routes, _average)


def _mixed_17_to_8(num_in: int) -> Mixed:
    layers = {
        "branch3x3_1": _same(num_in, 192, 1),
        "branch3x3_2": _halving(192, 320),
        "branch7x7x3_1": _same(num_in, 192, 1),
        "branch7x7x3_2": _same(192, 192, 1, 7),
        "branch7x7x3_3": _same(192, 192, 7, 1),
        "branch7x7x3_4": _halving(192, 192),
    }
    return Mixed(layers, (_chain("branch3x3", 2), _chain("branch7x7x3", 4)), _max_halving)


def _mixed_8(num_in: int, pool: Callable[[Tensor], Tensor]) -> Mixed:
    """Over 8 x 8 places: the branches fork at their ends."""
    layers = {
        "branch1x1": _same(num_in, 320, 1),
        "branch3x3_1": _same(num_in, 384, 1),
        "branch3x3_2a": _same(384, 384, 1, 3),
        "branch3x3_2b": _same(384, 384, 3, 1),
        "branch3x3dbl_1": _same(num_in, 448, 1),
        "branch3x3dbl_2": _same(448, 384, 3),
        "branch3x3dbl_3a": _same(384, 384, 1, 3),
        "branch3x3dbl_3b": _same(384, 384, 3, 1),
        "branch_pool": _same(num_in, 192, 1),
    }
    routes: tuple[Route, ...] = (
        ("branch1x1",),
        ("branch3x3_1", ("branch3x3_2a", "branch3x3_2b")),
        (*_chain("branch3x3dbl", 2), ("branch3x3dbl_3a", "branch3x3dbl_3b")),
    )
    return Mixed(layers, routes, pool)


class InceptionV3(nn.Module):
    """The trunk up to its pooled features; input ``[B, 3, 299, 299]`` in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _halving(3, 32)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3)
        self.Conv2d_2b_3x3 = _same(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3)
        self.Mixed_5b = _mixed_35(192, 32)
        self.Mixed_5c = _mixed_35(256, 64)
        self.Mixed_5d = _mixed_35(288, 64)
        self.Mixed_6a = _mixed_35_to_17(288)
        self.Mixed_6b = _mixed_17(768, 128)
        self.Mixed_6c = _mixed_17(768, 160)
        self.Mixed_6d = _mixed_17(768, 160)
        self.Mixed_6e = _mixed_17(768, 192)
        self.Mixed_7a = _mixed_17_to_8(768)
        self.Mixed_7b = _mixed_8(1280, _average)
        self.Mixed_7c = _mixed_8(2048, _maximum)

    def forward(self, image_B3YX: Tensor) -> Tensor:
        """Features, ``[B, F]``."""
        x_BCYX = image_B3YX
        for name, layer in self.named_children():
            x_BCYX = layer(x_BCYX)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x_BCYX = _max_halving(x_BCYX)
        return x_BCYX.mean((2, 3))
