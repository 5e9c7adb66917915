"""On the original's own calibration data, in its own formats, our output error is never above its.

Shapes: B image rows, L tokens of a row, T tokens, K input channels.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tinyptq
from quant_golden import joined, load_golden, tokens
from tinyptq import CONFIG, LEVEL_SIDES, NUM_IMAGES, RANK
from var_compressor.models.schedule import Schedule, rotary_table
from var_compressor.quant.linear import LinearInputs, quantize_linear, seeded_generator
from var_compressor.quant.objectives import (
    CrossAttentionOutput,
    ProjectionOutput,
    SelfAttentionOutput,
)
from var_compressor.spec import MODULES, ActSpec, LowRankSpec, QuantSpec

# the original leaves no input at 16 bits, and nothing unsigned
SPEC = QuantSpec(
    act=ActSpec(allow_unsigned=False),
    low_rank=LowRankSpec(rank=RANK),
    modules=tuple(replace(rule, act="default") for rule in QuantSpec().modules),
)


@pytest.fixture(scope="module")
def tensors():
    return tinyptq.load_tensors()


def objective_of(name, tensors):
    """What the linear's searches compare, on everything that was recorded."""
    block = tinyptq.original_block(tensors)
    if name == "self_attn.qkv":
        schedule = Schedule.of(1.0, "0.06M")
        levels = schedule.levels[: len(LEVEL_SIDES)]
        rope_2LD = rotary_table(schedule, CONFIG.head_dim, "cpu")[:, : levels[-1].end]
        queries = torch.arange(levels[-1].end)
        return SelfAttentionOutput(
            block.self_attn, rows_of("self_attn_BLC", tensors), rope_2LD, levels, queries
        )
    if name in ("cross_attn.q", "cross_attn.kv"):
        firsts = [c for c in tinyptq.captures(tensors) if c.level == 0]
        texts = [text for c in firsts for text in c.text_TC.split(c.text_lens)]
        queries = rows_of("cross_attn_BLC", tensors)
        return CrossAttentionOutput(
            block.cross_attn, queries, texts, of_text=name == "cross_attn.kv"
        )
    inputs_TK = tinyptq.calibration_inputs(tensors)[name]
    return ProjectionOutput(inputs_TK, block.get_submodule(name).weight)


def rows_of(field, tensors):
    """All levels of every image's rows, joined: [B, L, C]."""
    captures = tinyptq.captures(tensors)
    images = [[c for c in captures if c.image == image] for image in range(NUM_IMAGES)]
    return torch.cat([torch.cat([getattr(c, field) for c in image], dim=1) for image in images])


@torch.inference_mode()
@pytest.mark.parametrize("name", MODULES)
def test_our_linear_errs_less_than_the_originals(tensors, name):
    block, objective = tinyptq.original_block(tensors), objective_of(name, tensors)
    linear, x_TK = block.get_submodule(name), tinyptq.calibration_inputs(tensors)[name]
    spec = SPEC.for_module(name)
    assert (spec.weight.format, spec.act.format) == ("sint4", "sint4")
    ours, _ = quantize_linear(
        name,
        linear,
        spec,
        LinearInputs(x_TK, *x_TK.aminmax(dim=0)),
        objective,
        generator=seeded_generator(0, name),
    )
    theirs = tinyptq.original_linears(tensors)[name]
    outputs = torch.stack([layer(objective.x_TK) - linear.bias for layer in (ours, theirs)])
    our_error, their_error = objective.errors(outputs).tolist()
    assert our_error < 0.95 * their_error


@torch.inference_mode()
@pytest.mark.parametrize(
    "name", ["lowrank_a", "lowrank_qkv_b", "smooth_plain_b", "smooth_lowrank_a"]
)
def test_our_search_ends_below_every_recorded_step(name):
    """The recorded cases start from a (smoothed) weight and end at their best step."""
    golden = load_golden(name)
    weight_NK, x_TK = joined(golden, "weight"), tokens(golden)
    is_smoothing = name.startswith("smooth")
    rank = {"smooth_plain_b": 0, "smooth_lowrank_a": 16}.get(name)
    rank = len(golden["a.weight"]) if rank is None else rank
    spec = replace(
        SPEC.for_module("ffn.fc1"), low_rank=replace(SPEC.low_rank, rank=rank, max_iters=30)
    )
    if not is_smoothing:
        spec = replace(spec, smooth=replace(spec.smooth, enabled=False))
    linear = torch.nn.Linear(weight_NK.shape[1], len(weight_NK), bias=True)
    linear.weight.data, linear.bias.data = weight_NK, torch.zeros(len(weight_NK))
    found, _ = quantize_linear(
        name,
        linear,
        spec,
        LinearInputs(x_TK, *x_TK.aminmax(dim=0)),
        ProjectionOutput(x_TK, weight_NK),
        generator=seeded_generator(0, name),
    )
    error = float((found(x_TK) - x_TK @ weight_NK.T).square().sum())
    # scales and branch are stored in bf16 here, in float32 there
    assert error <= 1.002 * float(golden["errors"].min())
