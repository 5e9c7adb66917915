"""Predicted bytes against real modules and caches, and what is chosen for a budget."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from var_compressor.cli import app
from var_compressor.devices import CONTEXT_BYTES, DEVICES, GIB, smallest_device, usable_bytes
from var_compressor.footprint import (
    WEIGHTS,
    FastLevel,
    Request,
    Setup,
    footprint,
    kv_bytes,
    plain_level_bytes,
    transformer_bytes,
    vae_bytes,
    vae_scratch_bytes,
)
from var_compressor.layers.kv_cache import PlainCache
from var_compressor.layers.linear import linear_specs, swap_linears
from var_compressor.live_bytes import peak_live_bytes
from var_compressor.models.config import MODELS
from var_compressor.models.directory import meta_transformer
from var_compressor.models.sampling import Sampling
from var_compressor.models.schedule import Schedule
from var_compressor.models.vae import VAE
from var_compressor.pipeline import InfinityPipeline
from var_compressor.planning import STRIPS, TEXT_PLACES, model_shape, plan_memory, setups
from var_compressor.quant.plan import plan

MODEL_8B = model_shape("infinity-8b")


def request_of(model, batch=1, aspect_ratio=1.0, prompt_tokens=64) -> Request:
    schedule = Schedule.of(aspect_ratio, model.transformer.pixel_budget)
    return Request(schedule, batch, prompt_tokens)


# --- what stays is exact --------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", ["infinity-tiny", "infinity-2b", "infinity-8b"])
def test_the_parts_of_a_transformer_add_up_to_its_tensors(name, weights):
    config, spec = MODELS[name].transformer, WEIGHTS[weights]
    model = meta_transformer(config, torch.bfloat16)
    if spec is not None:
        for index, block in enumerate(model.blocks):
            swap_linears(block, linear_specs(spec, block, index))
        assert sum(transformer_bytes(config, spec).values()) == plan(spec, config).after_bytes
    tensors = model.state_dict()
    parts = transformer_bytes(config, spec)
    assert sum(parts.values()) == sum(tensor.nbytes for tensor in tensors.values())
    text = {n: t.nbytes for n, t in tensors.items() if ".cross_attn.kv." in n}
    assert parts["weights for the text"] == sum(text.values())
    branch = [t.nbytes for n, t in tensors.items() if ".proj_" in n and n not in text]
    assert parts.get("low-rank branch", 0) == sum(branch)
    outside = [t.nbytes for n, t in tensors.items() if not n.startswith("blocks.")]
    assert parts["outside the blocks"] == sum(outside)


def test_unpacked_weights_take_a_byte_each():
    config, spec = MODELS["infinity-2b"].transformer, WEIGHTS["w4a4"]
    packed, unpacked = (transformer_bytes(config, spec, unpacks=one) for one in (False, True))
    C, F = config.embed_dim, config.ffn_dim
    shapes = [(3 * C, C), (C, C), (C, C), (C, C), (F, C), (C, F)]
    # a byte per weight, a float32 scale per row, smoothing and its reciprocal; biases are as before
    one_block = sum(N * K + 4 * N + 8 * K for N, K in shapes)
    plain = ("biases and norms", "outside the blocks", "weights for the text")
    found = sum(unpacked.values()) - sum(unpacked[part] for part in plain)
    assert found == config.depth * one_block
    assert [unpacked[p] for p in plain[:2]] == [packed[p] for p in plain[:2]]
    N, K = 2 * C, C
    assert unpacked[plain[2]] - packed[plain[2]] > config.depth * (N * K // 2 - 200 * (N + K))


@pytest.mark.parametrize("kv", ["bf16", "int8", "int4"])
def test_the_bytes_of_a_cache_are_those_it_allocates(kv):
    model = model_shape("infinity-2b")
    request = request_of(model, batch=2)
    found = kv_bytes(model, request, Setup("w4a4", kv, 16, False, None, None))
    config, tokens = model.transformer, request.schedule.num_cached_tokens
    values = 2 * config.depth * 4 * tokens * config.embed_dim
    ranges = 0 if kv == "bf16" else 6 * config.depth * config.embed_dim * 4
    assert found == values * {"bf16": 16, "int8": 8, "int4": 4}[kv] // 8 + ranges


def test_a_stored_cache_counts_as_its_parameters_say(kv_artifact_dir):
    shape = model_shape(str(kv_artifact_dir))
    request = Request(Schedule.of(1.0, "0.06M"), 1, 8)
    pipeline = InfinityPipeline.from_pretrained(kv_artifact_dir, dtype=torch.float32)
    setup = next(setups(shape, budget_bytes=0))
    assert (setup.weights, setup.kv) == ("stored", "stored")
    cache = pipeline.new_cache(request.schedule, rows=2)
    ranges = [t for layer in pipeline.kv_params.layers for t in vars(layer.ranges).values()]
    # keys and values have an offset each beside what the file holds
    expected = cache.num_bytes + sum(t.nbytes for t in ranges) * 6 // 4
    assert kv_bytes(shape, request, setup) == expected
    stored = InfinityPipeline.from_pretrained(kv_artifact_dir, dtype=torch.bfloat16)
    held = transformer_bytes(shape.transformer, shape.spec)
    tensors = stored.transformer.state_dict().values()
    assert sum(held.values()) == sum(tensor.nbytes for tensor in tensors)


# --- what a stage allocates -----------------------------------------------------------------------


def test_live_bytes_are_those_that_live_together():
    def compute():
        one = torch.empty(1000, dtype=torch.uint8)
        two = one + 1
        del one
        # a view and a product in place take nothing
        two.view(10, 100).mul_(2)
        return torch.cat([two, two])

    assert peak_live_bytes(compute, conv_workspace=0) == 3000


def test_a_plain_level_takes_what_a_real_draw_holds():
    """The whole of `draw`, on a CPU with real numbers, beside the prediction of one level."""
    pipeline = InfinityPipeline.from_pretrained("infinity-tiny", dtype=torch.bfloat16)
    model = model_shape("infinity-tiny")
    text = pipeline.encode(["a red cube"])
    request = request_of(model, prompt_tokens=text.lens[0])
    schedule, real = request.schedule, pipeline.transformer
    cache = PlainCache(real.config, schedule, rows=2, dtype=torch.bfloat16, device="cpu")
    pipeline.new_cache = lambda schedule, rows: cache
    measured = peak_live_bytes(
        lambda: pipeline.draw(text, schedule, seed=0, sampling=Sampling()), conv_workspace=0
    )
    setup = Setup("bf16", "bf16", 16, False, None, None)
    stage = footprint(model, request, setup).stages["draw"]
    predicted = stage["level activations"] + stage["text keys and values"]
    assert abs(predicted / measured - 1) < 0.05


def test_strips_hold_less_and_batches_in_strips_hold_no_more():
    config = MODELS["infinity-2b"].vae
    one, two = (request_of(model_shape("infinity-2b"), batch) for batch in (1, 2))
    peaks = [vae_scratch_bytes(config, one, rows) for rows in STRIPS]
    assert peaks == sorted(peaks, reverse=True)
    image_bytes = 4 * 3 * 1024 * 1024
    # input and output of the widest block: 256 and 128 channels at 1024 x 1024, bf16
    floor = (256 + 128) * 1024 * 1024 * 2
    assert floor < peaks[-1] < floor * 1.1
    assert vae_scratch_bytes(config, two, 32) - vae_scratch_bytes(config, one, 32) < 4 * image_bytes
    assert vae_scratch_bytes(config, two, None) > 1.9 * vae_scratch_bytes(config, one, None)


@pytest.mark.parametrize(("strip_rows", "batch"), [(None, 1), (8, 1), (None, 2), (8, 3)])
def test_a_vae_without_storage_takes_what_a_real_one_does(strip_rows, batch):
    config = MODELS["infinity-tiny"].vae
    request = request_of(model_shape("infinity-tiny"), batch)
    vae = VAE(config).bfloat16()
    size = [pixels // 16 for pixels in request.schedule.image_size]
    latent = torch.randn(batch, config.code_dim, *size)
    real = peak_live_bytes(lambda: vae.decode(latent, strip_rows=strip_rows), conv_workspace=1)
    assert abs(vae_scratch_bytes(config, request, strip_rows) / (real + latent.nbytes) - 1) < 0.03


def test_smaller_steps_of_the_feed_forward_stop_mattering_at_attention():
    request = request_of(MODEL_8B)
    config, chunks = MODEL_8B.transformer, (None, 4096, 512)
    levels = [FastLevel(config, request, chunk, 32, unpacks=False) for chunk in chunks]
    steps = [level.steps() for level in levels]
    assert max(steps[0], key=lambda step: steps[0][step]).startswith("feed-forward")
    assert max(steps[2], key=lambda step: steps[2][step]) == "attention"
    assert levels[0].peak_bytes > levels[1].peak_bytes >= levels[2].peak_bytes
    # a whole fused level holds less than one of 16-bit linears
    plain = plain_level_bytes(MODEL_8B.transformer, request, has_codes=True)
    assert levels[0].peak_bytes < plain


# --- what is chosen -------------------------------------------------------------------------------


@pytest.mark.parametrize(("gib", "batch"), [(4, 1), (8, 1), (12, 1), (24, 1), (16, 4)])
def test_the_first_setup_that_fits_is_taken_and_none_before_it_would(gib, batch):
    request, limit = request_of(MODEL_8B, batch), usable_bytes(gib * GIB)
    found = plan_memory(MODEL_8B, request, budget_bytes=gib * GIB)
    if found.missing_bytes:
        peaks = [
            footprint(MODEL_8B, request, one).peak_bytes
            for one in setups(MODEL_8B, budget_bytes=gib * GIB)
        ]
        assert min(peaks) - limit == found.missing_bytes > 0
        return
    assert found.footprint.peak_bytes <= limit
    for better in setups(MODEL_8B, budget_bytes=gib * GIB):
        if better == found.setup:
            break
        assert footprint(MODEL_8B, request, better).peak_bytes > limit


def test_more_memory_never_means_fewer_bits():
    request, rank = request_of(MODEL_8B), {"bf16": 16, "w4a4": 4}
    plans = [plan_memory(MODEL_8B, request, budget_bytes=gib * GIB) for gib in range(8, 40, 4)]
    weights = [rank[one.setup.weights] for one in plans]
    assert weights == sorted(weights)
    assert weights[0] == 4 and weights[-1] == 16
    assert plans[-1].setup.kv == "bf16" and plans[-1].setup.text_bits == 16


def test_a_cache_that_does_not_fit_gets_a_budget_that_does():
    request, gib = request_of(MODEL_8B, batch=2), 9.4
    found = plan_memory(MODEL_8B, request, budget_bytes=int(gib * GIB))
    assert found.setup.kv_budget is not None and found.missing_bytes == 0
    whole = replace(found.setup, kv_budget=None)
    assert footprint(MODEL_8B, request, whole).peak_bytes > usable_bytes(int(gib * GIB))
    assert found.footprint.stages["draw"]["KV cache"] == 2 * found.setup.kv_budget


def test_a_cache_that_is_kept_is_there_at_every_stage():
    request = request_of(MODEL_8B)
    setup = Setup("w4a4", "int8", 16, False, None, None)
    gone, kept = (footprint(MODEL_8B, request, replace(setup, keeps_cache=k)) for k in (0, 1))
    assert kept.stages["draw"] == gone.stages["draw"]
    config = MODEL_8B.transformer
    # keys and values of 40 layers of 64 tokens; what 10,521 tokens of two rows are, in float32
    text_kv = 40 * 2 * 64 * 2 * config.embed_dim * 2
    inputs = 4 * 2 * 10521 * config.embed_dim
    added = gone.stages["draw"]["KV cache"] + text_kv + inputs
    for stage in ("text", "VAE"):
        assert kept.stage_bytes[stage] == gone.stage_bytes[stage] + added


def test_released_and_cached_text_encoders_are_not_there_when_it_draws():
    request = request_of(MODEL_8B)
    stages = {
        place: footprint(MODEL_8B, request, Setup("w4a4", "int8", *place, None, 64)).stage_bytes
        for place in TEXT_PLACES
    }
    assert stages[16, True]["text"] == stages[16, False]["text"] > stages[8, True]["text"]
    assert stages[16, True]["draw"] == stages[None, False]["draw"] < stages[4, False]["draw"]
    encoder = stages[16, False]["VAE"] - stages[16, True]["VAE"]
    assert encoder == 2 * 1_223_527_424
    assert MODEL_8B.vae is not None and vae_bytes(MODEL_8B.vae) < stages[None, False]["VAE"]


def test_the_smallest_device_holds_the_peak_and_a_smaller_one_does_not():
    for peak_bytes in (GIB, 5 * GIB, 7 * GIB, 20 * GIB):
        device = smallest_device(peak_bytes)
        assert device.usable_bytes >= peak_bytes
        smaller = [one for one in DEVICES if one.usable_bytes < device.usable_bytes]
        assert all(one.usable_bytes < peak_bytes for one in smaller)
    assert smallest_device(100 * GIB) is None
    nano = next(one for one in DEVICES if "Nano" in one.name)
    assert nano.usable_bytes < 7.4 * GIB - CONTEXT_BYTES - GIB


def test_the_command_prints_json_last_and_says_what_is_missing(model_dir):
    run = CliRunner().invoke
    words = ["plan", "--model", str(model_dir), "--budget", "2GiB", "--json"]
    done = run(app, words)
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["fits"] and said["setup"]["weights"] == "bf16"
    assert said["peak_bytes"] == max(sum(parts.values()) for parts in said["stages"].values())
    failed = run(app, ["plan", "--model", "infinity-8b", "--budget", "4GiB"])
    assert "lacks" in str(failed.exception) and "bytes" in str(failed.exception)
    unknown = run(app, ["plan", "--model", "infinity-9b", "--budget", "4GiB"])
    assert "infinity-9b: no such directory, and no preset" in str(unknown.exception)
