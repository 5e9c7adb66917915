"""Images of any size to the one that a network takes, as its published evaluation does it.

Pillow's filters widen with the scale (antialiasing) and run on the CPU in the same way everywhere.
Shapes: B images, YX pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# mean and spread of the pixels that CLIP was trained on, by channel, of 1
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def tensorflow_resize(image_B3YX: Tensor, side: int) -> Tensor:
    """Bilinear as TensorFlow 1 did it, float32 0..255 ``[B, 3, side, side]``.

    The left upper corners of both pixel grids meet, rather than their centres, and nothing is
    averaged however much smaller the image becomes.
    """
    x_B3YX = image_B3YX.float()
    x_B3YX = _lerp_along(x_B3YX, 3, side)
    return _lerp_along(x_B3YX, 2, side)


def _lerp_along(x_B3YX: Tensor, dim: int, side: int) -> Tensor:
    size = x_B3YX.shape[dim]
    step = torch.tensor(size / side, dtype=torch.float32, device=x_B3YX.device)
    place = torch.arange(side, dtype=torch.float32, device=x_B3YX.device) * step
    low = place.long().clamp_max(size - 1)
    high = (low + 1).clamp_max(size - 1)
    share = (place - low).reshape([-1 if d == dim else 1 for d in range(4)])
    first = x_B3YX.index_select(dim, low)
    return first + (x_B3YX.index_select(dim, high) - first) * share


def pil_resize(image_13YX: Tensor, size_yx: tuple[int, int]) -> Tensor:
    """Pillow's bicubic on every channel in float32, not rounded and possibly beyond 0..255."""
    size_xy = size_yx[::-1]
    channels = [
        np.asarray(Image.fromarray(channel).resize(size_xy, Image.Resampling.BICUBIC))
        for channel in image_13YX[0].float().cpu().numpy()
    ]
    return torch.from_numpy(np.stack(channels)).to(image_13YX.device)[None]


def clip_pixels(image_13YX: Tensor, side: int) -> Tensor:
    """What CLIP and BLIP take, float32: the shorter side brought to ``side`` by Pillow's bicubic
    in 8 bits, the middle cut out, and channels normalized.

    Source: the preprocessing published with github.com/openai/CLIP.
    """
    image = Image.fromarray(image_13YX[0].permute(1, 2, 0).cpu().numpy())
    shorter = min(image.size)
    width, height = (max(side, side * length // shorter) for length in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    # a half pixel goes to the even neighbour, as in the original
    left, top = round((width - side) / 2), round((height - side) / 2)
    cut = np.array(image)[top : top + side, left : left + side]
    x_YX3 = torch.from_numpy(cut).to(image_13YX.device).float() / 255
    x_YX3 = (x_YX3 - x_YX3.new_tensor(_CLIP_MEAN)) / x_YX3.new_tensor(_CLIP_STD)
    return x_YX3.permute(2, 0, 1)[None]
