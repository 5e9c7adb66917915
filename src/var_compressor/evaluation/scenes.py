"""Procedural scenes: a few solid objects on a background, and the truth about them.

Scene number *i* of a split is one fixed picture (`rendering.py`) with one fixed caption
(`captions.py`): every random choice is a hash of the scene's number and of what is being chosen, so
neither the batch nor the device changes it. Sampling and drawing are vectorised over the batch;
`sample_scenes` and `render` have fixed shapes and can be compiled.

Splits. Train, validation and test are disjoint ranges of scene numbers. Besides, the
shape-colour-material triples in `HELD_OUT` (12 of 144, two per shape, four per material) never
occur in train and occur freely in the other two, so they test whether a model composes attributes
or remembers them.

Shapes: B scenes, O object slots (3), K candidate layouts, L arrangements, S hash slots, W wording
draws; a trailing 2 is x (to the right) and y (down), a trailing 3 is RGB.
"""

from __future__ import annotations

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
