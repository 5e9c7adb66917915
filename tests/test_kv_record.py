"""What a layer's attention reads, sampled while recordings stream, and what a cache does to it.

Against real generations: a cache that keeps everything, and attention written out in float64.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tiny import COLLECTION, random_text, tiny_pipeline
from var_compressor.layers.kv_cache import CodedCache, PlainCache
from var_compressor.layers.kv_params import CacheFormat, CacheParams, LayerParams, whole_layer
from var_compressor.models.sampling import Sampling
from var_compressor.models.transformer import TextFeatures
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.activations import MemoryBounds, activation_store
from var_compressor.quant.calibration import BlockStream, CalibrationTrace, Recording
from var_compressor.quant.kv_calibration import calibrate_kv, find_ranges, params_of, record_layer
from var_compressor.quant.kv_measure import cache_noise
from var_compressor.quant.kv_record import RecordPlan
from var_compressor.spec import KVSpec

SAMPLING = Sampling(cfg=2.0, tau=0.7)


class Everything(PlainCache):
    """Keeps all that attention gets, by layer."""

    seen: dict

    def attend_level(self, layer, level, q, k, v):
        self.seen.setdefault(layer, []).append((level, q.clone(), k.clone(), v.clone()))
        return super().attend_level(layer, level, q, k, v)


@pytest.fixture(scope="module")
def generations():
    """Two generations of a random model: the pipeline, a trace, and all q, k, v by recording."""
    pipeline = tiny_pipeline()
    schedule = pipeline.schedule_for(1.0, None)
    recordings, seen = [], []
    for i in range(2):
        found = {}

        def new_cache(schedule, *, rows, found=found):
            config = pipeline.transformer.config
            cache = Everything(config, schedule, rows=rows, dtype=torch.float32, device="cpu")
            cache.seen = found
            return cache

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(pipeline, "new_cache", new_cache)
            text = random_text((5 + i,), seed=i)
            run = pipeline.generate(text, seed=i, sampling=SAMPLING, with_trace=True)
        recordings.append(Recording(TextFeatures(text.packed_TE, text.lens), tuple(run.trace.bits)))
        seen.append(found)
    return pipeline, CalibrationTrace(tuple(recordings), schedule, True), seen


def records(pipeline, trace, tmp_path, *, max_tokens_per_level):
    plan = RecordPlan.of(
        trace, max_tokens_per_level=max_tokens_per_level, seed=0, device=pipeline.device
    )
    with activation_store(pipeline.device, MemoryBounds(), tmp_path) as store:
        stream = BlockStream.of_trace(pipeline, trace, store, range(len(trace.recordings)))
        found = [
            record_layer(pipeline, stream, block, plan) for block in pipeline.transformer.blocks
        ]
    return plan, found


def whole(found, layer, part):
    """All levels' q, k or v of one recording, ``[R, H, L, D]``."""
    return torch.cat([step[part] for step in found[layer]], dim=2)


def test_samples_weights_and_masses_are_those_of_real_generations(generations, tmp_path):
    pipeline, trace, seen = generations
    schedule = trace.schedule
    plan, found = records(pipeline, trace, tmp_path, max_tokens_per_level=40)
    # 2 recordings x 2 rows share 40 tokens of a level
    sizes = [min(10, level.num_tokens) for level in schedule.levels[:-1]]
    for layer, record in enumerate(found):
        k_parts, v_parts, weights, masses = [], [], [], []
        for i, recording in enumerate(seen):
            q, k, v = (whole(recording, layer, part).double() for part in (1, 2, 3))
            tokens = plan.tokens[i]
            assert len(tokens) == sum(sizes) and tokens.max() < schedule.num_cached_tokens
            read, mass = torch.zeros(k.shape[:3]).double(), torch.zeros(2, 2, 7).double()
            for level in schedule.levels[1:]:
                positions = level.offset + plan.queries[level.index]
                probs = (q[:, :, positions] @ k[:, :, : level.end].mT).softmax(-1)
                past = probs[..., : level.offset]
                read[..., : level.offset] += past.mean(2)
                for other in schedule.levels[: level.index]:
                    part = past[..., other.offset : other.end]
                    mass[..., other.index] += part.sum(-1).mean(2) / 6
            stands_for = torch.cat(
                [
                    torch.full((level.num_tokens,), max(1.0, level.num_tokens / 10))
                    for level in schedule.levels
                ]
            )
            k_parts += [k[row][:, tokens] for row in range(2)]
            v_parts += [v[row][:, tokens] for row in range(2)]
            weights += [(read * stands_for)[row][:, tokens] for row in range(2)]
            masses.append(mass.mean(0))
        for got, parts in (
            (record.k_HTD, k_parts),
            (record.v_HTD, v_parts),
            (record.weight_HT, weights),
        ):
            wanted = torch.cat(parts, dim=1)
            torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-5)
        wanted = torch.stack(masses).mean(0)
        torch.testing.assert_close(record.mass_HS.double(), wanted, rtol=1e-3, atol=1e-6)
        assert wanted.sum(1).max() < 1 and not wanted[:, -1].any()


@pytest.mark.parametrize(
    ("format", "nbits"),
    [
        (CacheFormat("int8", False, 0), 8),
        (CacheFormat("int4", False, 2), 4),
        (CacheFormat("int4", True, 0), 4),
        (CacheFormat("fp8", False, 0), 8),
    ],
)
def test_noise_is_what_the_cache_does_to_the_output(generations, tmp_path, format, nbits):
    """With all queries of all rows, the measured shares are those of the real cache."""
    pipeline, trace, seen = generations
    schedule, config = trace.schedule, pipeline.transformer.config
    plan, found = records(pipeline, trace, tmp_path, max_tokens_per_level=1000)
    spec = KVSpec(format.name, dynamic=format.dynamic, plain_levels=format.plain_levels)
    record = found[1]
    params = None if format.dynamic else params_of(find_ranges(record, spec, nbits=nbits))
    layer = whole_layer(params, nbits=nbits, num_heads=config.num_heads)
    noise = cache_noise(record.probe, layer, format, config, schedule)

    signal, error = torch.zeros(2).double(), torch.zeros(2).double()
    for recording in seen:
        coded = CodedCache(config, schedule, CacheParams(format, (layer,)), rows=2, device="cpu")
        plain = PlainCache(config, schedule, rows=2, dtype=torch.float32, device="cpu")
        for level, q, k, v in recording[1]:
            coded_o, plain_o = (c.attend(0, (level,), q, k, v).double() for c in (coded, plain))
            positions = plan.queries[level.index]
            if level.index > 0:
                signal += plain_o[:, :, positions].square().mean(dim=(0, 2, 3))
                error += (coded_o - plain_o)[:, :, positions].square().mean(dim=(0, 2, 3))
    wanted_H = error / signal.sum()
    torch.testing.assert_close(noise.share_H, wanted_H, rtol=0.02, atol=0)
    # to first order the errors of keys and of values add up
    parts = sum(10 ** (-db / 10) for db in (noise.k_output_snr_db, noise.v_output_snr_db))
    assert parts == pytest.approx(float(wanted_H.sum()), rel=0.35)


def test_weighing_by_attention_lowers_the_output_error(generations, tmp_path):
    pipeline, trace, _ = generations
    config = pipeline.transformer.config
    _, found = records(pipeline, trace, tmp_path, max_tokens_per_level=1000)
    shares = {"none": 0.0, "attention": 0.0}
    for record in found:
        for weighting in shares:
            spec = KVSpec("int4", weighting=weighting)
            layer = whole_layer(params_of(find_ranges(record, spec, nbits=4)), nbits=4, num_heads=2)
            format = CacheFormat("int4", False, 0)
            noise = cache_noise(record.probe, layer, format, config, trace.schedule)
            shares[weighting] += float(noise.share_H.sum())
    assert shares["attention"] < 0.9 * shares["none"]


def test_calibration_takes_all_prompts_both_rows_and_is_repeatable(model_dir):
    pipeline = InfinityPipeline.from_pretrained(model_dir, dtype=torch.float32)
    spec = KVSpec("int4", max_tokens_per_level=16)
    runs = [calibrate_kv(pipeline, COLLECTION, spec) for _ in range(2)]
    # 2 prompts x 2 rows share 16 tokens of each of 6 levels: 1, then 4 of each
    assert runs[0].kv["layers"][0]["num_tokens"] == 2 * 2 * (1 + 5 * 4)
    assert runs[0].kv == runs[1].kv
    one_row = replace(COLLECTION, sampling=Sampling(cfg=1.0, tau=0.7))
    alone = calibrate_kv(pipeline, one_row, spec)
    assert alone.kv["layers"][0]["num_tokens"] == 2 * (1 + 4 + 4 * 8)
    assert 2 * alone.kv["bytes_per_image"] == runs[0].kv["bytes_per_image"]
    layers = zip(runs[0].params.layers, runs[1].params.layers, strict=True)
    for ours, theirs in layers:
        assert isinstance(ours, LayerParams)
        pairs = zip(vars(ours.ranges).values(), vars(theirs.ranges).values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
