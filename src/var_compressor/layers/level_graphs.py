"""CUDA graphs of the levels of one schedule, shared by prompts and seeds.

On small levels a GPU waits for the host, which launches hundreds of kernels of a few microseconds.
A graph launches them all at once. It reads and writes fixed places: the text is copied to where the
graphs read it, padded to a multiple of `TEXT_STEP` tokens, and the KV cache stays where it is.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from threading import Lock
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from var_compressor.models.schedule import Level
from var_compressor.models.transformer import TextContext

T = TypeVar("T")
TEXT_STEP = 128
Step = Callable[[Level, Tensor, TextContext], Tensor]
ReadText = Callable[[TextContext], TextContext]
_ONE_AT_A_TIME = Lock()
# what a graph itself takes, and what large blocks are rounded up by
_SPARE_BYTES = 64 * 2**20


class LevelGraphs:
    """Calls ``step(level, x, context)`` for real twice, and from its graph afterwards.

    ``step`` and ``read_text``, which adds the blocks' share to a context, must be the same on every
    call, do the same work and wait for nothing. They are not kept: what they belong to keeps the
    graphs. A result is overwritten by the next call of the same level. Graphs are recorded while
    the second text is drawn: one image alone needs none. What there is no memory to record keeps
    running for real.
    """

    def __init__(self) -> None:
        self.pool: Any = None
        self.context: TextContext | None = None
        self.text_graph: torch.cuda.CUDAGraph | None = None
        self.seen: set[int] = set()
        self.recorded: dict[int, tuple[_Recording, Tensor] | None] = {}

    def use(self, context: TextContext, read_text: ReadText) -> TextContext:
        """Take a text of the same padded shape as all others; returns what the graphs read."""
        if self.context is None:
            self.context = read_text(context)
            return self.context
        if self.text_graph is None:
            self.context = static = replace(self.context, cross_kv=())
            _copy(static, context)
            self.context, made = _run_and_record(partial(read_text, static), self.pool)
            if made is None:
                return self.context
            self.text_graph, self.context, self.pool = made.graph, made.result, made.graph.pool()
        _copy(self.context, context)
        self.text_graph.replay()
        return self.context

    def __call__(self, level: Level, x_RLC: Tensor, step: Step) -> Tensor:
        assert self.context is not None
        found = self.recorded.get(level.index)
        if found is not None:
            recording, static_x_RLC = found
            static_x_RLC.copy_(x_RLC)
            recording.graph.replay()
            return recording.result
        if self.text_graph is None or level.index not in self.seen or level.index in self.recorded:
            self.seen.add(level.index)
            return step(level, x_RLC, self.context)
        static_x_RLC = x_RLC.clone()
        run = partial(step, level, static_x_RLC, self.context)
        result, made = _run_and_record(run, self.pool)
        self.recorded[level.index] = None if made is None else (made, static_x_RLC)
        return result


@dataclass(frozen=True)
class _Recording(Generic[T]):
    """A graph, and where it puts its result."""

    graph: torch.cuda.CUDAGraph
    result: T


def _run_and_record(run: Callable[[], T], pool: Any) -> tuple[T, _Recording[T] | None]:
    """What ``run`` returns, and a graph of it; None where there is no memory for both.

    Memory that is too short must show before: torch does not survive running out of it while it
    records. CUDA destroys no graph while it records one either, and a recording that meets such a
    call is lost: so Python's collector, which may find another model's graphs, waits.
    """
    torch.cuda.empty_cache()
    allocated = torch.cuda.memory_allocated()
    result = run()
    needed = torch.cuda.memory_reserved() - allocated
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < needed + _SPARE_BYTES:
        return result, None
    graph = torch.cuda.CUDAGraph()
    with _ONE_AT_A_TIME:
        collects = gc.isenabled()
        gc.disable()
        try:
            # other threads, which have other GPUs, do what they like meanwhile
            with torch.cuda.graph(
                graph,
                pool=pool,
                stream=_recording_stream(torch.cuda.current_device()),
                capture_error_mode="thread_local",
            ):
                recorded = run()
        finally:
            if collects:
                gc.enable()
    return result, _Recording(graph, recorded)


@cache
def _recording_stream(device_index: int) -> torch.cuda.Stream:
    """One per GPU: torch's own is on the GPU that recorded first, for all of them."""
    return torch.cuda.Stream(device_index)


def padded(context: TextContext) -> TextContext:
    """The same text with masked tokens at its end, so that many texts have one shape."""
    num_tokens = context.text_RTC.shape[1]
    padding = -num_tokens % TEXT_STEP
    mask_R11T = context.mask_R11T
    if mask_R11T is None:
        shape = (len(context.cond_RC), 1, 1, num_tokens)
        mask_R11T = torch.ones(shape, dtype=torch.bool, device=context.cond_RC.device)
    return replace(
        context,
        text_RTC=F.pad(context.text_RTC, (0, 0, 0, padding)),
        mask_R11T=F.pad(mask_R11T, (0, padding)),
    )


def _copy(target: TextContext, source: TextContext) -> None:
    assert target.num_images == source.num_images and target.text_RTC.shape == source.text_RTC.shape
    assert target.mask_R11T is not None and source.mask_R11T is not None
    for one, other in (
        (target.cond_RC, source.cond_RC),
        (target.ada_R16C, source.ada_R16C),
        (target.text_RTC, source.text_RTC),
        (target.mask_R11T, source.mask_R11T),
    ):
        one.copy_(other)
