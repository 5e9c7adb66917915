"""The pictures of scenes: shaded solids with shadows on smooth backgrounds, drawn per pixel.

Shapes: B scenes, H W pixels (256); a dimension of 1 broadcasts. `x_W` and `y_H1` are pixel centres,
`u` and `v` the same in an object's own frame, in units of its radius and with v up.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from var_compressor.evaluation.scenes import (
    BACKGROUNDS,
    COLORS,
    IMAGE_SIZE,
    MAX_OBJECTS,
    SHAPES,
    SceneBatch,
)

LIGHT = (-0.48, 0.66, 0.58)
STRIPES_PER_UNIT = 1.5


class Surface(NamedTuple):
    """What a shape shows at every pixel, each [B, H, W]; lengths are in units of the object's
    radius.

    `distance` is signed (negative inside), the normal looks at the viewer along z, with y up, and
    `stripe` is the coordinate along which bands alternate. `flat` ([B, 1, 1] or a number) is 1
    where the surface is made of plane faces.
    """

    distance: Tensor
    normal_x: Tensor
    normal_y: Tensor
    normal_z: Tensor
    stripe: Tensor
    flat: Tensor


def render(scenes: SceneBatch) -> Tensor:
    """The pictures of B scenes: float32 [B, 3, 256, 256] in [-1, 1], RGB."""
    device = scenes.center_BO2.device
    pixel = torch.arange(IMAGE_SIZE, device=device, dtype=torch.float32) + 0.5
    x_W, y_H1 = pixel, pixel[:, None]
    image_B3HW = _draw_background(scenes, x_W, y_H1)
    present_BO = scenes.present_BO.float()
    for slot in range(MAX_OBJECTS):
        shadow_BHW = _cast_shadow(scenes, slot, x_W, y_H1) * present_BO[:, slot, None, None]
        image_B3HW = image_B3HW * (1.0 - shadow_BHW[:, None])
    for slot in range(MAX_OBJECTS):
        color_B3HW, alpha_BHW = _draw_object(scenes, slot, x_W, y_H1)
        alpha_B1HW = (alpha_BHW * present_BO[:, slot, None, None])[:, None]
        image_B3HW = image_B3HW + alpha_B1HW * (color_B3HW - image_B3HW)
    return (image_B3HW * 2.0 - 1.0).clamp(-1.0, 1.0)


def _step(x: Tensor, low: float, high: float) -> Tensor:
    """0 below `low`, 1 above `high`, a smooth cubic between."""
    t = ((x - low) / (high - low)).clamp(0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def _column(values_B: Tensor) -> Tensor:
    return values_B[:, None, None]


def _rgb(color: tuple[float, float, float], like: Tensor) -> Tensor:
    return torch.tensor(color, device=like.device).view(3, 1, 1)


def _draw_background(scenes: SceneBatch, x_W: Tensor, y_H1: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1]: smooth patterns, pale and of little saturation so that no object
    drowns in them.
    """
    kind_B111 = scenes.background_B[:, None, None, None]
    phase_x_B11, phase_y_B11 = _column(scenes.phase_B2[:, 0]), _column(scenes.phase_B2[:, 1])
    plain = {
        "gray": (0.66, 0.67, 0.69),
        "beige": (0.90, 0.83, 0.70),
        "dark": (0.20, 0.21, 0.24),
        "white": (0.95, 0.95, 0.94),
    }
    textured = {
        "checker": _checker(x_W, y_H1, phase_x_B11, phase_y_B11),
        "wood": _boards(x_W, y_H1, phase_x_B11, phase_y_B11),
        "beach": _beach(x_W, y_H1, phase_x_B11, phase_y_B11),
        "tiles": _tiles(x_W, y_H1, phase_x_B11, phase_y_B11),
    }
    image_B3HW = torch.zeros((len(scenes), 3, IMAGE_SIZE, IMAGE_SIZE), device=x_W.device)
    for index, name in enumerate(BACKGROUNDS):
        pattern = _rgb(plain[name], x_W) if name in plain else textured[name]
        image_B3HW = torch.where(kind_B111 == index, pattern, image_B3HW)
    # the light comes from the upper left, so the far corner is a little darker
    falloff_HW = 1.05 - 0.13 * (0.4 * x_W + 0.6 * y_H1) / IMAGE_SIZE
    return image_B3HW * falloff_HW * scenes.shade_B2[:, 1, None, None, None]


def _blend(
    weight_BHW: Tensor, color_0: tuple[float, float, float], color_1: tuple[float, float, float]
) -> Tensor:
    """[B, 3, H, W]: `color_0` where the weight is 0, `color_1` where it is 1."""
    low_311, high_311 = _rgb(color_0, weight_BHW), _rgb(color_1, weight_BHW)
    return low_311 + weight_BHW[:, None] * (high_311 - low_311)


def _checker(x_W: Tensor, y_H1: Tensor, phase_x_B11: Tensor, phase_y_B11: Tensor) -> Tensor:
    """Squares of 64 pixels with soft borders."""
    wave_x = torch.sin((x_W / 64.0 + 2.0 * phase_x_B11) * math.pi)
    wave_y = torch.sin((y_H1 / 64.0 + 2.0 * phase_y_B11) * math.pi)
    return _blend(
        0.5 + 0.5 * torch.tanh(12.0 * wave_x * wave_y), (0.60, 0.61, 0.64), (0.88, 0.88, 0.87)
    )


def _boards(x_W: Tensor, y_H1: Tensor, phase_x_B11: Tensor, phase_y_B11: Tensor) -> Tensor:
    """Horizontal boards, 52 pixels high, each with its own tone, a broad grain and a soft dark
    joint.
    """
    row = y_H1 / 52.0 + 3.0 * phase_y_B11
    board = torch.floor(row)
    across = row - board
    tone = 0.5 + 0.35 * torch.sin(board * 2.4 + 6.0 * phase_x_B11)
    grain = 0.12 * torch.sin(across * 9.0 + torch.sin(x_W * 0.024 + board * 1.7) * 1.6 + board)
    joint = 1.0 - _step(torch.minimum(across, 1.0 - across), 0.0, 0.07)
    wood_B3HW = _blend(
        (tone + grain).expand(-1, -1, IMAGE_SIZE), (0.62, 0.48, 0.35), (0.80, 0.66, 0.50)
    )
    return wood_B3HW * (1.0 - 0.42 * joint[:, None])


def _beach(x_W: Tensor, y_H1: Tensor, phase_x_B11: Tensor, phase_y_B11: Tensor) -> Tensor:
    """A pale sky over sand, with a soft and slightly rolling horizon."""
    horizon = 132.0 + 26.0 * (phase_y_B11 - 0.5) + 5.0 * torch.sin(x_W * 0.018 + 6.0 * phase_x_B11)
    below = (y_H1 - horizon) / IMAGE_SIZE
    sky = _blend(_step(below, -0.55, 0.0), (0.54, 0.72, 0.88), (0.88, 0.92, 0.93))
    sand = _blend(_step(below, 0.0, 0.45), (0.91, 0.86, 0.73), (0.80, 0.71, 0.55))
    ground = _step(below, -0.012, 0.012)[:, None]
    return sky + ground * (sand - sky)


def _tiles(x_W: Tensor, y_H1: Tensor, phase_x_B11: Tensor, phase_y_B11: Tensor) -> Tensor:
    """Slate tiles of 86 pixels with pale joints; neighbours differ a little in tone."""
    column, row = x_W / 86.0 + 2.0 * phase_x_B11, y_H1 / 86.0 + 2.0 * phase_y_B11
    tile_x, tile_y = torch.floor(column), torch.floor(row)
    in_x, in_y = column - tile_x, row - tile_y
    to_edge = torch.minimum(torch.minimum(in_x, 1.0 - in_x), torch.minimum(in_y, 1.0 - in_y))
    tone = 0.5 + 0.5 * torch.sin(tile_x * 2.1 + tile_y * 3.7)
    joint = 1.0 - _step(to_edge, 0.012, 0.045)
    slate = _blend(tone, (0.42, 0.50, 0.54), (0.50, 0.58, 0.61))
    return slate + joint[:, None] * (_rgb((0.80, 0.83, 0.84), x_W) - slate)


def _cast_shadow(scenes: SceneBatch, slot: int, x_W: Tensor, y_H1: Tensor) -> Tensor:
    """[B, H, W] darkness of the soft ellipse at an object's foot, drawn out to the lower right."""
    radius = _column(scenes.radius_BO[:, slot])
    u = (x_W - _column(scenes.center_BO2[:, slot, 0])) / radius - 0.20
    v = (y_H1 - _column(scenes.center_BO2[:, slot, 1])) / radius - 0.78
    reach = torch.sqrt((u / 1.06).square() + (v / 0.38).square() + 1e-6)
    return 0.46 * (1.0 - _step(reach, 0.15, 1.1))


def _draw_object(scenes: SceneBatch, slot: int, x_W: Tensor, y_H1: Tensor) -> tuple[Tensor, Tensor]:
    """Colour [B, 3, H, W] and coverage [B, H, W] of the objects in one slot."""
    radius_B11 = _column(scenes.radius_BO[:, slot])
    dx = (x_W - _column(scenes.center_BO2[:, slot, 0])) / radius_B11
    dy = (_column(scenes.center_BO2[:, slot, 1]) - y_H1) / radius_B11
    cos_B11, sin_B11 = (
        _column(scenes.tilt_BO[:, slot].cos()),
        _column(scenes.tilt_BO[:, slot].sin()),
    )
    u, v = cos_B11 * dx + sin_B11 * dy, cos_B11 * dy - sin_B11 * dx

    surface = _surface_of_shape(_column(scenes.shape_BO[:, slot]), u, v, radius_B11)
    light = _light_in_object_frame(scenes.light_B2, cos_B11, sin_B11)
    gain_BHW, glare_BHW = _shade(_column(scenes.material_BO[:, slot]), surface, u, v, light)

    palette_C3 = torch.tensor(list(COLORS.values()), device=u.device)
    base_B3 = (
        palette_C3[scenes.color_BO[:, slot]] * scenes.hue_BO3[:, slot] * scenes.shade_B2[:, :1]
    )
    # a thin darker rim separates an object from a background of a similar brightness
    rim_BHW = 1.0 - 0.38 * _step(surface.distance, -0.075, 0.0)
    color_B3HW = (base_B3[:, :, None, None] * gain_BHW[:, None] + glare_BHW[:, None]) * rim_BHW[
        :, None
    ]
    alpha_BHW = _step(-surface.distance * radius_B11, -0.8, 0.8)
    return color_B3HW.clamp(0.0, 1.0), alpha_BHW


def _light_in_object_frame(
    light_B2: Tensor, cos_B11: Tensor, sin_B11: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The unit vector to the light, jittered per scene and turned with the object's tilt."""
    x, y, z = LIGHT[0] + _column(light_B2[:, 0]), LIGHT[1] + _column(light_B2[:, 1]), LIGHT[2]
    length = torch.sqrt(x * x + y * y + z * z)
    return (cos_B11 * x + sin_B11 * y) / length, (cos_B11 * y - sin_B11 * x) / length, z / length


def _shade(
    material_B11: Tensor,
    surface: Surface,
    u: Tensor,
    v: Tensor,
    light: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Factor on the object's colour and white light added to it, both [B, H, W]."""
    light_x, light_y, light_z = light
    facing = surface.normal_x * light_x + surface.normal_y * light_y + surface.normal_z * light_z
    lambert = 0.46 + 0.62 * facing.clamp(min=0.0) + 0.10 * facing.clamp(max=0.0)
    band = _step(torch.sin(surface.stripe * (2.0 * math.pi * STRIPES_PER_UNIT)), -0.25, 0.25)
    metal_gain, metal_glare = _reflect(surface, u, v, light)
    is_metal, is_striped = material_B11 == 1, material_B11 == 2
    gain = torch.where(
        is_metal, metal_gain, torch.where(is_striped, lambert * (1.0 - band), lambert)
    )
    white = 0.10 + 0.86 * lambert
    glare = torch.where(
        is_metal, metal_glare, torch.where(is_striped, white * band, torch.zeros_like(band))
    )
    return gain, glare


def _reflect(
    surface: Surface, u: Tensor, v: Tensor, light: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Metal mirrors a bright sky over dark ground, with a sharp horizon, and the light itself as a
    white spot.
    """
    # flat faces would mirror a single point, so normals are bulged a little
    x, y, z = surface.normal_x + 0.38 * u, surface.normal_y + 0.38 * v, surface.normal_z
    inverse_length = torch.rsqrt(x * x + y * y + z * z + 1e-6)
    x, y, z = x * inverse_length, y * inverse_length, z * inverse_length
    elevation = 2.0 * z * y
    sky = _step(elevation, -0.10, 0.04)
    ground_gain = 0.64 - 0.28 * (1.0 + elevation).clamp(0.0, 1.0)
    sky_gain = 1.12 - 0.42 * elevation.clamp(0.0, 1.0)
    light_x, light_y, light_z = light
    half_length = torch.rsqrt(
        light_x * light_x + light_y * light_y + (light_z + 1.0) * (light_z + 1.0)
    )
    glint = ((x * light_x + y * light_y + z * (light_z + 1.0)) * half_length).clamp(0.0, 1.0)
    spot = 0.95 * _step(glint, 0.955, 0.99) * (1.0 - surface.flat)
    glare = spot + 0.24 * sky * (1.0 - elevation.clamp(0.0, 1.0))
    # plane faces mirror no horizon, so they get the two slanting streaks by which one draws
    # polished metal
    slant = 0.86 * u + 0.50 * v
    streak = 1.0 - _step((slant + 0.22).abs(), 0.10, 0.16) * _step((slant - 0.20).abs(), 0.04, 0.10)
    glare = glare + 0.62 * streak * surface.flat
    return ground_gain + sky * (sky_gain - ground_gain), glare


def _surface_of_shape(shape_B11: Tensor, u: Tensor, v: Tensor, radius_B11: Tensor) -> Surface:
    """The surface of each row's own shape: all six are computed, one is kept."""
    options = (_sphere(u, v), _cube(u, v), _cylinder(u, v), _cone(u, v), _ring(u, v), _star(u, v))
    chosen = options[0]
    for index in range(1, len(SHAPES)):
        picks = shape_B11 == index
        chosen = Surface(
            *(torch.where(picks, new, old) for new, old in zip(options[index], chosen, strict=True))
        )
    return chosen


def _zero(u: Tensor) -> Tensor:
    """One zero per row, for what does not vary over a shape."""
    return u.new_zeros(u.shape[0], 1, 1)


def _sphere(u: Tensor, v: Tensor) -> Surface:
    x, y = u / 0.95, v / 0.95
    z = torch.sqrt((1.0 - x * x - y * y).clamp(min=1e-4))
    return Surface(
        torch.sqrt(u * u + v * v + 1e-8) - 0.95, x, y, z, 0.25 * x + 0.88 * y + 0.40 * z, _zero(u)
    )


def _cube(u: Tensor, v: Tensor) -> Surface:
    """A cube seen along its diagonal: three faces that meet in the middle."""
    side = u.abs()
    distance = torch.maximum(side, 0.5 * side + 0.8660 * v.abs()) - 0.84
    over_edge = v - 0.5774 * side
    top = _step(over_edge, -0.04, 0.04)
    right = _step(u, -0.04, 0.04)
    x = (1.0 - top) * (right * 2.0 - 1.0) * 0.7071
    y = top * 0.8165 - (1.0 - top) * 0.4082
    stripe = torch.where(over_edge > 0, v + 0.5774 * u, over_edge * 1.25) + 0.06
    return Surface(distance, x, y, torch.full_like(x, 0.5774), stripe, _zero(u) + 1.0)


def _foot_distance(
    u: Tensor, v: Tensor, half_width: float, half_depth: float, level: float
) -> tuple[Tensor, Tensor]:
    """Distance below the lower half of an ellipse, and how far the ellipse hangs down there (0 to
    1).
    """
    across = (u / half_width).clamp(-1.0, 1.0)
    hang = torch.sqrt((1.0 - across * across).clamp(min=1e-6))
    slope = half_depth * across / (half_width * hang.clamp(min=0.15))
    return (level - half_depth * hang - v) * torch.rsqrt(1.0 + slope * slope), hang


def _cylinder(u: Tensor, v: Tensor) -> Surface:
    """An upright can seen from a little above."""
    half_width, depth, half_height = 0.70, 0.24, 0.66
    foot, hang = _foot_distance(u, v, half_width, depth, -half_height)
    head, _ = _foot_distance(u, -v, half_width, depth, -half_height)
    distance = torch.maximum(u.abs() - half_width, torch.maximum(foot, head))
    lid_radius = torch.sqrt((u / half_width).square() + ((v - half_height) / depth).square() + 1e-8)
    lid = 1.0 - _step(lid_radius, 0.94, 1.04)
    x = (1.0 - lid) * (u / half_width).clamp(-1.0, 1.0)
    y = lid * 0.87 + (1.0 - lid) * 0.15
    z = lid * 0.50 + (1.0 - lid) * hang
    # the lid keeps the object's own colour: both it and the side's upper end lie in the middle of a
    # dark band
    dark = -0.25 / STRIPES_PER_UNIT
    stripe = torch.where(lid > 0.5, torch.full_like(v, dark), v + depth * hang - half_height + dark)
    return Surface(distance, x, y, z, stripe, _zero(u))


def _cone(u: Tensor, v: Tensor) -> Surface:
    apex, level, half_width, depth = 0.94, -0.62, 0.80, 0.25
    width = (half_width / (apex - level)) * (apex - v)
    foot, _ = _foot_distance(u, v, half_width, depth, level)
    side_distance = (u.abs() - width) * 0.89
    across = (u / width.clamp(min=0.02)).clamp(-1.0, 1.0)
    hang = torch.sqrt((1.0 - across * across).clamp(min=1e-6))
    stripe = v + depth * hang * (width / half_width) + 0.22
    distance = torch.maximum(side_distance, foot)
    return Surface(distance, 0.93 * across, torch.full_like(v, 0.30), 0.93 * hang, stripe, _zero(u))


def _ring(u: Tensor, v: Tensor) -> Surface:
    """A torus seen from the front; its bands run around it."""
    major, minor = 0.66, 0.28
    length = torch.sqrt(u * u + v * v + 1e-8)
    across = ((length - major) / minor).clamp(-1.0, 1.0)
    z = torch.sqrt((1.0 - across * across).clamp(min=1e-4))
    stripe = torch.atan2(v, u) * (6.0 / (2.0 * math.pi * STRIPES_PER_UNIT))
    distance = (length - major).abs() - minor
    return Surface(distance, across * u / length, across * v / length, z, stripe, _zero(u))


def _star(u: Tensor, v: Tensor) -> Surface:
    """A five-pointed star with a ridge along every arm."""
    tip, notch, fifth = 1.0, 0.47, 2.0 * math.pi / 5
    notch_x, notch_y = notch * math.cos(fifth / 2), notch * math.sin(fifth / 2)
    edge = math.hypot(notch_y, tip - notch_x)
    out_x, out_y = notch_y / edge, (tip - notch_x) / edge
    length = torch.sqrt(u * u + v * v + 1e-8)
    angle = torch.atan2(u, v)
    arm = torch.floor(angle / fifth + 0.5) * fifth
    along, beside = length * torch.cos(angle - arm), length * torch.sin(angle - arm)
    distance = (along - tip) * out_x + beside.abs() * out_y
    turn = (beside / 0.03).clamp(-1.0, 1.0) * out_y
    arm_x, arm_y = torch.sin(arm), torch.cos(arm)
    x, y = 0.68 * (out_x * arm_x + turn * arm_y), 0.68 * (out_x * arm_y - turn * arm_x)
    return Surface(distance, x, y, torch.full_like(x, 0.73), 0.92 * v + 0.40 * u, _zero(u) + 1.0)
