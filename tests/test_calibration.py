"""Streamed calibration: every linear sees what it sees while images are generated.

Shapes: R rows, L tokens, K input channels, M = R*L tokens of a call.
"""

from __future__ import annotations

import errno
import os
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import nn

from tiny import random_text, tiny_pipeline
from var_compressor.artifact import ArtifactError
from var_compressor.layers.kv_cache import PlainCache
from var_compressor.models.sampling import Sampling
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.activations import (
    ActivationStore,
    MemoryBounds,
    activation_store,
    parse_bytes,
)
from var_compressor.quant.calibration import (
    BlockStream,
    CalibrationTrace,
    Recording,
    TokenSample,
    collect_inputs,
    observed_inputs,
    one_layer_cache,
)
from var_compressor.quant.inputs import rows_kept_whole
from var_compressor.quant.recording import (
    Collection,
    check_recordable,
    read_trace,
    record,
    write_trace,
)
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


@contextmanager
def stream_of(pipeline, trace):
    """All recordings, before the first block."""
    with (
        torch.inference_mode(),
        TemporaryDirectory() as folder,
        activation_store(pipeline.device, MemoryBounds(), Path(folder)) as store,
    ):
        everyone = range(len(trace.recordings))
        yield BlockStream.of_trace(pipeline, trace, store, everyone)


@pytest.mark.parametrize("patchify", [False, True])
@pytest.mark.parametrize("aspect_ratio", [1.0, 0.5])
@pytest.mark.parametrize("cfg", [1.0, 3.0, (1.0, 2.0, 3.0, 1.0, 4.0, 0.5, 3.0)])
def test_streamed_inputs_equal_those_of_generation(patchify, aspect_ratio, cfg):
    pipeline = tiny_pipeline(patchify=patchify)
    sampling = Sampling(cfg=cfg, tau=0.7)
    recordings, wanted = [], []
    for text in TEXTS:
        bits, seen = generation_inputs(pipeline, text, sampling, aspect_ratio)
        recordings.append(Recording(text, tuple(bits[:-1])))
        wanted.append(seen)
    schedule = pipeline.schedule_for(aspect_ratio, None)
    trace = CalibrationTrace(tuple(recordings), schedule, cfg != 1.0)
    new_cache, sizes = one_layer_cache(pipeline, schedule), [v.num_tokens for v in schedule.levels]
    with stream_of(pipeline, trace) as stream:
        for index, block in enumerate(pipeline.transformer.blocks):
            found = {}
            stream.run(
                block,
                new_cache,
                schedule.levels,
                observe=lambda i, name, x, found=found: found.update({(i, name): x}),
                names=MODULES,
            )
            assert len(found) == len(TEXTS) * len(MODULES)
            for (i, name), x_RLK in found.items():
                is_text = name == "cross_attn.kv"
                calls = [x_RLK] if is_text else x_RLK.split(sizes, dim=1)
                expected = wanted[i][f"{index}.{name}"]
                for ours, theirs in zip(calls, expected, strict=True):
                    ours = ours.flatten(0, 1)
                    assert ours.shape == theirs.shape
                    assert (ours - theirs).abs().max() <= 3e-6 * theirs.abs().max(), (index, name)


def test_the_last_output_is_what_the_head_reads():
    """Streaming all blocks gives the hidden states of one teacher-forced forward."""
    pipeline, text = tiny_pipeline(), TEXTS[0]
    run = pipeline.generate(text, seed=0, sampling=Sampling(tau=1.0), with_trace=True)
    recording = Recording(text, tuple(run.trace.bits))
    schedule = pipeline.schedule_for(1.0, None)
    with stream_of(pipeline, CalibrationTrace((recording,), schedule, True)) as stream:
        for block in pipeline.transformer.blocks:
            stream.run(block, one_layer_cache(pipeline, schedule), schedule.levels)
        logits = pipeline.transformer.guided_logits(stream.store.get(0), stream.contexts[0], 3.0)
    sizes = [level.num_tokens for level in schedule.levels]
    for ours, theirs in zip(logits.split(sizes, 1), run.trace.logits, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("stream_blocks", [False, True])
def test_a_trace_is_what_generate_draws(model_dir, tmp_path, stream_blocks):
    """Level by level through one block after the other, read from their files or in memory."""
    whole = InfinityPipeline.from_pretrained(model_dir, dtype=torch.float32)
    pipeline = InfinityPipeline.from_pretrained(
        model_dir, dtype=torch.float32, stream_blocks=stream_blocks
    )
    prompts, sampling = ["a red cat", "a", "cat cat cat"], Sampling(cfg=2.0, tau=0.7)
    collection = Collection(dict(zip("abc", prompts, strict=True)), 11, sampling, 0.5)
    done = []
    with activation_store(pipeline.device, MemoryBounds(), tmp_path) as store:
        trace = record(pipeline, collection, store, on_progress=lambda *step: done.append(step))
    assert trace.guided and done[-1] == ("recording", 18, 18)
    for i, (prompt, recording) in enumerate(zip(prompts, trace.recordings, strict=True)):
        run = whole.generate(
            [prompt], seed=11 + i, sampling=sampling, aspect_ratio=0.5, with_trace=True
        )
        # nothing reads the bits of the last level
        for ours, theirs in zip(recording.bits, run.trace.bits[:-1], strict=True):
            assert torch.equal(ours, theirs)


def test_a_trace_comes_back_from_its_file_and_a_damaged_one_is_refused(tmp_path):
    pipeline = tiny_pipeline()
    schedule = pipeline.schedule_for(1.0, None)
    recordings = []
    for i, text in enumerate(TEXTS):
        run = pipeline.generate(text, seed=i, with_trace=True)
        recordings.append(Recording(text, tuple(run.trace.bits[:-1])))
    path = tmp_path / "trace.safetensors"
    write_trace(path, CalibrationTrace(tuple(recordings), schedule, True))
    found = read_trace(path, schedule, guided=True)
    for ours, theirs in zip(found.recordings, recordings, strict=True):
        assert torch.equal(ours.text.packed_TE, theirs.text.packed_TE)
        assert ours.text.lens == theirs.text.lens
        assert all(torch.equal(a, b) for a, b in zip(ours.bits, theirs.bits, strict=True))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ArtifactError, match=r"trace\.safetensors: not a readable"):
        read_trace(path, schedule, guided=True)


@pytest.mark.parametrize("changes", [{"cfg_layers": (-1,)}, {"num_levels": 3}])
def test_what_a_stream_cannot_repeat_is_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        check_recordable(Sampling(**changes))


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


# --- what is kept --------------------------------------------------------------------------------


def test_samples_are_spread_over_levels_and_rows_and_ranges_see_every_token():
    pipeline = tiny_pipeline()
    schedule = pipeline.schedule_for(1.0, None)
    recordings = []
    for i, text in enumerate(TEXTS):
        run = pipeline.generate(text, seed=i, with_trace=True)
        recordings.append(Recording(text, tuple(run.trace.bits)))
    trace = CalibrationTrace(tuple(recordings), schedule, True)
    sample = TokenSample.of(trace, max_tokens_per_level=80, seed=4)
    again, other = (TokenSample.of(trace, max_tokens_per_level=80, seed=s) for s in (4, 5))
    block, whole = pipeline.transformer.blocks[0], {}
    # 80 tokens a level are 20 of each of the 4 rows
    for tokens_S, repeated_S, other_S in zip(
        sample.tokens, again.tokens, other.tokens, strict=True
    ):
        assert torch.equal(tokens_S, repeated_S) and not torch.equal(tokens_S, other_S)
        assert len(tokens_S.unique()) == len(tokens_S)
        for level in schedule.levels:
            here = int(((tokens_S >= level.offset) & (tokens_S < level.end)).sum())
            assert here == min(20, level.num_tokens)
    with stream_of(pipeline, trace) as stream:
        found = collect_inputs(
            stream,
            block,
            one_layer_cache(pipeline, schedule),
            schedule.levels,
            names=MODULES,
            sample=sample,
            whole_rows={1: [0]},
            keep_output=False,
        )
        stream.run(
            block,
            one_layer_cache(pipeline, schedule),
            schedule.levels,
            observe=lambda i, name, x: whole.update({(i, name): x}),
            names=MODULES,
        )
    for (i, name), x_RLK in whole.items():
        x_MK = x_RLK.flatten(0, 1)
        assert torch.equal(found[i].highest[name], x_MK.amax(0))
        assert torch.equal(found[i].lowest[name], x_MK.amin(0))
        kept = x_RLK if name == "cross_attn.kv" else x_RLK[:, sample.tokens[i]]
        assert torch.equal(found[i].samples[name], kept.flatten(0, 1))
    assert found[0].rows == {}
    assert torch.equal(found[1].rows[0], whole[1, "self_attn.qkv"][0])


def test_every_row_is_kept_whole_in_its_turn():
    """One row a block where no more fit, several where they do, all rows over the blocks."""
    sizes = {"num_recordings": 3, "num_rows": 2, "tokens_per_row": 500}
    one = [rows_kept_whole(block, **sizes, max_tokens=499) for block in range(6)]
    assert one == [{0: [0]}, {0: [1]}, {1: [0]}, {1: [1]}, {2: [0]}, {2: [1]}]
    four = [rows_kept_whole(block, **sizes, max_tokens=2000) for block in range(2)]
    assert four == [{0: [0, 1], 1: [0, 1]}, {2: [0, 1], 0: [0, 1]}]
    everything = rows_kept_whole(1, **sizes, max_tokens=10**9)
    assert everything == {0: [0, 1], 1: [0, 1], 2: [0, 1]}


@pytest.mark.parametrize("bounds", [(10**9, 10**9), (0, 10**9), (4000, 4000), (0, 0)])
def test_a_store_gives_back_what_it_got_wherever_it_lies(tmp_path, bounds):
    rng = torch.Generator().manual_seed(0)
    store = ActivationStore(torch.device("cpu"), MemoryBounds(*bounds), tmp_path)
    tensors = {i: torch.randn(2, 5 + i, 64, generator=rng) for i in range(4)}
    for _ in range(2):
        for i, x in tensors.items():
            store.put(i, x.clone())
        assert all(torch.equal(store.get(i), x) for i, x in tensors.items())
        # the next round has other shapes, as levels are added
        tensors = {i: torch.randn(2, 9 + i, 64, generator=rng) for i in range(4)}
    held = sum(store.get(i).nbytes for i, place in store.places.items() if place != "disk")
    assert held <= bounds[1]
    on_disk = [path for path in tmp_path.iterdir() if path.stat().st_size]
    assert len(on_disk) == sum(place == "disk" for place in store.places.values())
    store.close()
    assert not any(tmp_path.iterdir())


def test_a_full_disk_is_an_error_that_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    x = torch.ones(3, 4)
    with (
        pytest.raises(OSError, match="No space left"),
        activation_store(torch.device("cpu"), MemoryBounds(ram_bytes=50), tmp_path) as store,
    ):
        store.put(0, x)
        monkeypatch.setattr(os, "posix_fallocate", full)
        store.put(1, x)
    assert not any(tmp_path.iterdir())


def test_sizes_are_read_as_people_write_them():
    sizes = {"4GiB": 2**32, "512 MiB": 2**29, "1.5g": 3 * 2**29, "7": 7, "2KB": 2048}
    assert {text: parse_bytes(text) for text in sizes} == sizes
    for text in ("", "GiB", "-1", "4 apples", "1e9"):
        with pytest.raises(ValueError, match="is no size; write it like 4GiB"):
            parse_bytes(text)


def test_one_layer_caches_show_every_level():
    pipeline = tiny_pipeline()
    schedule = pipeline.schedule_for(1.0, None)
    seen = []
    cache = one_layer_cache(pipeline, schedule, observe=lambda *args: seen.append(args))(2)
    config = pipeline.transformer.config
    shape = (2, config.num_heads, schedule.num_tokens, config.head_dim)
    q, k, v = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(3))
    plain = PlainCache(config, schedule, rows=2, dtype=torch.float32, device="cpu")
    ours, theirs = (one.attend(0, schedule.levels, q, k, v) for one in (cache, plain))
    assert torch.equal(ours, theirs)
    levels, *parts = zip(*seen, strict=True)
    assert levels == schedule.levels
    for part, whole in zip(parts, (q, k, v), strict=True):
        assert torch.equal(torch.cat(part, dim=2), whole)
