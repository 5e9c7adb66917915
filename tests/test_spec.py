"""Specs: round trip through JSON, strictness, and which linear gets what."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from var_compressor.recipe import load_recipe
from var_compressor.spec import (
    ACT_FORMATS,
    GELU_SHIFT,
    MODULES,
    PRESETS,
    WEIGHT_FORMATS,
    ActSpec,
    CalibrationSpec,
    LowRankSpec,
    ModuleRule,
    QuantSpec,
    SmoothSpec,
    SpecError,
    WeightSpec,
)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_valid_and_survives_json(name: str) -> None:
    spec = PRESETS[name].validate()
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    ("recipe", "preset"),
    [
        ("fp8", "fp8"),
        ("int4", "svdquant"),
        ("int8", "w8a8"),
        ("nvfp4", "nvfp4"),
        ("w4a16", "w4a16"),
        ("w4a8", "w4a8"),
    ],
)
def test_a_recipe_and_its_preset_are_one(recipe: str, preset: str) -> None:
    assert load_recipe([f"recipes/svdquant/{recipe}.yaml"], []).quant == PRESETS[preset]


formats = st.sampled_from(sorted(WEIGHT_FORMATS))
rules = st.builds(
    ModuleRule,
    pattern=st.sampled_from([*MODULES, "*", "cross_attn.*", "blocks.3.ffn.fc2"]),
    weight=st.none() | st.just("default") | formats,
    act=st.none() | st.just("default") | formats,
    low_rank=st.booleans(),
    smooth=st.booleans(),
)
specs = st.builds(
    QuantSpec,
    weight=formats.map(lambda name: WeightSpec(name, WEIGHT_FORMATS[name])),
    act=st.just(ActSpec(None)) | formats.map(lambda name: ActSpec(name, WEIGHT_FORMATS[name])),
    low_rank=st.builds(LowRankSpec, rank=st.integers(0, 128)),
    smooth=st.builds(SmoothSpec, enabled=st.booleans(), num_grids=st.integers(2, 40)),
    calibration=st.builds(CalibrationSpec, seed=st.integers(0, 2**63 - 1)),
    exceptions=st.lists(rules, max_size=3).map(tuple),
)


@given(specs)
def test_any_valid_spec_survives_json_and_resolves_every_linear(spec: QuantSpec) -> None:
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    for name in MODULES:
        linear = spec.for_module(f"blocks.3.{name}")
        if linear is not None:
            # what a rule asks for must itself be a valid whole-model choice, but for uint4
            if linear.act.format == "uint4":
                assert name == "ffn.fc2"
                linear = replace(linear, act=replace(linear.act, format="sint4"))
            whole = QuantSpec(linear.weight, linear.act, linear.low_rank, linear.smooth)
            assert whole.validate() is whole


def test_default_table_quantizes_every_linear_and_leaves_text_inputs_at_16_bits() -> None:
    linears = {name: PRESETS["svdquant"].for_module(name) for name in MODULES}
    for name, linear in linears.items():
        assert linear is not None
        assert (linear.weight.format, linear.weight.group_size) == ("sint4", 64)
        expected = {"cross_attn.kv": None, "ffn.fc2": "uint4"}.get(name, "sint4")
        assert linear.act.format == expected
        assert linear.low_rank.rank == 32
        assert linear.smooth.enabled


def test_the_first_matching_rule_decides_and_exceptions_come_first() -> None:
    spec = QuantSpec(
        exceptions=(
            ModuleRule("blocks.0.ffn.fc2", weight="sint8", act="sint8", low_rank=False),
            ModuleRule("ffn.fc2", act=None, smooth=False),
            ModuleRule("blocks.1.*", weight=None),
        )
    ).validate()
    first = spec.for_module("blocks.0.ffn.fc2")
    assert first is not None
    assert (first.weight, first.act) == (WeightSpec("sint8", -1), ActSpec("sint8", -1))
    assert first.low_rank.rank == 0
    other = spec.for_module("blocks.1.ffn.fc2")
    assert other is not None
    assert (other.weight, other.act.format) == (spec.weight, None)
    assert not other.smooth.enabled
    assert spec.for_module("blocks.1.self_attn.qkv") is None
    # block 1 is not block 10
    assert spec.for_module("blocks.10.self_attn.qkv") is not None
    assert spec.for_module("head") is None


def test_naive_has_neither_branch_nor_smoothing() -> None:
    linear = PRESETS["naive"].for_module("ffn.fc1")
    assert linear is not None
    assert linear.low_rank.rank == 0
    assert not linear.smooth.enabled


def test_only_unsigned_inputs_are_shifted_by_the_depth_of_gelu() -> None:
    spec = QuantSpec()
    signed = replace(spec, act=replace(spec.act, allow_unsigned=False))
    for name in MODULES:
        linear = spec.for_module(f"blocks.7.{name}")
        assert linear is not None
        assert signed.for_module(f"blocks.7.{name}").act.format in ("sint4", None)
        is_unsigned = name == "ffn.fc2"
        assert (linear.act.format == "uint4") == is_unsigned
        assert linear.shift == (GELU_SHIFT if is_unsigned else 0.0)
    x = torch.linspace(-5, 5, 100_001, dtype=torch.float64)
    for approximate in ("none", "tanh"):
        lowest = torch.nn.functional.gelu(x, approximate=approximate).amin()
        assert 0 < lowest + GELU_SHIFT < 0.002
    assert float(torch.tensor(GELU_SHIFT).bfloat16()) == GELU_SHIFT


@pytest.mark.parametrize("pattern", ["ffn.fc2", "*.fc2", "blocks.3.ffn.fc2", "blocks.*.ffn.fc2"])
def test_uint4_may_be_given_to_any_rule_for_fc2(pattern: str) -> None:
    spec = replace(QuantSpec(), exceptions=(ModuleRule(pattern, act="uint4"),)).validate()
    linear = spec.for_module("blocks.3.ffn.fc2")
    assert linear is not None
    assert linear.act == ActSpec("uint4", ACT_FORMATS["uint4"])


def test_specs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantSpec().weight = WeightSpec()  # type: ignore[misc]


@pytest.mark.parametrize(
    ("data", "key", "says"),
    [
        ({"wieght": {}}, "wieght", "did you mean 'weight'"),
        ({"weight": {"group": 64}}, "weight.group", "did you mean 'group_size'"),
        ({"weight": {"group_size": "64"}}, "weight.group_size", "expected an integer, got '64'"),
        ({"weight": {"group_size": True}}, "weight.group_size", "expected an integer"),
        ({"weight": {"group_size": 64.0}}, "weight.group_size", "expected an integer"),
        ({"weight": {"rounding": "nearest"}}, "weight.rounding", "expected rtn or gptq"),
        ({"weight": {"format": "int3"}}, "weight.format", "unknown number format 'int3'"),
        ({"weight": {"format": None}}, "weight.format", "expected text, got null"),
        ({"weight": 4}, "weight", "expected a group of settings, got 4"),
        ({"act": {"format": "none"}}, "act.format", "or null for 16 bits"),
        ({"act": {"group_size": 24}}, "act.group_size", "a multiple of 16"),
        ({"weight": {"format": "nvfp4"}}, "weight.group_size", "groups of 16, got 64"),
        ({"low_rank": {"rank": -1}}, "low_rank.rank", "0 to 1024"),
        ({"smooth": {"enabled": 1}}, "smooth.enabled", "expected true or false"),
        ({"smooth": {"num_grids": 1}}, "smooth.num_grids", "2 to 1000"),
        ({"modules": [{"act": None}]}, "modules[0]", "lacks the key 'pattern'"),
        ({"modules": {"ffn.fc1": {}}}, "modules", "expected a list"),
        ({"modules": [{"pattern": "fnn.fc1"}]}, "modules[0].pattern", "did you mean 'ffn.fc1'"),
        ({"modules": [{"pattern": "blocks.0.fc9"}]}, "modules[0].pattern", "matches no linear"),
        ({"modules": [{"pattern": "*", "act": "x"}]}, "modules[0].act", "unknown number format"),
        ({"act": {"format": "uint4"}}, "act.format", "in a rule for ffn.fc2 alone"),
        ({"modules": [{"pattern": "*", "act": "uint4"}]}, "modules[0].act", "uint4 holds only"),
        (
            {"exceptions": [{"pattern": "blocks.1.ffn.fc1", "act": "uint4"}]},
            "exceptions[0].act",
            "what GELU puts out",
        ),
        ({"exceptions": [{"pattern": "ffn.*", "act": "uint4"}]}, "exceptions[0].act", "alone"),
        ({"calibration": {"max_tokens_per_level": 0}}, "calibration.max_tokens_per_level", "1"),
    ],
)
def test_a_bad_setting_is_one_line_with_its_place(data: dict, key: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        QuantSpec.from_dict(data)
    assert caught.value.key == key
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_validate_catches_what_replace_made() -> None:
    spec = replace(QuantSpec(), low_rank=LowRankSpec(max_iters=0))
    with pytest.raises(SpecError, match=r"low_rank\.max_iters: expected 1 to 10000, got 0"):
        spec.validate()
