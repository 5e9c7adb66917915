"""The plan before a run: it says what the modules weigh, and which linears are treated apart."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from tiny import tiny_config
from var_compressor import cli
from var_compressor.layers.linear import QuantizedLinear, linear_specs, swap_linears
from var_compressor.models.config import MODELS, InfinityConfig
from var_compressor.models.directory import meta_transformer
from var_compressor.quant.plan import COLUMNS, plan, table_rows
from var_compressor.spec import PRESETS, ActSpec, LowRankSpec, ModuleRule, QuantSpec, WeightSpec

TINY = MODELS["infinity-tiny"].transformer


def num_bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


def whole_model_bytes(spec: QuantSpec, config: InfinityConfig) -> tuple[int, int]:
    """Of the bf16 model and of the model that an artifact is loaded into."""
    model = meta_transformer(config, torch.bfloat16)
    before = num_bytes(model)
    for index, block in enumerate(model.blocks):
        swap_linears(block, linear_specs(spec, block, index))
    return before, num_bytes(model)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("model", ["infinity-tiny", "infinity-2b"])
def test_sizes_are_those_of_the_modules(preset, model):
    spec, config = PRESETS[preset], MODELS[model].transformer
    found = plan(spec, config)
    assert (found.before_bytes, found.after_bytes) == whole_model_bytes(spec, config)
    for row in found.linears:
        N, K = row.shape_NK
        with torch.device("meta"):
            one = QuantizedLinear(K, N, row.spec, bias_dtype=torch.bfloat16)
        assert row.after_bytes == row.num_linears * num_bytes(one), row
        assert row.before_bytes == row.num_linears * 2 * (N * K + N)


def test_the_svdquant_bytes_of_one_linear_counted_by_hand():
    """4-bit codes, a bf16 scale per 64, fp32 smoothing, a bf16 branch of rank 32, a bf16 bias."""
    row = next(row for row in plan(QuantSpec(), TINY).linears if row.pattern == "ffn.fc2")
    N, K = row.shape_NK
    assert (N, K, row.num_linears) == (256, 1024, TINY.depth)
    # the bias is float32, because it carries the correction of the shift
    one = N * K // 2 + 2 * N * K // 64 + 4 * K + 2 * 32 * (N + K) + 4 * N
    assert row.after_bytes == TINY.depth * one
    assert row.saved_bytes == TINY.depth * (2 * (N * K + N) - one)


def test_exceptions_have_rows_of_their_own():
    rules = (
        ModuleRule("blocks.3.ffn.fc2", act="sint8"),
        ModuleRule("blocks.[0-2].cross_attn.q", weight=None),
        ModuleRule("blocks.7.cross_attn.q", weight=None),
        ModuleRule("self_attn.proj", low_rank=False, smooth=False),
    )
    spec = replace(QuantSpec(), exceptions=rules).validate()
    found = plan(spec, TINY)
    rows = {row.pattern: row for row in found.linears}
    assert list(rows) == [
        *("self_attn.qkv", "self_attn.proj"),
        *("blocks.0-2,7.cross_attn.q", "blocks.3-6.cross_attn.q"),
        *("cross_attn.kv", "cross_attn.proj", "ffn.fc1"),
        *("blocks.0-2,4-7.ffn.fc2", "blocks.3.ffn.fc2"),
    ]
    assert rows["blocks.3.ffn.fc2"].spec == spec.for_module("blocks.3.ffn.fc2")
    assert rows["blocks.3.ffn.fc2"].spec.act.format == "sint8"
    kept = rows["blocks.0-2,7.cross_attn.q"]
    assert (kept.spec, kept.num_linears, kept.saved_bytes) == (None, 4, 0)
    assert rows["self_attn.proj"].spec.low_rank.rank == 0
    assert sum(row.num_linears for row in found.linears) == 7 * TINY.depth
    assert (found.before_bytes, found.after_bytes) == whole_model_bytes(spec, TINY)


def test_a_plan_that_cannot_be_run_names_the_linear():
    small = replace(TINY, embed_dim=64, num_heads=2)
    with pytest.raises(ValueError, match=r"self_attn\.qkv: .*rank 65 does not fit a weight of sh"):
        plan(replace(QuantSpec(), low_rank=LowRankSpec(rank=65)), small)
    odd = QuantSpec(WeightSpec(group_size=48), ActSpec(group_size=48)).validate()
    with pytest.raises(ValueError, match=r"self_attn\.qkv: .*groups of 48"):
        plan(odd, TINY)


def test_the_text_and_the_json_say_the_same():
    spec = replace(QuantSpec(), exceptions=(ModuleRule("blocks.0.ffn.fc1", weight=None),))
    found = plan(spec, TINY)
    content = json.loads(json.dumps(found.to_dict()))
    assert content["after_bytes"] == found.after_bytes
    assert content["linears"][0]["spec"]["low_rank"]["rank"] == 32
    rows = table_rows(found)
    assert {len(row) for row in rows} == {len(COLUMNS)}
    sums = [sum(float(row[column]) for row in rows[:-1]) for column in (-3, -2)]
    assert sums == [pytest.approx(float(rows[-1][column]), abs=0.1) for column in (-3, -2)]
    shown = {row[0]: row for row in rows}
    assert shown["blocks.0.ffn.fc1"][3:8] == ("16 bits", "", "16 bits", "", "")
    assert shown["cross_attn.kv"][3:8] == ("sint4 g64", "nearest, range", "16 bits", "32", "yes")


# --- varc quantize --plan ------------------------------------------------------------------------

RECIPES = ("recipes/model/infinity-2b.yaml", "recipes/svdquant/int4.yaml")


def run(*words: object):
    return CliRunner().invoke(cli.app, ["quantize", *map(str, words)])


def test_the_command_shows_the_plan_of_a_model_that_is_not_there():
    wanted = plan(QuantSpec(), MODELS["infinity-2b"].transformer)
    for path in ((), ("model.path=nowhere/infinity-2b",)):
        shown = run(*RECIPES, *path, "--plan")
        assert shown.exit_code == 0 and shown.stderr == ""
        words = shown.stdout.split()
        assert {row.pattern for row in wanted.linears} <= set(words)
        assert f"{wanted.after_bytes / 2**20:.2f}" in words
        as_json = run(*RECIPES, *path, "--plan", "--json")
        assert json.loads(as_json.stdout) == json.loads(json.dumps(wanted.to_dict()))


def test_a_model_directory_says_its_own_shape(model_dir):
    words = ("--plan", "--json", f"model.path={model_dir}", "quant.low_rank.rank=8")
    found = json.loads(run(*RECIPES, *words).stdout)
    spec = replace(QuantSpec(), low_rank=LowRankSpec(rank=8))
    assert found["after_bytes"] == plan(spec, tiny_config().transformer).after_bytes


def test_a_plan_that_cannot_be_is_an_error_and_nothing_is_printed(model_dir):
    for words in (
        ("model.name=infinity-3b",),
        (f"model.path={model_dir}", "quant.low_rank.rank=65"),
    ):
        shown = run(*RECIPES, *words, "--plan")
        assert isinstance(shown.exception, ValueError) and shown.stdout == ""
