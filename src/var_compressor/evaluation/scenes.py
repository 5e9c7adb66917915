"""Procedural scenes: a few solid objects on a background, with captions and the truth about them.

Scene number *i* of a split is one fixed picture with one fixed caption: every random choice is a
hash of the scene's number and of what is being chosen, so neither the batch nor the device changes
it. Everything up to the caption is vectorised over the batch; `sample_scenes` and `render` have
fixed shapes and can be compiled.

Splits. Train, validation and test are disjoint ranges of scene numbers. Besides, the
shape-colour-material triples in `HELD_OUT` (12 of 144, two per shape, four per material) never
occur in train and occur freely in the other two, so they test whether a model composes attributes
or remembers them.

Shapes: B scenes, O object slots (3), K candidate layouts, L arrangements, H W pixels (256), S hash
slots, W wording draws; a trailing 2 is x (to the right) and y (down), a trailing 3 is RGB.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

IMAGE_SIZE = 256
MAX_OBJECTS = 3

SHAPES = ("sphere", "cube", "cylinder", "cone", "ring", "star")
MATERIALS = ("matte", "metal", "striped")
SIZES = ("small", "large")
COLORS = {
    "red": (0.86, 0.10, 0.12),
    "orange": (1.00, 0.50, 0.04),
    "yellow": (0.98, 0.88, 0.10),
    "green": (0.12, 0.66, 0.20),
    "cyan": (0.08, 0.82, 0.86),
    "blue": (0.12, 0.26, 0.92),
    "purple": (0.52, 0.14, 0.78),
    "pink": (1.00, 0.42, 0.70),
}
BACKGROUNDS = ("gray", "beige", "dark", "white", "checker", "wood", "beach", "tiles")
RELATIONS = ("left", "right", "above", "below")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}

# pixels; the diameters are 60-66 and 88-98
RADIUS_RANGES = {"small": (30.0, 33.0), "large": (44.0, 49.0)}
COUNT_THRESHOLDS = (0.25, 0.62)

SPLITS = ("train", "validation", "test")
SPLIT_CAPACITY = 1 << 40

HELD_OUT = tuple((j % 6, (3 * j + j // 8) % 8, (j + j // 6) % 3) for j in range(12))


# ---------------------------------------------------------------- scenes as data


@dataclass(frozen=True)
class SceneBatch:
    """B scenes as tensors on one device. Object slots at and beyond `num_objects_B` hold values
    that nothing reads.

    Lengths are in pixels of a 256x256 picture. `hue_BO3` multiplies a colour, `tilt_BO` is in
    radians, `light_B2` shifts the light's direction, `shade_B2` is the brightness of objects and
    background, `phase_B2` moves the background's pattern (0 to 1), and `wording_BW` (0 to 1) picks
    the caption's words.
    """

    scene_id_B: Tensor
    num_objects_B: Tensor
    shape_BO: Tensor
    color_BO: Tensor
    material_BO: Tensor
    size_BO: Tensor
    center_BO2: Tensor
    radius_BO: Tensor
    background_B: Tensor
    hue_BO3: Tensor
    tilt_BO: Tensor
    light_B2: Tensor
    shade_B2: Tensor
    phase_B2: Tensor
    wording_BW: Tensor

    def __len__(self) -> int:
        return self.num_objects_B.shape[0]

    def to(self, device: torch.device | str) -> SceneBatch:
        """The same scenes on another device."""
        return SceneBatch(*(getattr(self, f.name).to(device) for f in fields(self)))

    @property
    def present_BO(self) -> Tensor:
        """bool: which object slots are in use."""
        return (
            torch.arange(MAX_OBJECTS, device=self.num_objects_B.device)
            < self.num_objects_B[:, None]
        )


class Relation(NamedTuple):
    """`subject` and `object` are positions in `SceneTruth.objects`; `kind` is one of
    `RELATIONS`.
    """

    subject: int
    kind: str
    object: int


class TrueObject(NamedTuple):
    """Attribute indices into `SHAPES`, `COLORS`, `MATERIALS`, `SIZES`; centre and radius in
    pixels.
    """

    shape: int
    color: int
    material: int
    size: int
    center: tuple[float, float]
    radius: float

    @property
    def attributes(self) -> tuple[int, int, int, int]:
        return (self.shape, self.color, self.material, self.size)


@dataclass(frozen=True)
class SceneTruth:
    """What a scene's caption says and where things are; `dataclasses.asdict` of it is plain
    JSON.
    """

    scene_id: int
    objects: tuple[TrueObject, ...]
    background: int
    relations: tuple[Relation, ...]


def truths(scenes: SceneBatch) -> list[SceneTruth]:
    """The truth of every scene. The stated relations are those between neighbours in the object
    list.
    """
    columns = {
        f.name: getattr(scenes, f.name).tolist() for f in fields(scenes) if f.name != "wording_BW"
    }
    return [_truth_of_row(columns, row) for row in range(len(scenes))]


def _truth_of_row(columns: dict[str, list], row: int) -> SceneTruth:
    objects = tuple(
        TrueObject(
            shape=columns["shape_BO"][row][slot],
            color=columns["color_BO"][row][slot],
            material=columns["material_BO"][row][slot],
            size=columns["size_BO"][row][slot],
            center=tuple(columns["center_BO2"][row][slot]),
            radius=columns["radius_BO"][row][slot],
        )
        for slot in range(columns["num_objects_B"][row])
    )
    relations = tuple(
        Relation(i, relation_between(objects[i].center, objects[i + 1].center), i + 1)
        for i in range(len(objects) - 1)
    )
    return SceneTruth(columns["scene_id_B"][row], objects, columns["background_B"][row], relations)


def relation_between(subject_xy: tuple[float, float], object_xy: tuple[float, float]) -> str:
    """Which of `RELATIONS` the subject has to the object, along the axis on which they are farther
    apart.
    """
    dx, dy = subject_xy[0] - object_xy[0], subject_xy[1] - object_xy[1]
    if abs(dx) >= abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


# ---------------------------------------------------------------- sampling

MASK_32 = 0xFFFFFFFF
GOLDEN_32 = 0x9E3779B9

NUM_FREE_CANDIDATES = 12
NUM_CANDIDATES = 24
NUM_WORDS_DRAWN = 24

# slots of the hash: one per choice, so that adding a choice at the end changes no other one
SLOT_COUNT, SLOT_BACKGROUND = 0, 1
SLOT_TRIPLE, SLOT_SIZE, SLOT_RADIUS, SLOT_TILT = (slice(i, i + 3) for i in (2, 5, 8, 11))
SLOT_HUE = slice(14, 23)
SLOT_LIGHT, SLOT_SHADE, SLOT_PHASE = (slice(i, i + 2) for i in (23, 25, 27))
SLOT_WORDING = slice(29, 29 + NUM_WORDS_DRAWN)
SLOT_LAYOUT = slice(53, 53 + NUM_CANDIDATES)
SLOT_POSITION = slice(77, 77 + NUM_CANDIDATES * MAX_OBJECTS * 2)
NUM_SLOTS = 77 + NUM_CANDIDATES * MAX_OBJECTS * 2

# neighbours in the list must be this much farther apart on one axis than on the other, and at least
# so many pixels
AXIS_DOMINANCE = 1.3
MIN_SEPARATION = 48.0
OBJECT_GAP = 3.0
EDGE_GAP = 5.0


def sample_scenes(ids_B: Tensor, split: str) -> SceneBatch:
    """Scenes number `ids_B` (int64, 0 <= id < 2**40) of `split`, on the device of `ids_B`.

    Raises: ValueError for an unknown split or, outside of torch.compile, for an id out of range.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} does not exist; take one of {', '.join(SPLITS)}")
    if not torch.compiler.is_compiling() and ids_B.numel():
        low, high = (int(bound) for bound in ids_B.aminmax())
        if low < 0 or high >= SPLIT_CAPACITY:
            raise ValueError(
                f"scene ids run from {low} to {high}; keep them within 0 and 2**40 - 1"
            )
    scene_id_B = ids_B.long() + SPLITS.index(split) * SPLIT_CAPACITY
    uniform_BS = hash_uniform(scene_id_B, NUM_SLOTS)

    count_bounds_2 = torch.tensor(COUNT_THRESHOLDS, device=ids_B.device)
    num_objects_B = 1 + (uniform_BS[:, SLOT_COUNT, None] >= count_bounds_2).sum(1)
    shape_BO, color_BO, material_BO = _pick_triples(
        uniform_BS[:, SLOT_TRIPLE], train_only=split == "train"
    )
    size_BO = _pick(uniform_BS[:, SLOT_SIZE], len(SIZES))
    # float64 until the layout is chosen: a rounding that differs between devices must not choose
    # another one
    radius_BO = _pick_radius(uniform_BS[:, SLOT_RADIUS].double(), size_BO)
    return SceneBatch(
        scene_id_B=scene_id_B,
        num_objects_B=num_objects_B,
        shape_BO=shape_BO,
        color_BO=color_BO,
        material_BO=material_BO,
        size_BO=size_BO,
        center_BO2=_place(uniform_BS.double(), num_objects_B, radius_BO).float(),
        radius_BO=radius_BO.float(),
        background_B=_pick(uniform_BS[:, SLOT_BACKGROUND], len(BACKGROUNDS)),
        hue_BO3=0.94 + 0.12 * uniform_BS[:, SLOT_HUE].unflatten(1, (MAX_OBJECTS, 3)),
        tilt_BO=0.24 * (uniform_BS[:, SLOT_TILT] - 0.5),
        light_B2=0.24 * (uniform_BS[:, SLOT_LIGHT] - 0.5),
        shade_B2=0.95 + 0.08 * uniform_BS[:, SLOT_SHADE],
        phase_B2=uniform_BS[:, SLOT_PHASE],
        wording_BW=uniform_BS[:, SLOT_WORDING],
    )


def hash_uniform(key_B: Tensor, num_slots: int) -> Tensor:
    """float32 [B, num_slots] in [0, 1): a function of each key (int64, 0 <= key < 2**62) and slot
    alone.

    Keys map to 64 bits of state without collisions; products stay below 2**63, so nothing relies on
    overflow.
    """
    low_B, high_B = key_B & MASK_32, key_B >> 32
    state_B = _mix_32(low_B)
    salt_B = _mix_32(high_B ^ _mix_32((low_B + GOLDEN_32) & MASK_32))
    slot_S = (torch.arange(1, num_slots + 1, device=key_B.device) * GOLDEN_32) & MASK_32
    hash_BS = _mix_32(_mix_32((state_B[:, None] + slot_S) & MASK_32) ^ salt_B[:, None])
    return (hash_BS >> 8).float() * 2.0**-24


def _mix_32(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers held in int64. Source: C. Wellons, hash-prospector ("low bias"
    triple).
    """
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & MASK_32
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & MASK_32
    return x ^ (x >> 15)


def _pick(uniform: Tensor, num_choices: int) -> Tensor:
    """int64 in [0, num_choices)."""
    return (uniform * num_choices).long().clamp(max=num_choices - 1)


def _allowed_triples(train_only: bool) -> list[tuple[int, int, int]]:
    """The shape-colour-material triples that scenes may hold."""
    held_out = set(HELD_OUT) if train_only else set()
    every = (
        (shape, color, material)
        for shape in range(len(SHAPES))
        for color in range(len(COLORS))
        for material in range(len(MATERIALS))
    )
    return [triple for triple in every if triple not in held_out]


def _pick_triples(uniform_BO: Tensor, *, train_only: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Shape, colour and material (each int64 [B, O]) of objects that differ in at least one of
    them.
    """
    table_T3 = torch.tensor(_allowed_triples(train_only), device=uniform_BO.device)
    num_triples = table_T3.shape[0]
    first_B = _pick(uniform_BO[:, 0], num_triples)
    second_B = _pick(uniform_BO[:, 1], num_triples - 1)
    second_B = second_B + (second_B >= first_B)
    third_B = _pick(uniform_BO[:, 2], num_triples - 2)
    third_B = third_B + (third_B >= torch.minimum(first_B, second_B))
    third_B = third_B + (third_B >= torch.maximum(first_B, second_B))
    triple_BO3 = table_T3[torch.stack([first_B, second_B, third_B], dim=1)]
    return triple_BO3[..., 0], triple_BO3[..., 1], triple_BO3[..., 2]


def _pick_radius(uniform_BO: Tensor, size_BO: Tensor) -> Tensor:
    """Radius in pixels, uniform within the range of its size."""
    ranges_S2 = torch.tensor(
        [RADIUS_RANGES[size] for size in SIZES], device=uniform_BO.device, dtype=torch.float64
    )
    low_BO, high_BO = ranges_S2[size_BO].unbind(-1)
    return low_BO + (high_BO - low_BO) * uniform_BO


def _layout_table() -> list[list[tuple[float, float]]]:
    """Arrangements of three objects in a unit square in which every pair is far apart: elbows and
    triangles.
    """
    corners = [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)]
    layouts = []
    for i in range(4):
        before, corner, after = corners[i - 1], corners[i], corners[(i + 1) % 4]
        layouts += [[before, corner, after], [after, corner, before]]
        middle = ((before[0] + corners[i - 2][0]) / 2, (before[1] + corners[i - 2][1]) / 2)
        layouts += [
            [corner, after, middle],
            [middle, corner, after],
            [corner, middle, after],
            [after, middle, corner],
        ]
    return layouts


def _place(uniform_BS: Tensor, num_objects_B: Tensor, radius_BO: Tensor) -> Tensor:
    """Centres [B, O, 2]: the first of K candidates without overlap in which neighbours have a clear
    relation.

    Half of the candidates are free, half are arrangements with less and less jitter; the last,
    without any, always fits.
    """
    device = uniform_BS.device
    free_BKO2 = uniform_BS[:, SLOT_POSITION].unflatten(1, (NUM_CANDIDATES, MAX_OBJECTS, 2))
    layouts_LO2 = torch.tensor(_layout_table(), device=device, dtype=torch.float64)
    base_BKO2 = layouts_LO2[_pick(uniform_BS[:, SLOT_LAYOUT], layouts_LO2.shape[0])]
    num_tied = NUM_CANDIDATES - NUM_FREE_CANDIDATES
    jitters = [1.0] * NUM_FREE_CANDIDATES + [
        0.7 * (1 - i / (num_tied - 1)) for i in range(num_tied)
    ]
    jitter_K = torch.tensor(jitters, device=device, dtype=torch.float64)
    tied_BKO2 = base_BKO2 + jitter_K[:, None, None] * (free_BKO2 - base_BKO2)

    margin_BO = radius_BO + EDGE_GAP
    span_BO = IMAGE_SIZE - 2 * margin_BO
    center_BKO2 = margin_BO[:, None, :, None] + span_BO[:, None, :, None] * tied_BKO2
    fits_BK = _layout_fits(center_BKO2, radius_BO, num_objects_B)
    chosen_B = fits_BK.int().argmax(dim=1)
    return center_BKO2[torch.arange(len(chosen_B), device=device), chosen_B]


def _layout_fits(center_BKO2: Tensor, radius_BO: Tensor, num_objects_B: Tensor) -> Tensor:
    """bool [B, K]: objects keep their distance, and neighbours in the list are clearly beside or
    above one another.
    """
    fits_BK = torch.ones(center_BKO2.shape[:2], dtype=torch.bool, device=center_BKO2.device)
    for i, j in ((0, 1), (1, 2), (0, 2)):
        offset_BK2 = (center_BKO2[:, :, i] - center_BKO2[:, :, j]).abs()
        near_BK = (
            offset_BK2.square().sum(-1)
            < (radius_BO[:, i] + radius_BO[:, j] + OBJECT_GAP).square()[:, None]
        )
        bad_BK = near_BK
        if j == i + 1:
            long_BK, short_BK = offset_BK2.amax(-1), offset_BK2.amin(-1)
            bad_BK = near_BK | (long_BK < MIN_SEPARATION) | (long_BK < AXIS_DOMINANCE * short_BK)
        fits_BK = fits_BK & ~(bad_BK & (num_objects_B > j)[:, None])
    return fits_BK


# ---------------------------------------------------------------- rendering

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


# ---------------------------------------------------------------- captions

SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
COLOR_WORDS = {
    "red": ("red", "crimson"),
    "orange": ("orange",),
    "yellow": ("yellow",),
    "green": ("green",),
    "cyan": ("cyan", "turquoise"),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "pink": ("pink",),
}
MATERIAL_WORDS = {
    "matte": ("matte", "dull"),
    "metal": ("metal", "metallic", "shiny metal"),
    "striped": ("striped", "stripy"),
}
SHAPE_WORDS = {
    "sphere": ("sphere", "ball"),
    "cube": ("cube", "block"),
    "cylinder": ("cylinder", "can"),
    "cone": ("cone",),
    "ring": ("ring", "torus"),
    "star": ("star",),
}
RELATION_WORDS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
BACKGROUND_WORDS = {
    "gray": ("on a plain gray background", "against a gray wall"),
    "beige": ("on a plain beige background", "against a beige wall"),
    "dark": ("on a plain dark background", "against a dark wall"),
    "white": ("on a plain white background", "against a white wall"),
    "checker": ("on a checkered floor", "on a checkerboard"),
    "wood": ("on a wooden floor", "on wooden boards"),
    "beach": ("on a sandy beach", "on a beach under a pale sky"),
    "tiles": ("on stone tiles", "on a tiled floor"),
}
# {a} {b} {c}: an object with its article; {da} {db} {dc}: the same named a second time;
# {ab} {bc}: relations; {on}: background
TEMPLATES = {
    1: (
        "{a} {on}.",
        "there is {a} {on}.",
        "a picture of {a} {on}.",
        "{on}, there is {a}.",
        "one object {on}, {a}.",
    ),
    2: (
        "{a} {ab} {b} {on}.",
        "{a} is {ab} {b} {on}.",
        "{on}, {a} is {ab} {b}.",
        "a picture of {a} {ab} {b}, {on}.",
        "two objects {on}, {a} and {b}. the {da} is {ab} the {db}.",
        "{a} and {b} {on}. the {da} is {ab} the {db}.",
    ),
    3: (
        "{a} {ab} {b}, which is {bc} {c}, {on}.",
        "{on}, {a} is {ab} {b}, which is {bc} {c}.",
        "{on}, {a} is {ab} {b} and the {db} is {bc} {c}.",
        "a picture of {a} {ab} {b}, and the {db} is {bc} {c}, {on}.",
        "three objects {on}, {a}, {b} and {c}. the {da} is {ab} the {db}, which is {bc} the {dc}.",
        "{a}, {b} and {c} {on}. the {da} is {ab} the {db} and the {db} is {bc} the {dc}.",
    ),
}


def tokenize(text: str) -> list[str]:
    """Lower-case words, commas and periods, in order: the tokens that a caption is counted in."""
    return re.findall(r"[a-z]+|[,.]", text.lower())


def _collect_vocabulary() -> tuple[str, ...]:
    tables = (
        SIZE_WORDS,
        COLOR_WORDS,
        MATERIAL_WORDS,
        SHAPE_WORDS,
        RELATION_WORDS,
        BACKGROUND_WORDS,
    )
    phrases = [phrase for table in tables for choices in table.values() for phrase in choices]
    frames = [
        re.sub(r"{\w+}", " ", template) for choices in TEMPLATES.values() for template in choices
    ]
    words = {word for text in (*phrases, *frames) for word in tokenize(text)}
    return (",", ".", *sorted(words - {",", "."}))


VOCABULARY: tuple[str, ...] = _collect_vocabulary()


def captions(scenes: SceneBatch) -> list[str]:
    """One lower-case caption per scene. It names the size, colour, material and shape of every
    object, the background, and a relation between neighbours in the object list; it depends on the
    scene's number alone."""
    return [
        _write(truth, wording)
        for truth, wording in zip(truths(scenes), scenes.wording_BW.tolist(), strict=True)
    ]


def caption(scenes: SceneBatch, index: int) -> str:
    """The caption of one scene of the batch."""
    row = SceneBatch(*(getattr(scenes, f.name)[index : index + 1] for f in fields(scenes)))
    return captions(row)[0]


def _write(truth: SceneTruth, wording: list[float]) -> str:
    draws = iter(wording)
    relations, order = [relation.kind for relation in truth.relations], list(truth.objects)
    if next(draws) < 0.5:  # the same scene told from its other end
        relations, order = [OPPOSITE[kind] for kind in reversed(relations)], order[::-1]
    template = _choose(TEMPLATES[len(order)], next(draws))
    parts = {"on": _choose(BACKGROUND_WORDS[BACKGROUNDS[truth.background]], next(draws))}
    for letter, thing in zip("abc", order, strict=False):
        size = _choose(SIZE_WORDS[SIZES[thing.size]], next(draws))
        parts[f"d{letter}"] = _name(thing, [next(draws) for _ in range(4)])
        parts[letter] = f"a {size} {parts[f'd{letter}']}"
    for key, kind in zip(("ab", "bc"), relations, strict=False):
        parts[key] = _choose(RELATION_WORDS[kind], next(draws))
    return template.format(**parts)


def _name(thing: TrueObject, draws: list[float]) -> str:
    """Colour, material and shape in words, colour or material first."""
    color = _choose(COLOR_WORDS[list(COLORS)[thing.color]], draws[0])
    material = _choose(MATERIAL_WORDS[MATERIALS[thing.material]], draws[1])
    shape = _choose(SHAPE_WORDS[SHAPES[thing.shape]], draws[2])
    first, second = (color, material) if draws[3] < 0.7 else (material, color)
    return f"{first} {second} {shape}"


def _choose(options: tuple[str, ...], uniform: float) -> str:
    return options[int(uniform * len(options))]
