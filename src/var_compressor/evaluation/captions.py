"""The captions of scenes: a small grammar with synonyms, and the words that it can use."""

from __future__ import annotations

import re
from dataclasses import fields

from var_compressor.evaluation.scenes import (
    BACKGROUNDS,
    COLORS,
    MATERIALS,
    OPPOSITE,
    SHAPES,
    SIZES,
    SceneBatch,
    SceneTruth,
    TrueObject,
    truths,
)

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
