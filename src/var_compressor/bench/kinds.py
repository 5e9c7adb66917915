"""Where the time goes by kind of work: one profiled run, its kernels told apart by their names."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

LINEAR, ATTENTION, REST = "linear", "attention", "rest"
KINDS = (LINEAR, ATTENTION, REST)
_MOST_SHOWN = 20

# attention first: names of flash kernels tell the product library inside, too
_PATTERNS = (
    (ATTENTION, r"sdpa|flash|fmha|scaled_dot_product|attention|_attend|^_expand_codes"),
    (ATTENTION, r"^_normalize_rotate"),
    (LINEAR, r"gemm|gemv|cutlass|nvjet|cublas|scaled_mm|^_expand_weight"),
    # on a CPU, products of three dimensions are those of attention
    (ATTENTION, r"^aten::(bmm|baddbmm)_?$"),
    (LINEAR, r"^aten::(addmm|mm|linear|matmul)_?$|^splitKreduce"),
)
_KIND_PATTERNS = tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in _PATTERNS)


@dataclass(frozen=True)
class ByKind:
    """Seconds of kernels (on a CPU: of operations) in one run, and those of the longest ones."""

    seconds: dict[str, float]
    longest: dict[str, float]


def kind_of(name: str) -> str:
    """What a kernel, or on a CPU an operation, of this name works at."""
    found = (kind for kind, pattern in _KIND_PATTERNS if pattern.search(name))
    return next(found, REST)


def profile_kinds(run: Callable[[], object], device: torch.device) -> ByKind:
    """Seconds by kind of one call of ``run``, which the profiler slows down a little."""
    on_gpu = device.type == "cuda"
    # its library tells stderr of every start and stop
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
    assert profiler.profiler is not None
    # key_averages() would take minutes for what one image launches
    events = profiler.profiler.kineto_results.events()
    by_name = _kernel_ns(events) if on_gpu else _self_ns(events)
    seconds = dict.fromkeys(KINDS, 0.0)
    for name, nanos in by_name.items():
        seconds[kind_of(name)] += nanos / 1e9
    by_time = sorted(by_name.items(), key=lambda item: item[1], reverse=True)
    longest = {name: nanos / 1e9 for name, nanos in by_time[:_MOST_SHOWN]}
    return ByKind(seconds, longest)


def _kernel_ns(events: Iterable[Any]) -> dict[str, int]:
    """Time of every kernel and copy; what the CPU did while it launched them is none."""
    by_name: dict[str, int] = defaultdict(int)
    for event in events:
        if event.device_type() == DeviceType.CUDA:
            by_name[event.name()] += event.duration_ns()
    return by_name


def _self_ns(events: Iterable[Any]) -> dict[str, int]:
    """Time of every operation without that of the operations that it calls."""
    by_name: dict[str, int] = defaultdict(int)
    open_calls: list[Any] = []
    ordered = sorted(events, key=lambda e: (e.start_thread_id(), e.start_ns(), -e.duration_ns()))
    for event in ordered:
        while open_calls and not _is_inside(event, open_calls[-1]):
            open_calls.pop()
        if open_calls:
            by_name[open_calls[-1].name()] -= event.duration_ns()
        by_name[event.name()] += event.duration_ns()
        open_calls.append(event)
    return by_name


def _is_inside(event: Any, call: Any) -> bool:
    end = call.start_ns() + call.duration_ns()
    return event.start_thread_id() == call.start_thread_id() and event.start_ns() < end
