"""Recipes: YAML files merged left to right, then key=value, into frozen dataclasses.

A recipe has three parts: `model` (what is compressed), `collect` (the images that calibrate it)
and `quant` (how). Every value remembers where it came from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from var_compressor.spec import QuantSpec, SpecError, from_mapping, nearest, to_plain

COMMAND_LINE = "command line"
BUILT_IN_DEFAULT = "default"
DEFAULTS_FILE = "__default__.yaml"


class RecipeError(ValueError):
    """A recipe that can't be used; the text names the file, the key and the way out."""


@dataclass(frozen=True)
class ModelSource:
    """Which model: a known size by `name`, and the checkpoint's place unless it is embedded."""

    name: str = "infinity-tiny"
    path: str | None = None
    vae_path: str | None = None
    text_encoder_path: str | None = None
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    device: str = "auto"


@dataclass(frozen=True)
class CollectSpec:
    """The images generated for calibration.

    `prompts` is a built-in set or a file; `num_prompts` of them are drawn by `seed`, which also
    seeds the images. cfg and tau are one number, or one per level. pixel_budget null is the
    model's own.
    """

    prompts: str = "varied"
    num_prompts: int = 16
    seed: int = 0
    cfg: float | tuple[float, ...] = 3.0
    tau: float | tuple[float, ...] = 0.5
    top_k: int = 900
    top_p: float = 0.97
    aspect_ratio: float = 1.0
    pixel_budget: str | None = None

    def validate(self) -> CollectSpec:
        """Return self, or raise SpecError naming the first setting that can't be used."""
        taus = self.tau if isinstance(self.tau, tuple) else (self.tau,)
        checks = (
            ("num_prompts", self.num_prompts >= 1, "at least 1", self.num_prompts),
            ("seed", 0 <= self.seed < 2**63, "0 or more", self.seed),
            ("cfg", self.cfg != (), "a number, or one per level", self.cfg),
            ("tau", bool(taus) and all(t > 0 for t in taus), "above 0", self.tau),
            ("top_k", self.top_k >= 0, "0 (off) or more", self.top_k),
            ("top_p", 0 <= self.top_p <= 1, "0 (off) to 1", self.top_p),
            ("aspect_ratio", self.aspect_ratio > 0, "above 0", self.aspect_ratio),
        )
        for key, holds, wanted, value in checks:
            if not holds:
                raise SpecError(key, f"expected {wanted}, got {value}")
        return self


@dataclass(frozen=True)
class RecipeSettings:
    """All that a recipe file may set: its three parts."""

    model: ModelSource = field(default_factory=ModelSource)
    collect: CollectSpec = field(default_factory=CollectSpec)
    quant: QuantSpec = field(default_factory=QuantSpec)


@dataclass(frozen=True)
class Recipe(RecipeSettings):
    """A resolved recipe; `provenance` maps each dotted key to the file or place that set it."""

    provenance: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars, without the provenance."""
        parts = {"model": self.model, "collect": self.collect, "quant": self.quant}
        return {name: to_plain(part) for name, part in parts.items()}

    def to_yaml(self) -> str:
        """The whole recipe as YAML that loads again, each value with its origin as a comment."""
        return "\n".join(self._yaml_lines(self.to_dict(), prefix="")) + "\n"

    def _yaml_lines(self, group: Mapping[str, Any], *, prefix: str) -> Iterable[str]:
        indent = "  " * prefix.count(".")
        for name, value in group.items():
            key = f"{prefix}{name}"
            if isinstance(value, dict):
                yield f"{indent}{name}:"
                yield from self._yaml_lines(value, prefix=f"{key}.")
                continue
            origin = f"# {self.provenance.get(key, BUILT_IN_DEFAULT)}"
            if not isinstance(value, list) or not any(isinstance(v, dict) for v in value):
                yield f"{indent}{name}: {json.dumps(value)}  {origin}"
                continue
            yield f"{indent}{name}:  {origin}"
            yield from (f"{indent}  - {json.dumps(row)}" for row in value)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Command-line words as (recipe files, key=value overrides), each in its order."""
    is_override = ["=" in word and not Path(word).exists() for word in arguments]
    paths = [word for word, yes in zip(arguments, is_override, strict=True) if not yes]
    overrides = [word for word, yes in zip(arguments, is_override, strict=True) if yes]
    return paths, overrides


def load_recipe(paths: Sequence[str | Path], overrides: Sequence[str]) -> Recipe:
    """Merge recipe files left to right, then `key=value` overrides.

    A `__default__.yaml` beside a named file is merged before all of them. `recipes/...` that is
    not in the current directory is the copy that comes with the package.
    Raises RecipeError naming the file, the key and the nearest valid key.
    """
    files = [located(Path(path)) for path in paths]
    beside = [path.parent / DEFAULTS_FILE for path in files]
    defaults = [path for path in dict.fromkeys(beside) if path.is_file() and path not in files]
    layers = [(_display(path), read_yaml(path)) for path in (*defaults, *files)]
    layers += [(COMMAND_LINE, _parse_override(override)) for override in overrides]

    provenance: dict[str, str] = {}
    for origin, layer in layers:
        _refuse_interpolation(origin, layer)
        try:
            from_mapping(RecipeSettings, layer)
        except SpecError as error:
            raise RecipeError(f"{origin}: {error}") from None
        provenance.update(dict.fromkeys(_leaf_keys(layer, prefix=""), origin))

    merged = OmegaConf.to_container(OmegaConf.merge({}, *(layer for _, layer in layers)))
    settings = from_mapping(RecipeSettings, merged)
    recipe = Recipe(settings.model, settings.collect, settings.quant, provenance)
    return _validated(recipe)


def recipes_dir() -> Path:
    """The recipes that come with the package: inside it when installed, beside `src` otherwise."""
    installed = Path(__file__).parent / "recipes"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "recipes"


def _validated(recipe: Recipe) -> Recipe:
    checks = {"collect": recipe.collect.validate, "quant": recipe.quant.validate}
    for part, validate in checks.items():
        try:
            validate()
        except SpecError as error:
            key = f"{part}.{error.key}"
            origin = recipe.provenance.get(key.split("[")[0], BUILT_IN_DEFAULT)
            raise RecipeError(f"{origin}: {key}: {error.problem}") from None
    return recipe


def located(path: Path) -> Path:
    """A recipe file as it was named, or the copy that comes with the package.

    Raises: RecipeError when there is none.
    """
    if path.is_dir():
        raise RecipeError(f"{path}: is a directory, expected a recipe file (.yaml)")
    if path.is_file():
        return path
    if path.parts[:1] == ("recipes",):
        packaged = recipes_dir().joinpath(*path.parts[1:])
        if packaged.is_file():
            return packaged
        known = [p.relative_to(recipes_dir().parent) for p in recipes_dir().rglob("*.yaml")]
        raise RecipeError(f"{path}: no such recipe{nearest(path.as_posix(), _sorted(known))}")
    raise RecipeError(f"{path}: no such file")


def _sorted(paths: Iterable[Path]) -> list[str]:
    return sorted(path.as_posix() for path in paths)


def _display(path: Path) -> str:
    """A packaged recipe by the name that `load_recipe` takes, any other as it was given."""
    if path.is_relative_to(recipes_dir()):
        return (Path("recipes") / path.relative_to(recipes_dir())).as_posix()
    return str(path)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises: RecipeError naming the file that does not.
    """
    origin = _display(path)
    try:
        layer = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{origin}: not a readable YAML file: {reason}") from error
    except OSError as error:
        # OmegaConf says so of a file that holds a bare word or number
        reason = error.strerror or "not a YAML mapping of settings"
        raise RecipeError(f"{origin}: {reason}") from error
    if not layer:
        raise RecipeError(f"{origin}: holds no settings")
    if not isinstance(layer, dict):
        raise RecipeError(f"{origin}: expected model, collect and quant settings, got a list")
    return {str(key): value for key, value in layer.items()}


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise RecipeError(f"{COMMAND_LINE}: expected key=value, got {override!r}")
    try:
        parsed = OmegaConf.from_dotlist([f"value={text}"])
        value = OmegaConf.to_container(parsed, resolve=False)
    except (YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{COMMAND_LINE}: {key}: not a YAML value: {reason}") from error
    assert isinstance(value, dict)
    layer: Any = value["value"]
    for name in reversed(names):
        layer = {name: layer}
    return dict(layer)


def _refuse_interpolation(origin: str, value: Any, *, key: str = "") -> None:
    """A recipe is a value: nothing in it may depend on the environment or on other keys."""
    if isinstance(value, dict):
        for name, child in value.items():
            _refuse_interpolation(origin, child, key=f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for i, child in enumerate(value):
            _refuse_interpolation(origin, child, key=f"{key}[{i}]")
    elif isinstance(value, str) and ("${" in value or value == "???"):
        raise RecipeError(f"{origin}: {key}: write the value out, {value!r} is not replaced")


def _leaf_keys(value: Mapping[str, Any], *, prefix: str) -> Iterable[str]:
    for name, child in value.items():
        if isinstance(child, dict):
            yield from _leaf_keys(child, prefix=f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
