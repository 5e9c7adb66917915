"""Recorded runs of the original implementation, reproduced."""

from __future__ import annotations

from functools import cache
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from tiny import GOLDEN, golden_config, golden_pipeline
from var_compressor import generation
from var_compressor.generation import Generation
from var_compressor.layers.kv_cache import PlainCache
from var_compressor.models.bits import teacher_inputs
from var_compressor.models.sampling import Sampling
from var_compressor.models.schedule import Schedule

CASES = ("case_a", "case_b")
NUM_LEVELS = 7


def recorded(case):
    return load_file(GOLDEN / case / "expected.safetensors")


@cache
def generated(case) -> Generation:
    settings = golden_config(case)[1]["sampling"]
    pipeline, text = golden_pipeline(case, torch.float32)
    sampling = Sampling(
        cfg=tuple(settings["cfg_list"]),
        tau=tuple(settings["tau_list"]),
        top_k=settings["top_k"],
        top_p=settings["top_p"],
        cfg_layers=tuple(settings["cfg_insertion_layer"]),
    )
    return pipeline.generate(text, seed=settings["g_seed"], sampling=sampling, with_trace=True)


@pytest.mark.parametrize("case", CASES)
def test_every_bit_of_every_level(case):
    expected = recorded(case)
    for i, bits_BLQ in enumerate(generated(case).trace.bits):
        assert torch.equal(bits_BLQ, expected[f"scale{i:02d}.bits"]), f"level {i}"


@pytest.mark.parametrize("case", CASES)
def test_logits_latent_and_image(case):
    expected, run = recorded(case), generated(case)
    for i, logits_BLQ2 in enumerate(run.trace.logits):
        reference = expected[f"scale{i:02d}.logits"]
        error = (logits_BLQ2.flatten(2) - reference).abs().max()
        assert error <= 1e-4 * reference.abs().max(), f"level {i}"
    assert (run.latent_BDYX - expected["summed_codes"]).abs().max() <= 1e-5
    strided = run.image_B3YX[:, :, ::2, ::2]
    assert (strided - expected["image_float_strided"]).abs().max() <= 1 / 255
    # recorded as BGR
    difference = run.uint8_BYX3.flip(-1).int() - expected["image_u8"].int()
    assert difference.abs().max() <= 1
    assert (difference != 0).float().mean() <= 0.005


@pytest.mark.parametrize("case", CASES)
def test_recorded_noise_replays_the_sampling(case):
    expected, run = recorded(case), generated(case)
    for i, (logits_BLQ2, bits_BLQ) in enumerate(zip(run.trace.logits, run.trace.bits, strict=True)):
        difference = logits_BLQ2[..., 1] - logits_BLQ2[..., 0]
        is_one = difference > expected[f"scale{i:02d}.noise_t"]
        is_fixed = logits_BLQ2.softmax(-1).amin(-1) <= 1 - Sampling().top_p
        assert torch.equal(torch.where(is_fixed, difference > 0, is_one), bits_BLQ.bool())


@pytest.mark.parametrize("case", CASES)
def test_cached_keys_and_values(case):
    class WholeCache(PlainCache):
        """Keeps the last level too, as the original does."""

        def attend_level(self, layer, level, q, k, v):
            self.seen.setdefault(layer, []).append((k.clone(), v.clone()))
            return super().attend_level(layer, level, q, k, v)

    WholeCache.seen = {}
    expected = recorded(case)
    pipeline, text = golden_pipeline(case, torch.float32)
    with mock.patch.object(generation, "PlainCache", WholeCache):
        pipeline.generate(text, seed=0, forced_bits=generated(case).trace.bits)
    for layer in golden_config(case)[1]["recording"]["kv_blocks"]:
        keys, values = (
            torch.cat(parts, dim=2) for parts in zip(*WholeCache.seen[layer], strict=True)
        )
        for name, ours, tolerance in (("k", keys, 1e-5), ("v", values, 3e-5)):
            stored = ours[:, :, expected["kv.token_index"]]
            reference = expected[f"kv.block{layer}.{name}"]
            assert (stored - reference).abs().max() <= tolerance
            probe = (ours * expected["kv.probe"]).sum(-1)
            error = (probe - expected[f"kv.block{layer}.{name}_probe"]).abs().max()
            assert error <= 2e-4


@pytest.mark.parametrize("case", CASES)
def test_text_tensors_and_level_inputs(case):
    expected = recorded(case)
    pipeline, text = golden_pipeline(case, torch.float32)
    model = pipeline.transformer
    with torch.inference_mode():
        context = model.embed_text(text, model.unconditional_text(text))
        both = torch.cat([text.packed_TE, model.unconditional_text(text).packed_TE])
        normed = model.text_norm(both)
        projected = model.text_proj(normed)
    assert (normed - expected["text.kv_normed"]).abs().max() <= 1e-5
    assert (projected - expected["text.ca_kv"]).abs().max() <= 1e-5
    assert (context.cond_RC - expected["text.cond_BD"]).abs().max() <= 1e-5
    assert (context.ada_R16C - expected["text.gss"]).abs().max() <= 1e-5
    start = model.start_token(context)
    assert (start - expected["scale00.x_in"]).abs().max() <= 1e-5

    schedule = Schedule.of(1.0, model.config.pixel_budget)
    bits = [expected[f"scale{i:02d}.bits"] for i in range(NUM_LEVELS)]
    tokens_BLQ = teacher_inputs(bits, pipeline.new_pyramid(schedule, batch=1))
    sizes = [level.num_tokens for level in schedule.levels[1:]]
    for i, tokens in enumerate(tokens_BLQ.split(sizes, dim=1), start=1):
        assert (tokens - expected[f"scale{i:02d}.vae_in"]).abs().max() <= 1e-5
        embedded = model.embed_bits(tokens, context)[:1]
        assert (embedded - expected[f"scale{i:02d}.x_in"]).abs().max() <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_bf16_blocks_stay_within_the_spread_of_the_originals_bf16(case):
    exact, rounded = recorded(case), recorded(f"{case}_bf16")
    pipeline, text = golden_pipeline(case, torch.bfloat16)
    bits = [exact[f"scale{i:02d}.bits"] for i in range(NUM_LEVELS)]
    run = pipeline.generate(text, seed=0, forced_bits=bits, with_trace=True)
    ours, theirs = 0.0, 0.0
    for i, logits_BLQ2 in enumerate(run.trace.logits):
        reference = rounded[f"autocast_blocks_bf16.scale{i:02d}.logits"]
        ours += (logits_BLQ2.flatten(2) - reference).square().sum().item()
        theirs += (exact[f"scale{i:02d}.logits"] - reference).square().sum().item()
    assert ours**0.5 <= 1.5 * theirs**0.5
