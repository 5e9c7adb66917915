"""Streamed calibration: every linear sees what it sees while images are generated.

Shapes: R rows, L tokens, K input channels, M = R*L tokens of a call.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from tiny import random_text, tiny_pipeline
from var_compressor.layers.kv_cache import PlainCache
from var_compressor.models.sampling import Sampling
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.calibration import (
    BlockStream,
    CalibrationTrace,
    InputStats,
    Recording,
    observed_inputs,
    record_trace,
)
from var_compressor.quant.ptq import one_layer_cache
from var_compressor.spec import MODULES

TEXTS = [random_text((4,), seed=1), random_text((9,), seed=2)]


def generation_inputs(pipeline, text, sampling, aspect_ratio):
    """Bits of one generation, and the inputs of every linear in the order they were seen."""
    seen = defaultdict(list)

    def hook_for(name):
        return lambda module, inputs: seen[name].append(inputs[0].flatten(0, 1).clone())

    handles = [
        module.register_forward_pre_hook(hook_for(name))
        for name, module in pipeline.transformer.blocks.named_modules()
        if isinstance(module, nn.Linear)
    ]
    run = pipeline.generate(
        text, seed=5, sampling=sampling, aspect_ratio=aspect_ratio, with_trace=True
    )
    for handle in handles:
        handle.remove()
    return run.trace.bits, seen


@pytest.mark.parametrize("patchify", [False, True])
@pytest.mark.parametrize("aspect_ratio", [1.0, 0.5])
@pytest.mark.parametrize("cfg", [1.0, 3.0, (1.0, 2.0, 3.0, 1.0, 4.0, 0.5, 3.0)])
def test_streamed_inputs_equal_those_of_generation(patchify, aspect_ratio, cfg):
    pipeline = tiny_pipeline(patchify=patchify)
    sampling = Sampling(cfg=cfg, tau=0.7)
    recordings, wanted = [], []
    for text in TEXTS:
        bits, seen = generation_inputs(pipeline, text, sampling, aspect_ratio)
        recordings.append(Recording(text, tuple(bits)))
        wanted.append(seen)
    schedule = pipeline.schedule_for(aspect_ratio, None)
    stream = BlockStream(pipeline, CalibrationTrace(tuple(recordings), schedule, cfg != 1.0))
    new_cache = one_layer_cache(pipeline, schedule)
    for index, block in enumerate(pipeline.transformer.blocks):
        found = defaultdict(list)
        with torch.inference_mode():
            stream.run(
                block,
                new_cache,
                observe=lambda name, x, found=found: found[name].append(x),
                names=MODULES,
            )
        assert found.keys() == set(MODULES)
        for name, calls in found.items():
            expected = [x for seen in wanted for x in seen[f"{index}.{name}"]]
            # one call a level, or one an image for the text
            assert len(calls) == len(TEXTS) * (1 if name == "cross_attn.kv" else 7)
            for ours, theirs in zip(calls, expected, strict=True):
                assert ours.shape == theirs.shape
                assert (ours - theirs).abs().max() <= 3e-6 * theirs.abs().max(), (index, name)


def test_the_last_output_is_what_the_head_reads():
    """Streaming all blocks gives the hidden states of one teacher-forced forward."""
    pipeline, text = tiny_pipeline(), TEXTS[0]
    run = pipeline.generate(text, seed=0, sampling=Sampling(tau=1.0), with_trace=True)
    recording = Recording(text, tuple(run.trace.bits))
    schedule = pipeline.schedule_for(1.0, None)
    with torch.inference_mode():
        stream = BlockStream(pipeline, CalibrationTrace((recording,), schedule, True))
        for block in pipeline.transformer.blocks:
            stream.run(block, one_layer_cache(pipeline, schedule))
        logits = pipeline.guided_logits(stream.hidden[0], stream.contexts[0], 3.0)
    sizes = [level.num_tokens for level in schedule.levels]
    for ours, theirs in zip(logits.split(sizes, 1), run.trace.logits, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_a_trace_is_what_generate_draws(model_dir):
    pipeline = InfinityPipeline.from_pretrained(model_dir, dtype=torch.float32)
    prompts, sampling = ["a red cat", "a", "cat cat cat"], Sampling(cfg=2.0, tau=0.7)
    done = []
    trace = record_trace(
        pipeline,
        prompts,
        seed=11,
        sampling=sampling,
        aspect_ratio=0.5,
        pixel_budget=None,
        on_progress=lambda *step: done.append(step),
    )
    assert trace.guided and done == [("recording", i, 3) for i in (1, 2, 3)]
    for i, (prompt, recording) in enumerate(zip(prompts, trace.recordings, strict=True)):
        run = pipeline.generate(
            [prompt], seed=11 + i, sampling=sampling, aspect_ratio=0.5, with_trace=True
        )
        for ours, theirs in zip(recording.bits, run.trace.bits, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("changes", [{"cfg_layers": (-1,)}, {"num_levels": 3}])
def test_what_a_stream_cannot_repeat_is_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        record_trace(
            tiny_pipeline(),
            ["a"],
            seed=0,
            sampling=Sampling(**changes),
            aspect_ratio=1.0,
            pixel_budget=None,
            on_progress=lambda *step: None,
        )


def test_hooks_are_gone_afterwards_even_after_an_error():
    block = tiny_pipeline().transformer.blocks[0]
    for error in (None, RuntimeError):
        with ExitStack() as stack:
            if error is not None:
                stack.enter_context(pytest.raises(error))
            with observed_inputs(block, MODULES, lambda name, x: None):
                assert block.ffn.fc1._forward_pre_hooks
                if error is not None:
                    raise error
        assert not any(module._forward_pre_hooks for module in block.modules())


# --- statistics ----------------------------------------------------------------------------------


def add_all(calls, *, sample_per_call, seed):
    stats = InputStats(sample_per_call, torch.Generator().manual_seed(seed))
    for x_MK in calls:
        stats.add(x_MK)
    return stats


def test_stats_see_every_token_and_keep_a_bounded_reproducible_sample():
    rng = torch.Generator().manual_seed(0)
    calls = [torch.randn(M, 8, generator=rng) for M in (1, 3, 10, 200, 10)]
    # a single token far out, which a sample would most likely miss
    calls[3][137, 2] = -1000
    stats = add_all(calls, sample_per_call=10, seed=4)
    everything = torch.cat(calls)
    assert torch.equal(stats.absmax_K, everything.abs().amax(0))
    assert stats.num_tokens == len(everything) == 224
    assert len(stats.x_TK) == 1 + 3 + 10 + 10 + 10
    rows = {tuple(row) for row in everything.tolist()}
    assert {tuple(row) for row in stats.x_TK.tolist()} <= rows
    # drawn without repeats
    assert len(stats.x_TK.unique(dim=0)) == len(stats.x_TK)
    again, other = (add_all(calls, sample_per_call=10, seed=s).x_TK for s in (4, 5))
    assert torch.equal(stats.x_TK, again) and not torch.equal(stats.x_TK, other)


def test_stats_of_bf16_inputs_are_float32_and_exact():
    x_MK = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    stats = add_all([x_MK], sample_per_call=9, seed=0)
    assert stats.x_TK.dtype == stats.absmax_K.dtype == torch.float32
    assert torch.equal(stats.x_TK, x_MK.float())


def test_one_layer_caches_hand_over_what_they_store():
    pipeline = tiny_pipeline()
    schedule = pipeline.schedule_for(1.0, None)
    kept = []
    cache = one_layer_cache(pipeline, schedule, keep=lambda k, v: kept.append((k, v)))(2)
    config = pipeline.transformer.config
    shape = (2, config.num_heads, schedule.num_tokens, config.head_dim)
    q, k, v = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(3))
    plain = PlainCache(config, schedule, rows=2, dtype=torch.float32, device="cpu")
    ours, theirs = (one.attend(0, schedule.levels, q, k, v) for one in (cache, plain))
    assert torch.equal(ours, theirs)
    for i, stored in enumerate((k, v)):
        parts = torch.cat([pair[i] for pair in kept], dim=2)
        assert torch.equal(parts, stored[:, :, : schedule.num_cached_tokens])
