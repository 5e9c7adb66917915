"""What this machine can do, measured now: the figures that a model's speed is held against."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter

import torch
from torch import Tensor

_FP8_CAPABILITY = (8, 9)
_REPEATS = 10
# a GPU gets sizes at which launches and caches no longer matter, a CPU what it does in a blink
_COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}
_MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True)
class Ceilings:
    """``copy_bytes_s`` counts reading and writing; ``matmul_ops_s`` is in ``dtype``.

    ``fp8_ops_s`` is a row-wise scaled e4m3 product; None where there is none.
    """

    copy_bytes_s: float
    matmul_ops_s: float
    dtype: str
    fp8_ops_s: float | None


def measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """About a second of large copies and products of random numbers."""
    size = _MATMUL_SIZE[device.type]
    source = torch.empty(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = median_seconds(lambda: target.copy_(source), device)
    num_bytes = 2 * source.numel()
    generator = torch.Generator(device).manual_seed(0)
    a, b = (
        torch.randn(size, size, dtype=dtype, device=device, generator=generator) for _ in range(2)
    )
    matmul_s = median_seconds(lambda: a @ b, device)
    fp8_s = _fp8_seconds(a, b)
    num_ops = 2 * size**3
    return Ceilings(
        copy_bytes_s=num_bytes / copy_s,
        matmul_ops_s=num_ops / matmul_s,
        dtype=str(dtype).removeprefix("torch."),
        fp8_ops_s=None if fp8_s is None else num_ops / fp8_s,
    )


def _fp8_seconds(a: Tensor, b: Tensor) -> float | None:
    device = a.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _FP8_CAPABILITY:
        return None
    codes_a, codes_b = (x.to(torch.float8_e4m3fn) for x in (a, b))
    scale_a = torch.ones(len(a), 1, device=device)
    scale_b = torch.ones(1, len(b), device=device)
    return median_seconds(
        lambda: torch._scaled_mm(
            codes_a, codes_b.T, scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16
        ),
        device,
    )


def median_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of single calls, after one that does not count."""
    work()
    if device.type != "cuda":
        times = []
        for _ in range(_REPEATS):
            start = perf_counter()
            work()
            times.append(perf_counter() - start)
        return statistics.median(times)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(_REPEATS + 1)]
    for mark in marks:
        mark.record()
        if mark is not marks[-1]:
            work()
    torch.cuda.synchronize(device)
    return statistics.median(a.elapsed_time(b) / 1000 for a, b in pairwise(marks))
