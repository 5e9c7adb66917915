"""Outliers that change nothing but ranges: naive 4-bit breaks on them, SVDQuant does not."""

from __future__ import annotations

import copy

import pytest
import torch

from tiny import tiny_config
from var_compressor.compress import collection_of, open_pipeline
from var_compressor.evaluation.outliers import (
    ScaledFeedForward,
    fc2_inputs,
    heavy_tailed_gains,
    max_to_median,
    mean_snr_db,
    quantize_fc2,
    with_outliers,
)
from var_compressor.models.transformer import FeedForward
from var_compressor.recipe import load_recipe

# of the real 2B, up to 353
MIN_RATIO = 350.0
COLLECT = "recipes/collect/tiny.yaml"
INT4 = "recipes/svdquant/int4.yaml"
QUICK = (
    *("model.device=cpu", "model.dtype=float32", "collect.num_prompts=2"),
    *("quant.smooth.num_grids=6", "quant.low_rank.max_iters=2"),
    "quant.modules=[{pattern: ffn.fc2, act: sint4}]",
)
NAIVE = load_recipe(["recipes/model/infinity-tiny-naive.yaml", COLLECT, INT4], QUICK)
SVDQUANT = load_recipe(["recipes/model/infinity-tiny.yaml", COLLECT, INT4], QUICK)


@pytest.fixture(scope="module")
def plain():
    return open_pipeline(SVDQUANT.model)


@pytest.fixture(scope="module")
def collection():
    return collection_of(SVDQUANT.collect)


@pytest.fixture(scope="module")
def inputs(plain, collection):
    return fc2_inputs(plain, collection)


@pytest.fixture(scope="module")
def scaled(plain, inputs):
    return with_outliers(plain, inputs, min_ratio=MIN_RATIO, seed=0)


@torch.no_grad()
def test_gains_cancel_in_float64():
    config = tiny_config().transformer
    torch.manual_seed(0)
    ffn = FeedForward(config).double()
    gain_K = torch.rand(config.ffn_dim, dtype=torch.float64) * 50 + 0.01
    x_RLC = torch.randn(2, 5, config.embed_dim, dtype=torch.float64)
    wanted, found = ffn(x_RLC), ScaledFeedForward(config, copy.deepcopy(ffn), gain_K)(x_RLC)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-13 * float(wanted.abs().max()))


def test_the_scaled_model_is_the_same_function(plain, scaled, collection):
    text = plain.encode(list(collection.prompts.values()))
    schedule = plain.schedule_for(1.0, None)
    bits = plain.draw(
        text, schedule, seed=0, sampling=collection.sampling, with_trace=True
    ).trace.bits
    wanted, found = (model.teacher_logits(text, bits, cfg=2.0) for model in (plain, scaled))
    # powers of two: not even a rounding differs
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    first, after = plain.transformer.blocks[0].ffn, scaled.transformer.blocks[0].ffn
    assert not torch.equal(first.fc2.weight, after.fc2.weight)


def test_every_block_has_the_outliers(inputs, scaled, collection):
    before = [max_to_median(x_TK) for x_TK in inputs]
    after = [max_to_median(x_TK) for x_TK in fc2_inputs(scaled, collection)]
    assert len(after) == 8 and max(before) < 100 and min(after) >= MIN_RATIO


def test_the_ratio_is_over_all_elements():
    x = torch.tensor([[-8.0, 1.0], [2.0, 0.0], [-2.0, 2.0]])
    assert max_to_median(x) == pytest.approx(4, rel=1e-5)


def test_gains_depend_on_their_seed_and_have_a_limit():
    x_TK = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    gains = [heavy_tailed_gains(x_TK, min_ratio=100, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(gains[0], gains[1]) and not torch.equal(gains[0], gains[2])
    assert torch.equal(gains[0].log2(), gains[0].log2().round())
    with pytest.raises(ValueError, match="gains up to 1024 give max/median"):
        heavy_tailed_gains(x_TK, min_ratio=1e6, seed=0)


def test_naive_loses_ten_decibels_and_svdquant_not_one(plain, scaled, collection, tmp_path):
    loss = {}
    for recipe in (NAIVE, SVDQUANT):
        results = [
            quantize_fc2(
                model,
                collection,
                recipe.quant,
                tmp_path / f"{recipe.quant.low_rank.rank}-{name}",
                on_progress=lambda stage, done, total: None,
            )
            for name, model in (("plain", plain), ("scaled", scaled))
        ]
        before, after = map(mean_snr_db, results)
        assert before > 12
        loss[recipe.quant.low_rank.rank] = before - after
    assert loss[0] >= 10
    assert loss[32] <= 1
