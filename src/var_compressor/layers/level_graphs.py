"""CUDA graphs of the levels of one schedule, shared by prompts and seeds.

On small levels a GPU waits for the host, which launches hundreds of kernels of a few microseconds.
A graph launches them all at once. It reads and writes fixed places: the text is copied to where the
graphs read it, padded to a multiple of `TEXT_STEP` tokens, and the KV cache stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from var_compressor.models.schedule import Level
from var_compressor.models.transformer import TextContext

TEXT_STEP = 128
Step = Callable[[Level, Tensor, TextContext], Tensor]


class LevelGraphs:
    """Calls ``step(level, x, context)`` for real the first time, and from its graph afterwards.

    ``step`` and ``read_text``, which adds the blocks' share to a context, must do the same work on
    every call and wait for nothing. A result is overwritten by the next call of the same level.
    Graphs are recorded for the second text: one image alone is drawn without.
    """

    def __init__(self, read_text: Callable[[TextContext], TextContext], step: Step) -> None:
        self.read_text, self.step = read_text, step
        self.pool: Any = None
        self.context: TextContext | None = None
        self.text_graph: torch.cuda.CUDAGraph | None = None
        self.seen: set[int] = set()
        self.recorded: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def use(self, context: TextContext) -> TextContext:
        """Take a text of the same padded shape as all others; returns what the graphs read."""
        if self.context is None:
            self.context = self.read_text(context)
            return self.context
        if self.text_graph is None:
            static = replace(self.context, cross_kv=())
            self.text_graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.text_graph):
                self.context = self.read_text(static)
            self.pool = self.text_graph.pool()
        _copy(self.context, context)
        self.text_graph.replay()
        return self.context

    def __call__(self, level: Level, x_RLC: Tensor) -> Tensor:
        assert self.context is not None
        if self.text_graph is None or level.index not in self.seen:
            self.seen.add(level.index)
            return self.step(level, x_RLC, self.context)
        if level.index not in self.recorded:
            self.recorded[level.index] = self._record(level, x_RLC, self.context)
        graph, static_x_RLC, result = self.recorded[level.index]
        static_x_RLC.copy_(x_RLC)
        graph.replay()
        return result

    def _record(
        self, level: Level, x_RLC: Tensor, context: TextContext
    ) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        static_x_RLC = x_RLC.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = self.step(level, static_x_RLC, context)
        return graph, static_x_RLC, result


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
