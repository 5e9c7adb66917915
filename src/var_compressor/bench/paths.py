"""Which path multiplies a compressed linear fastest on this GPU: measured, for the policy's table.

Every path of packed weights that `auto` may take is timed as a level runs it, input kernel and
product, on random weights that together outgrow the L2 cache.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from itertools import pairwise

import torch

from var_compressor.bench.shapes import fill_quantized
from var_compressor.layers.compute import CANDIDATES, PathTable, Policy
from var_compressor.layers.kernel_linear import LowBitLinear, Scratch
from var_compressor.layers.linear import QuantizedLinear
from var_compressor.models.config import InfinityConfig
from var_compressor.spec import PRESETS

# of one image's levels, with guidance
TOKENS = (2, 8, 32, 72, 128, 288, 512, 800, 1152, 2048, 4608, 8192)
_OUTGROWS_CACHE = 160 * 2**20
_MOST_SETS = 16
_NAME = "blocks.0.ffn.fc1"
_REPLAYS = 5
OnStep = Callable[[str, int, int], None]


def linear_shapes(config: InfinityConfig) -> tuple[tuple[int, int], ...]:
    """Output and input channels of a block's linears that levels run."""
    C, F = config.embed_dim, config.ffn_dim
    return ((3 * C, C), (C, C), (F, C), (C, F))


@torch.inference_mode()
def measure_paths(
    shapes: Iterable[tuple[int, int]], device: torch.device, on_step: OnStep
) -> PathTable:
    """Milliseconds by output and input channels, number of tokens, and path.

    Takes some seconds per shape, most of them for compiling kernels.
    """
    shapes = list(dict.fromkeys(shapes))
    measured, done = {}, 0
    for N, K in shapes:
        linears = _random_linears(N, K, device)
        entries = []
        for num_tokens in TOKENS:
            x_MK = torch.randn(num_tokens, K, device=device).to(torch.bfloat16)
            entries.append((num_tokens, {p: _time_ms(linears, x_MK, p) for p in CANDIDATES}))
            done += 1
            on_step("paths", done, len(shapes) * len(TOKENS))
        measured[N, K] = tuple(entries)
    return PathTable(measured)


def _random_linears(N: int, K: int, device: torch.device) -> list[LowBitLinear]:
    gpu = torch.cuda.get_device_properties(device)
    policy = Policy("packed", (gpu.major, gpu.minor), gpu.multi_processor_count)
    scratch, generator = Scratch(device), torch.Generator(device).manual_seed(0)
    spec = PRESETS["svdquant"].for_module(_NAME)
    assert spec is not None
    found = []
    for _ in range(max(2, min(_MOST_SETS, _OUTGROWS_CACHE // (N * K // 2)))):
        with device:
            linear = QuantizedLinear(K, N, spec, bias_dtype=torch.float32)
        fill_quantized(linear, _NAME, generator, 0)
        found.append(LowBitLinear(linear, policy, scratch, dtype=torch.bfloat16))
    return found


def _time_ms(linears: list[LowBitLinear], x_MK: torch.Tensor, path: str) -> float:
    """Median of graph replays, per linear."""
    for linear in linears:
        linear.policy = Policy(path, linear.policy.capability, linear.policy.num_processors)

    def run() -> None:
        for linear in linears:
            linear(x_MK)

    stream = torch.cuda.Stream(x_MK.device)
    with torch.cuda.stream(stream):
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
        graph.replay()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(_REPLAYS + 1)]
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
    stream.synchronize()
    times = [a.elapsed_time(b) for a, b in pairwise(events)]
    return statistics.median(times) / len(linears)
