"""What searches compare is what the network computes.

Shapes: B image rows, L tokens, S sampled tokens of a row, C embed_dim, N outputs of the linear.
"""

from __future__ import annotations

import pytest
import torch

from tiny import random_text, tiny_pipeline
from var_compressor.models.transformer import pad_text
from var_compressor.quant.calibration import one_layer_cache
from var_compressor.quant.objectives import (
    CrossAttentionOutput,
    ProjectionOutput,
    SelfAttentionOutput,
)

ROWS = 3


@pytest.fixture
def setting():
    """A block, inputs for its attentions, its rotary table and schedule."""
    pipeline = tiny_pipeline()
    schedule = pipeline.schedule_for(0.5, None)
    rng = torch.Generator().manual_seed(0)
    x_BLC = torch.randn(ROWS, schedule.num_tokens, 64, generator=rng)
    return pipeline, schedule, pipeline.transformer.rotary_table(schedule), x_BLC


@torch.inference_mode()
def test_self_attention_is_the_networks_with_rotation_and_past(setting):
    pipeline, schedule, rope_2LD, x_BLC = setting
    attention = pipeline.transformer.blocks[1].self_attn
    queries_S = torch.tensor([0, 3, 7, 60, 61, 200, schedule.num_tokens - 1])
    found = SelfAttentionOutput(attention, x_BLC, rope_2LD, schedule.levels, queries_S)
    cache = one_layer_cache(pipeline, schedule)(ROWS)
    wanted_BLC = attention(x_BLC, rope_2LD, cache, 0, schedule.levels) - attention.proj.bias
    wanted_SC = wanted_BLC[:, queries_S].flatten(0, 1)
    torch.testing.assert_close(found.wanted_SN, wanted_SC, rtol=0, atol=1e-5)

    # and a candidate's error is the network's with that candidate as its projection
    changed = attention.qkv.weight + 0.05 * torch.randn(
        attention.qkv.weight.shape, generator=torch.Generator().manual_seed(1)
    )
    y_CTN = torch.stack([found.x_TK @ attention.qkv.weight.T, found.x_TK @ changed.T])
    attention.qkv.weight.data = changed
    cache = one_layer_cache(pipeline, schedule)(ROWS)
    moved_BLC = attention(x_BLC, rope_2LD, cache, 0, schedule.levels) - attention.proj.bias
    distance = (moved_BLC - wanted_BLC)[:, queries_S].double().square().sum()
    errors = found.errors(y_CTN)
    assert errors[0] < 1e-8 * distance
    assert float(errors[1]) == pytest.approx(float(distance), rel=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("of_text", [False, True])
def test_cross_attention_is_the_networks_for_texts_of_any_length(setting, of_text):
    pipeline, _, _, x_BLC = setting
    attention = pipeline.transformer.blocks[1].cross_attn
    text = random_text((4, 9, 1))
    rows = [row[:, :64] for row in text.rows()]
    queries_BSC = x_BLC[:, 10:30]
    found = CrossAttentionOutput(attention, queries_BSC, rows, of_text=of_text)
    padded_BTE, mask = pad_text(text)

    def network():
        kv = attention.keys_values(padded_BTE[..., :64])
        return attention(queries_BSC, kv, mask) - attention.proj.bias

    wanted_BSC = network()
    torch.testing.assert_close(found.wanted_TN, wanted_BSC.flatten(0, 1), rtol=0, atol=1e-5)

    linear = attention.kv if of_text else attention.q
    rng = torch.Generator().manual_seed(1)
    changed = linear.weight + 0.05 * torch.randn(linear.weight.shape, generator=rng)
    y_CTN = torch.stack([found.x_TK @ changed.T, found.x_TK @ linear.weight.T])
    linear.weight.data = changed
    distance = (network() - wanted_BSC).double().square().sum()
    errors = found.errors(y_CTN)
    assert float(errors[0]) == pytest.approx(float(distance), rel=1e-4)
    assert errors[1] < 1e-8 * distance


@torch.inference_mode()
def test_a_projection_is_compared_by_itself():
    rng = torch.Generator().manual_seed(0)
    x_TK, weight_NK = torch.randn(7, 5, generator=rng), torch.randn(3, 5, generator=rng)
    found = ProjectionOutput(x_TK.bfloat16(), weight_NK.bfloat16())
    y_CTN = torch.randn(4, 7, 3, generator=rng)
    wanted_TN = x_TK.bfloat16().double() @ weight_NK.bfloat16().double().T
    torch.testing.assert_close(
        found.errors(y_CTN), (y_CTN - wanted_TN).square().sum((1, 2)), rtol=1e-6, atol=0
    )
