"""Graphs of levels, with a recorder of torch's operations in place of CUDA's."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from tiny import random_text, tiny_pipeline
from var_compressor.layers.level_graphs import LevelGraphs, _recording_stream, padded
from var_compressor.layers.level_logits import LevelLogits
from var_compressor.models.sampling import Sampling

SAMPLING = Sampling(cfg=2.0, tau=0.7)


class RecordedGraph(TorchDispatchMode):
    """Repeats what was done inside of it, on the same tensors, as a CUDA graph does."""

    num_replays = 0

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, result))
        return result

    def replay(self):
        RecordedGraph.num_replays += 1
        for func, args, kwargs, result in self.steps:
            again = func(*args, **kwargs)
            for old, new in zip(tree_flatten(result)[0], tree_flatten(again)[0], strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def pool(self):
        return None


@pytest.fixture
def free_bytes(monkeypatch):
    """A list whose last entry is what the driver says is free."""
    found = [2**40]

    @contextmanager
    def recording(graph, *, pool, stream, capture_error_mode):
        assert stream == ("stream of GPU", 1)
        with graph:
            yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "Stream", lambda index: ("stream of GPU", index))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (found[-1], 2**40))
    RecordedGraph.num_replays = 0
    yield found
    _recording_stream.cache_clear()


@pytest.fixture
def pipeline():
    return tiny_pipeline(patchify=False)


def logits_of(pipeline, text, graphs, bits):
    """Of all levels of one image, given its bits."""
    schedule = pipeline.schedule_for(1.0, None)
    context = padded(pipeline.condition(text, None, guided=True))
    make = graphs.setdefault(
        "logits",
        LevelLogits(
            pipeline.transformer,
            schedule,
            pipeline.new_cache(schedule, rows=2),
            SAMPLING.guidance(schedule, pipeline.transformer.config.depth),
            SAMPLING.temperatures(schedule),
            graphs["graphs"],
        ),
    )
    context = make.read(context)
    pyramid = pipeline.new_pyramid(schedule, batch=1)
    x_RLC, found = pipeline.transformer.start_token(context), []
    for level in schedule.levels:
        found.append(make(level, x_RLC, context).clone())
        pyramid.add(bits[level.index], level)
        if not level.is_last:
            tokens_BLQ = pyramid.tokens_for(schedule.after(level))
            x_RLC = pipeline.transformer.embed_bits(tokens_BLQ, context)
    return found


@torch.inference_mode()
def drawn(pipeline, texts, graphs):
    """Logits of several texts with common graphs, and what the pipeline itself says of them."""
    kept = {"graphs": graphs}
    found, wanted = [], []
    for seed, text in enumerate(texts):
        options = {"seed": seed, "sampling": SAMPLING, "with_trace": True}
        trace = pipeline.generate(text, **options).trace
        wanted.append(trace.logits)
        found.append(logits_of(pipeline, text, kept, trace.bits))
    return found, wanted


def assert_same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


TEXTS = [random_text([length], seed=length) for length in (5, 3, 7, 4, 2)]


def test_replays_give_the_logits_of_every_text(pipeline, free_bytes):
    graphs = LevelGraphs()
    found, wanted = drawn(pipeline, TEXTS, graphs)
    assert_same(found, wanted)
    num_levels = len(wanted[0])
    # the text's graph from the second text on, the levels' from the third
    assert RecordedGraph.num_replays == 4 + 3 * num_levels
    assert not torch.equal(found[2][-1], found[3][-1])


@pytest.mark.parametrize("when", ["always", "after the text", "text only"])
def test_too_little_memory_for_graphs_changes_no_logits(pipeline, free_bytes, monkeypatch, when):
    calls = []

    def mem_get_info():
        calls.append(1)
        enough = {"always": False, "after the text": len(calls) <= 2, "text only": len(calls) > 1}
        return (2**40 if enough[when] else 2**30, 2**40)

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    graphs = LevelGraphs()
    found, wanted = drawn(pipeline, TEXTS, graphs)
    assert_same(found, wanted)
    num_levels = len(wanted[0])
    expected = {
        "always": 0,
        # the first level alone is recorded, the others are not tried again
        "after the text": 4 + 3,
        # the text is tried again for the third image, and the levels then at once
        "text only": 3 + 2 * num_levels,
    }
    assert RecordedGraph.num_replays == expected[when]


def test_memory_that_runs_out_before_recording_leaves_graphs_usable(pipeline, free_bytes):
    graphs, kept = LevelGraphs(), None
    kept = {"graphs": graphs}
    with torch.inference_mode():
        traces = [
            pipeline.generate(text, seed=0, sampling=SAMPLING, with_trace=True).trace
            for text in TEXTS
        ]
        logits_of(pipeline, TEXTS[0], kept, traces[0].bits)
        step = kept["logits"]._step

        def out_of_memory(level, x_RLC, context):
            if level.index == 2:
                raise torch.OutOfMemoryError("no memory left")
            return step(level, x_RLC, context)

        kept["logits"]._step = out_of_memory
        with pytest.raises(torch.OutOfMemoryError):
            logits_of(pipeline, TEXTS[1], kept, traces[1].bits)
        kept["logits"]._step = step
        found = [logits_of(pipeline, TEXTS[i], kept, traces[i].bits) for i in (2, 3, 4)]
    assert_same(found, [trace.logits for trace in traces[2:]])
