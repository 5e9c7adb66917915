"""The convolutional auto-encoder of Infinity: image to latent and back.

Shapes: ``[B, channels, Y, X]``. Image values lie in [-1, 1], RGB.
GroupNorm and swish run in float32, convolutions in the dtype of their weights.

Decoding in strips: with ``strip_rows`` the decoder takes one image at a time, holds its input and
output activations of the current resolution, and works through every convolution in strips of that
many output rows. Group-norm statistics are still taken over the whole activation, so strips change
nothing but rounding.

Source: the FLUX-style VAE published with Infinity (arXiv 2412.04431).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_compressor.models.config import VAEConfig

GROUP_NORM_EPS = 1e-6


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


class NormSwish(nn.Module):
    """GroupNorm then swish, float32 inside; statistics and application can be taken apart."""

    def __init__(self, num_groups: int, channels: int) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        normed = F.group_norm(x.float(), self.num_groups, weight, bias, GROUP_NORM_EPS)
        return F.silu(normed).to(x.dtype)

    def affine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Per image and channel the scale and shift that normalise ``x``; ``[B, C, 1, 1]``."""
        grouped = x.flatten(2).unflatten(1, (self.num_groups, -1)).flatten(2)
        mean = torch.stack([g.float().mean(-1) for g in grouped.unbind(1)], dim=1)
        var = torch.stack([g.float().var(-1, correction=0) for g in grouped.unbind(1)], dim=1)
        per_group = x.shape[1] // self.num_groups
        scale = torch.rsqrt(var + GROUP_NORM_EPS).repeat_interleave(per_group, 1) * self.weight
        shift = self.bias - mean.repeat_interleave(per_group, 1) * scale
        return scale[:, :, None, None], shift[:, :, None, None]


def row_strips(height: int, strip_rows: int) -> Iterator[tuple[int, int]]:
    for top in range(0, height, strip_rows):
        yield top, min(top + strip_rows, height)


def conv_in_strips(
    x: Tensor, conv: nn.Conv2d, strip_rows: int, norm: NormSwish | None, *, upsample: bool
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield ``(top, bottom, rows)`` of ``conv(swish(norm(x)))``, or of conv on 2x nearest ``x``."""
    affine = norm.affine(x) if norm is not None else None
    factor = 2 if upsample else 1
    height = x.shape[2] * factor
    for top, bottom in row_strips(height, strip_rows):
        first, last = max(top - 1, 0), min(bottom + 1, height)
        rows = x[:, :, first // factor : -(-last // factor)]
        if affine is not None:
            rows = F.silu(rows.float() * affine[0] + affine[1]).to(x.dtype)
        if upsample:
            rows = F.interpolate(rows, scale_factor=2.0, mode="nearest")
            rows = rows[:, :, first % 2 : first % 2 + last - first]
        rows = F.pad(rows, (1, 1, int(top == 0), int(bottom == height)))
        yield top, bottom, F.conv2d(rows, conv.weight, conv.bias)


class ResBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = NormSwish(num_groups, in_channels)
        self.conv1 = conv3x3(in_channels, out_channels)
        self.norm2 = NormSwish(num_groups, out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1)
        else:
            self.register_module("shortcut", None)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return h + (x if self.shortcut is None else self.shortcut(x))

    def in_strips(self, x: Tensor, strip_rows: int) -> Tensor:
        """Same result; overwrites and returns ``x`` where the shape allows."""
        h = x.new_empty(len(x), self.conv1.out_channels, *x.shape[2:])
        for top, bottom, rows in conv_in_strips(
            x, self.conv1, strip_rows, self.norm1, upsample=False
        ):
            h[:, :, top:bottom] = rows
        if self.shortcut is not None:
            x = _narrowed(x, self.shortcut, strip_rows)
        for top, bottom, rows in conv_in_strips(
            h, self.conv2, strip_rows, self.norm2, upsample=False
        ):
            x[:, :, top:bottom] += rows
        return x


def _narrowed(x: Tensor, conv: nn.Conv2d, strip_rows: int) -> Tensor:
    """``conv`` of 1x1, in the memory of ``x`` where the result has no more channels."""
    channels = conv.out_channels
    fits = channels <= conv.in_channels
    out = x[:, :channels] if fits else x.new_empty(len(x), channels, *x.shape[2:])
    for top, bottom in row_strips(x.shape[2], strip_rows):
        out[:, :, top:bottom] = F.conv2d(x[:, :, top:bottom], conv.weight, conv.bias)
    return out


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    def in_strips(self, x: Tensor, strip_rows: int) -> Tensor:
        out = x.new_empty(len(x), x.shape[1], 2 * x.shape[2], 2 * x.shape[3])
        for top, bottom, rows in conv_in_strips(x, self.conv, strip_rows, None, upsample=True):
            out[:, :, top:bottom] = rows
        return out


class Resolution(nn.Module):
    """The blocks of one resolution, and the step to the next one (None at the last)."""

    step: nn.Module | None

    def __init__(self, blocks: list[ResBlock], step: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.register_module("step", step)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.step is None else self.step(x)


class Encoder(nn.Module):
    """Finest resolution first."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.base_channels * mult for mult in config.channel_mult]
        groups = config.num_norm_groups
        self.conv_in = conv3x3(3, config.base_channels)
        self.resolutions = nn.ModuleList()
        previous = config.base_channels
        for i, width in enumerate(widths):
            ins = [previous] + [width] * (config.num_res_blocks - 1)
            blocks = [ResBlock(channels, width, groups) for channels in ins]
            step = Downsample(width) if i < len(widths) - 1 else None
            self.resolutions.append(Resolution(blocks, step))
            previous = width
        self.mid = nn.ModuleList(ResBlock(previous, previous, groups) for _ in range(2))
        self.norm_out = NormSwish(groups, previous)
        self.conv_out = conv3x3(previous, config.code_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for stage in [*self.resolutions, *self.mid]:
            x = stage(x)
        return self.conv_out(self.norm_out(x))


class Decoder(nn.Module):
    """Coarsest resolution first."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.base_channels * mult for mult in reversed(config.channel_mult)]
        groups = config.num_norm_groups
        previous = widths[0]
        self.conv_in = conv3x3(config.code_dim, previous)
        self.mid = nn.ModuleList(ResBlock(previous, previous, groups) for _ in range(2))
        self.resolutions = nn.ModuleList()
        for i, width in enumerate(widths):
            ins = [previous] + [width] * config.num_res_blocks
            blocks = [ResBlock(channels, width, groups) for channels in ins]
            step = Upsample(width) if i < len(widths) - 1 else None
            self.resolutions.append(Resolution(blocks, step))
            previous = width
        self.norm_out = NormSwish(groups, previous)
        self.conv_out = conv3x3(previous, 3)

    def forward(self, latent: Tensor) -> Tensor:
        x = self.conv_in(latent)
        for stage in [*self.mid, *self.resolutions]:
            x = stage(x)
        return self.conv_out(self.norm_out(x))

    def in_strips(self, latent: Tensor, strip_rows: int) -> Tensor:
        x = self.conv_in(latent)
        stages = [*self.mid]
        for resolution in self.resolutions:
            stages += [*resolution.blocks, *([resolution.step] if resolution.step else [])]  # type: ignore[misc]
        for stage in stages:
            x = stage.in_strips(x, strip_rows)
        image = x.new_empty(len(x), 3, *x.shape[2:])
        for top, bottom, rows in conv_in_strips(
            x, self.conv_out, strip_rows, self.norm_out, upsample=False
        ):
            image[:, :, top:bottom] = rows
        return image


class VAE(nn.Module):
    """Encoder and decoder; quantization between them lives in ``bits.py``."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.conv_in.weight.dtype

    def encode(self, image_B3YX: Tensor) -> Tensor:
        """Image in [-1, 1] to the latent before quantization, float32."""
        return self.encoder(image_B3YX.to(self.dtype)).float()

    def decode(self, latent_BDYX: Tensor, *, strip_rows: int | None = None) -> Tensor:
        """Latent to image, float32 in [-1, 1]; in strips of ``strip_rows`` rows to save memory."""
        latent = latent_BDYX.to(self.dtype)
        if strip_rows is None:
            image = self.decoder(latent)
        else:
            images = [self.decoder.in_strips(one, strip_rows) for one in latent.split(1)]
            image = torch.cat(images)
        return image.float().clamp(-1, 1)
