"""What was asked for: how a model is quantized, as frozen values without torch.

A spec says nothing of files or devices. `QuantSpec.for_module` answers the one question the
compressor has: what happens to this linear?
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar

# format -> group size it is used with unless the spec says otherwise; -1 is one scale per row.
# Whoever adds a number format enters it here (docs/EXTENDING.md).
WEIGHT_FORMATS = {"sint4": 64, "sint8": -1, "fp8_e4m3": -1, "nvfp4": 16}
ACT_FORMATS = {"sint4": 64, "uint4": 64, "sint8": -1, "fp8_e4m3": -1, "nvfp4": 16}
WHOLE_ROW = -1

# lifts the output of GELU, whose minimum is -0.16997, above 0; exact in bf16
GELU_SHIFT = 0.171875
# the only linear whose input comes from GELU
_AFTER_GELU = "ffn.fc2"

_NBITS = {"sint4": 4, "uint4": 4, "sint8": 8, "fp8_e4m3": 8, "nvfp4": 4}
# formats that their number of bits does not tell
_NAMED = ("fp8_e4m3", "nvfp4", "uint4")

# in a module rule: the format of the spec's own `weight` or `act` part
DEFAULT = "default"

MODULES = (
    "self_attn.qkv",
    "self_attn.proj",
    "cross_attn.q",
    "cross_attn.kv",
    "cross_attn.proj",
    "ffn.fc1",
    "ffn.fc2",
)

T = TypeVar("T")


class SpecError(ValueError):
    """A setting that can't be used. `key` is its dotted place, `problem` the rest of the line."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(key, problem)
        self.key = key
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.key}: {self.problem}" if self.key else self.problem


@dataclass(frozen=True)
class WeightSpec:
    """How a weight is stored: number format, input channels per scale, and how codes are chosen.

    `range_search`: the final codes take, in each group, the share of its range that loses least.
    """

    format: str = "sint4"
    group_size: int = 64
    rounding: Literal["rtn", "gptq"] = "rtn"
    range_search: bool = True


@dataclass(frozen=True)
class ActSpec:
    """How a linear's input is quantized at run time; format None leaves it at 16 bits.

    `allow_unsigned`: where the input comes from GELU, sint4 becomes uint4, shifted so that all
    values are positive; nearly all are anyway, so that the step is halved.
    """

    format: str | None = "sint4"
    group_size: int = 64
    allow_unsigned: bool = True


@dataclass(frozen=True)
class LowRankSpec:
    """The 16-bit branch beside a quantized weight; rank 0 means no branch.

    Refinement stops after `max_iters` steps, or `patience` steps without a lower output error.
    """

    rank: int = 32
    max_iters: int = 100
    patience: int = 5


@dataclass(frozen=True)
class SmoothSpec:
    """Search for per-channel smoothing factors: `num_grids` points per family of exponents."""

    enabled: bool = True
    num_grids: int = 20


@dataclass(frozen=True)
class KVSpec:
    """How the self-attention cache is stored, and how its ranges are found.

    `shared_percentile` uses one clipping percentile per tensor, `per_channel` one per channel;
    `weighting` counts a token's error as attention does. `dynamic`: scales per level, head and
    channel from the level itself, without calibration. The first
    `plain_levels` levels stay in 16 bits. `keep`: share of the bytes that later levels attend to
    most; the rest is evicted. `budget`, such as 2GiB, for one image: 8 or 4 bits per head and,
    where 4 bits are too many, eviction. At most `max_tokens_per_level` tokens of each level are
    searched, the same share of every prompt.
    """

    format: Literal["bf16", "fp8", "int8", "int4"] = "int8"
    mode: Literal["per_channel", "shared_percentile"] = "per_channel"
    weighting: Literal["none", "attention"] = "attention"
    dynamic: bool = False
    plain_levels: int = 0
    keep: float = 1.0
    budget: str | None = None
    max_tokens_per_level: int = 1024

    def check(self) -> None:
        """Raises: SpecError naming the setting that contradicts another."""
        _check_range("kv.plain_levels", self.plain_levels, 0, 15)
        _check_range("kv.max_tokens_per_level", self.max_tokens_per_level, 1)
        if not 0 < self.keep <= 1:
            raise SpecError("kv.keep", f"expected a share above 0, up to 1, got {self.keep}")
        if self.budget is not None and (self.format not in ("int8", "int4") or self.keep < 1):
            raise SpecError(
                "kv.budget", "chooses bits and levels itself: use format int8 or int4, and keep 1"
            )
        if self.mode == "shared_percentile" and (
            self.format != "int8" or self.dynamic or self.budget is not None
        ):
            raise SpecError("kv.mode", "shared_percentile is the original's, of int8 alone")


@dataclass(frozen=True)
class CalibrationSpec:
    """What is kept of the recorded inputs, drawn by `seed`.

    At most `max_tokens_per_level` tokens of each level, the same share of every prompt.
    Self-attention is judged on rows of at most `max_attention_tokens` tokens, one row at least.
    `prefix`: whether a block's inputs come from full-precision or already quantized blocks before
    it.
    """

    seed: int = 0
    max_tokens_per_level: int = 512
    max_attention_tokens: int = 8192
    prefix: Literal["full", "quantized"] = "full"


@dataclass(frozen=True)
class ModuleRule:
    """One row of the module table: what happens to linears whose name matches `pattern`.

    The pattern is a glob on the name inside a block (`ffn.fc2`, `cross_attn.*`) or on the full
    name (`blocks.0.ffn.fc2`). `weight` and `act` name a format, or "default" for the format of
    the spec; weight None leaves the module alone, act None keeps its input at 16 bits.
    """

    pattern: str
    weight: str | None = DEFAULT
    act: str | None = DEFAULT
    low_rank: bool = True
    smooth: bool = True

    def matches(self, name: str) -> bool:
        return fnmatchcase(name, self.pattern) or fnmatchcase(name, f"*.{self.pattern}")


# cross-attention keys and values come from the text once per image: a 16-bit input costs nothing
DEFAULT_RULES = (
    ModuleRule("self_attn.qkv"),
    ModuleRule("self_attn.proj"),
    ModuleRule("cross_attn.q"),
    ModuleRule("cross_attn.kv", act=None),
    ModuleRule("cross_attn.proj"),
    ModuleRule("ffn.fc1"),
    ModuleRule("ffn.fc2"),
)


@dataclass(frozen=True)
class LinearSpec:
    """What happens to one linear: every choice made, nothing left to look up."""

    weight: WeightSpec
    act: ActSpec
    low_rank: LowRankSpec
    smooth: SmoothSpec

    @property
    def shift(self) -> float:
        """What is added to the input so that an unsigned format can hold it."""
        return GELU_SHIFT if self.act.format == "uint4" else 0.0

    def summary(self) -> str:
        """The gist in words, such as "W4A4 g64 rank 32"."""
        act = "A16" if self.act.format is None else _word("A", self.act.format)
        group_size = self.weight.group_size
        groups = "per row" if group_size == WHOLE_ROW else f"g{group_size}"
        weight = _word("W", self.weight.format)
        words = [weight + act, groups, f"rank {self.low_rank.rank}"]
        odd = [name for name in (self.weight.format, self.act.format) if name in _NAMED]
        return " ".join([*words, *dict.fromkeys(odd)])


@dataclass(frozen=True)
class QuantSpec:
    """All that determines a compressed model, next to the checkpoint, the prompts and the seed.

    The first rule that matches decides: `exceptions` in order, then `modules`.
    """

    weight: WeightSpec = field(default_factory=WeightSpec)
    act: ActSpec = field(default_factory=ActSpec)
    low_rank: LowRankSpec = field(default_factory=LowRankSpec)
    smooth: SmoothSpec = field(default_factory=SmoothSpec)
    kv: KVSpec = field(default_factory=KVSpec)
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)
    exceptions: tuple[ModuleRule, ...] = ()
    modules: tuple[ModuleRule, ...] = DEFAULT_RULES

    def rule_for(self, name: str) -> ModuleRule | None:
        return next((r for r in (*self.exceptions, *self.modules) if r.matches(name)), None)

    def for_module(self, name: str) -> LinearSpec | None:
        """What happens to the linear `name`; None when it is left alone."""
        rule = self.rule_for(name)
        if rule is None or rule.weight is None:
            return None
        weight, act = self.weight, self.act
        if rule.weight not in (DEFAULT, weight.format):
            group_size = WEIGHT_FORMATS[rule.weight]
            weight = replace(weight, format=rule.weight, group_size=group_size)
        if rule.act is None:
            act = replace(act, format=None)
        elif rule.act not in (DEFAULT, act.format):
            act = ActSpec(format=rule.act, group_size=ACT_FORMATS[rule.act])
        elif rule.act == DEFAULT and act.format == "sint4" and name.endswith(_AFTER_GELU):
            act = replace(act, format="uint4" if act.allow_unsigned else "sint4")
        return LinearSpec(
            weight=weight,
            act=act,
            low_rank=self.low_rank if rule.low_rank else replace(self.low_rank, rank=0),
            smooth=self.smooth if rule.smooth else replace(self.smooth, enabled=False),
        )

    def summary(self) -> str:
        """The gist in words: what most linears are, then those that differ."""
        linears = {name: self.for_module(name) for name in MODULES}
        words = {name: "16 bits" if one is None else one.summary() for name, one in linears.items()}
        most = Counter(words.values()).most_common(1)[0][0]
        differing = [f"{name} {word}" for name, word in words.items() if word != most]
        per_block = [rule for rule in self.exceptions if rule.pattern.startswith("blocks.")]
        if per_block:
            differing.append(f"{len(per_block)} rules for single blocks")
        return f"{most} ({', '.join(differing)})" if differing else most

    def validate(self) -> QuantSpec:
        """Return self, or raise SpecError naming the first setting that can't be used."""
        _check_format("weight.format", self.weight.format, WEIGHT_FORMATS, or_null="")
        _check_group("weight.group_size", self.weight.format, self.weight.group_size)
        if self.act.format is not None:
            or_null = ", or null for 16 bits"
            _check_format("act.format", self.act.format, ACT_FORMATS, or_null=or_null)
            _check_group("act.group_size", self.act.format, self.act.group_size)
            _check_unsigned("act.format", self.act.format, MODULES)
        _check_range("low_rank.rank", self.low_rank.rank, 0, 1024)
        _check_range("low_rank.max_iters", self.low_rank.max_iters, 1, 10_000)
        _check_range("low_rank.patience", self.low_rank.patience, 1, 10_000)
        _check_range("smooth.num_grids", self.smooth.num_grids, 2, 1000)
        _check_range("calibration.seed", self.calibration.seed, 0, 2**63 - 1)
        _check_range("calibration.max_tokens_per_level", self.calibration.max_tokens_per_level, 1)
        _check_range("calibration.max_attention_tokens", self.calibration.max_attention_tokens, 1)
        self.kv.check()
        _check_rules("exceptions", self.exceptions)
        _check_rules("modules", self.modules)
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars: what `from_dict` and JSON take."""
        return to_plain(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantSpec:
        """The validated spec of `data`; absent keys keep their defaults, unknown keys raise."""
        return from_mapping(cls, data).validate()


def _word(letter: str, format_name: str) -> str:
    """ "W4" or the like; with the name instead, for a format that is not of this package."""
    return f"{letter}{_NBITS.get(format_name, f'({format_name})')}"


def to_plain(value: Any) -> Any:
    """A dataclass as what JSON would give back: dicts, lists, scalars."""
    return json.loads(json.dumps(dataclasses.asdict(value)))


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word closest to `word`, or the whole choice."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"


def from_mapping(cls: type[T], data: Any, *, key: str = "") -> T:
    """Build the frozen dataclass `cls` from nested mappings, strictly.

    Raises SpecError for an unknown key, a missing required one, or a value of the wrong type.
    """
    if not isinstance(data, Mapping):
        raise SpecError(key, f"expected a group of settings, got {_shown(data)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    values = {}
    for name, value in data.items():
        place = f"{key}.{name}" if key else str(name)
        if name not in fields:
            raise SpecError(place, f"unknown key{nearest(str(name), fields)}")
        values[name] = _converted(hints[name], value, place)
    for name, fld in fields.items():
        no_default = fld.default is dataclasses.MISSING
        if name not in values and no_default and fld.default_factory is dataclasses.MISSING:
            raise SpecError(key, f"lacks the key {name!r}")
    return cls(**values)


def _converted(hint: Any, value: Any, key: str) -> Any:
    """`value` as the annotated type; only ints bend (to floats) and lists (to tuples)."""
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return from_mapping(typing.cast(type, hint), value, key=key)
    if origin in (typing.Union, types.UnionType):
        return _converted_union(hint, value, key)
    if origin is tuple and isinstance(value, list | tuple):
        element = typing.get_args(hint)[0]
        return tuple(_converted(element, v, f"{key}[{i}]") for i, v in enumerate(value))
    if origin is Literal:
        options = typing.get_args(hint)
        if value not in options:
            raise SpecError(key, f"expected {' or '.join(options)}, got {_shown(value)}")
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and is_number and math.isfinite(value):
        return float(value)
    if type(value) is hint and hint is not float:
        return value
    raise SpecError(key, f"expected {_type_name(hint)}, got {_shown(value)}")


def _converted_union(hint: Any, value: Any, key: str) -> Any:
    for option in typing.get_args(hint):
        if option is types.NoneType and value is None:
            return None
        try:
            return _converted(option, value, key)
        except SpecError:
            continue
    raise SpecError(key, f"expected {_type_name(hint)}, got {_shown(value)}")


def _type_name(hint: Any) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    origin = typing.get_origin(hint)
    if hint is types.NoneType:
        return "null"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(option) for option in typing.get_args(hint))
    if origin is tuple:
        return "a list"
    return names.get(hint, str(hint))


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a group of settings"
    return "null" if value is None else f"{value!r} ({type(value).__name__})"


def _check_format(key: str, name: str, known: Mapping[str, int], *, or_null: str) -> None:
    if name not in known:
        choice = ", ".join(known) + or_null
        own = "one of your own is known once its module is imported"
        raise SpecError(key, f"unknown number format {name!r}; one of {choice}; {own}")


def _check_group(key: str, format_name: str, group_size: int) -> None:
    if format_name == "nvfp4" and group_size != 16:
        raise SpecError(key, f"nvfp4 has groups of 16, got {group_size}")
    if group_size != WHOLE_ROW and (group_size < 16 or group_size % 16):
        wanted = f"a multiple of 16, or {WHOLE_ROW} for one scale per row"
        raise SpecError(key, f"expected {wanted}, got {group_size}")


def _check_range(key: str, value: int, low: int, high: int | None = None) -> None:
    if value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"{low} to {high}"
        raise SpecError(key, f"expected {wanted}, got {value}")


def _check_unsigned(key: str, act_format: str | None, modules: Iterable[str]) -> None:
    if act_format == "uint4" and any(name != _AFTER_GELU for name in modules):
        raise SpecError(
            key, f"uint4 holds only what GELU puts out; give it in a rule for {_AFTER_GELU} alone"
        )


def _check_rules(key: str, rules: tuple[ModuleRule, ...]) -> None:
    for i, rule in enumerate(rules):
        place = f"{key}[{i}]"
        # of a full name like blocks.0.ffn.fc2, the part inside the block must exist
        local = replace(rule, pattern=re.sub(r"^blocks\.[^.]+\.", "", rule.pattern))
        matched = [name for name in MODULES if local.matches(name)]
        if not matched:
            problem = f"{rule.pattern!r} matches no linear{nearest(local.pattern, MODULES)}"
            raise SpecError(f"{place}.pattern", problem)
        if rule.weight not in (None, DEFAULT):
            or_null = ", default, or null to leave the module alone"
            _check_format(f"{place}.weight", str(rule.weight), WEIGHT_FORMATS, or_null=or_null)
        if rule.act not in (None, DEFAULT):
            or_null = ", default, or null for 16 bits"
            _check_format(f"{place}.act", str(rule.act), ACT_FORMATS, or_null=or_null)
        _check_unsigned(f"{place}.act", rule.act, matched)


PRESETS: dict[str, QuantSpec] = {
    "svdquant": QuantSpec(),
    # as the literature compares them: signed inputs, every group's whole range
    "naive": QuantSpec(
        weight=WeightSpec(range_search=False),
        act=ActSpec(allow_unsigned=False),
        smooth=SmoothSpec(enabled=False),
        low_rank=LowRankSpec(rank=0),
    ),
    "smoothquant": QuantSpec(
        weight=WeightSpec(range_search=False),
        act=ActSpec(allow_unsigned=False),
        low_rank=LowRankSpec(rank=0),
    ),
    "gptq": QuantSpec(weight=WeightSpec(rounding="gptq")),
    "w4a16": QuantSpec(act=ActSpec(format=None), smooth=SmoothSpec(enabled=False)),
    "w4a8": QuantSpec(act=ActSpec("sint8", WHOLE_ROW)),
    "w8a8": QuantSpec(weight=WeightSpec("sint8", WHOLE_ROW), act=ActSpec("sint8", WHOLE_ROW)),
    "fp8": QuantSpec(weight=WeightSpec("fp8_e4m3", WHOLE_ROW), act=ActSpec("fp8_e4m3", WHOLE_ROW)),
    "nvfp4": QuantSpec(weight=WeightSpec("nvfp4", 16), act=ActSpec("nvfp4", 16)),
}
