"""Attention over plain and coded KV caches on a GPU: checked first, then timed over all levels.

    PYTHONPATH=src python3 benchmarks/attention.py --out out/attention.json

Shapes are those of 1024x1024 with guidance (two rows). Times are of attention from the output of
the qkv projection on, as `attend_qkv` runs it, in CUDA graphs: of one layer, the median of several
runs, summed over levels. `bf16` is the plain cache with torch's fastest attention; `expand` and
`codes` are the two routes of a coded cache; `sdpa` is torch's attention alone on keys and values
that lie ready, the floor of `bf16` and `expand`. At the largest levels `codes` is also timed with
other tiles, without what makes its inputs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from var_compressor.layers.kv_cache import (
    CodedCache,
    LevelCache,
    PlainCache,
    fastest_attention,
)
from var_compressor.layers.kv_params import CacheFormat, CacheParams, KVParams, whole_layer
from var_compressor.models.config import MODELS, InfinityConfig
from var_compressor.models.schedule import Level, Schedule, rotary_table
from var_compressor.models.transformer import split_heads
from var_compressor.ops import reference
from var_compressor.ops.attention import Tiles, attend_codes, tiles_for

ROWS = 2
FORMATS = ("int8", "int4")
# beside the tiles that are taken
TILES = (Tiles(128, 64, 8, 2), Tiles(128, 128, 8, 2), Tiles(64, 64, 4, 3))
NUM_SWEPT_LEVELS = 4


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["infinity-8b", "infinity-2b"])
    args = parser.parse_args()
    started = perf_counter()
    schedule = Schedule.of(1.0, "1M")
    check(MODELS["infinity-2b"].transformer, schedule, schedule.levels[5])
    check(MODELS["infinity-8b"].transformer, schedule, schedule.levels[8])
    results = {name: measure(MODELS[name].transformer, schedule, started) for name in args.models}
    for name, found in results.items():
        print(markdown(name, found))
    device = torch.cuda.get_device_name()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps({"device": device, "torch": torch.__version__, "models": results}, indent=1)
    )


# --- problems -------------------------------------------------------------------------------------


def one_layer(config: InfinityConfig) -> InfinityConfig:
    return replace(config, depth=1, num_chunks=1)


def params_of(config: InfinityConfig, name: str) -> CacheParams:
    """Ranges that hold unit keys and values of about 1."""
    nbits = 4 if name == "int4" else 8
    limit = 448 if name == "fp8" else 2 ** (nbits - 1)
    shape = (config.num_heads, config.head_dim)
    zero_points = torch.zeros(shape, dtype=torch.int32)
    ranges = KVParams(
        torch.full(shape, 0.4 / limit), zero_points, torch.full(shape, 4 / limit), zero_points
    )
    layer = whole_layer(ranges, nbits=nbits, num_heads=config.num_heads)
    return CacheParams(CacheFormat(name, False, 0), (layer,)).to("cuda")


def new_cache(config: InfinityConfig, schedule: Schedule, name: str) -> LevelCache:
    """A cache of one layer with something at every position."""
    own = one_layer(config)
    if name == "bf16":
        plain = PlainCache(own, schedule, rows=ROWS, dtype=torch.bfloat16, device="cuda")
        plain.kv[0].normal_(std=config.head_dim**-0.5)
        return plain
    coded = CodedCache(own, schedule, params_of(config, name), rows=ROWS, device="cuda")
    for tensor in coded.tensors():
        if tensor.numel():
            # small numbers in every coding
            tensor.view(torch.uint8).random_(0, 0x70)
    return coded


def inputs_of(config: InfinityConfig, schedule: Schedule, level: Level) -> tuple[Tensor, ...]:
    torch.manual_seed(level.index)
    qkv = torch.randn(
        ROWS, level.num_tokens, 3 * config.embed_dim, dtype=torch.bfloat16, device="cuda"
    )
    q_scale_H = torch.full((config.num_heads,), 8.0, device="cuda")
    rope_2LD = rotary_table(schedule, config.head_dim, "cuda")
    return qkv, q_scale_H, rope_2LD[:, level.offset : level.end]


# --- right first ----------------------------------------------------------------------------------


def check(config: InfinityConfig, schedule: Schedule, level: Level) -> None:
    """Every variant against the reference; a timing of a failing op is not a timing."""
    config = replace(config, num_heads=4, embed_dim=4 * config.head_dim)
    for name, last in [(n, i) for n in ("bf16", *FORMATS, "fp8") for i in (False, True)]:
        own = replace(level, is_last=last)
        inputs = inputs_of(config, schedule, own)
        cache = new_cache(config, schedule, name)
        q, k, v = split_heads(*inputs)
        wanted = slow_attention(cache, own, q, k, v)
        for route in (None,) if name == "bf16" else ("codes", "expand"):
            if isinstance(cache, CodedCache):
                cache.route = route
            o = cache.attend_qkv(0, own, *inputs).unflatten(-1, (config.num_heads, -1))
            found = o.transpose(1, 2).float()
            error = float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
            line = f"{name} {route} level {level.index} last={last}: relative error {error:.1e}"
            print(line, file=sys.stderr)
            if not error < 1.5e-2:
                raise SystemExit(f"{line}; the kernels are wrong here")


def slow_attention(cache: LevelCache, level: Level, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Float32, of what the cache holds before the level."""
    if isinstance(cache, PlainCache):
        past_k, past_v = cache.kv[0][:, :, :, : level.offset]
        k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
        return (q.float() @ k.float().mT).softmax(-1) @ v.float()
    assert isinstance(cache, CodedCache)
    return reference.attend_codes(q.float(), [cached_tokens(cache, level)], k, v)


def cached_tokens(cache: CodedCache, level: Level) -> reference.CodedTokens:
    k, v = (getattr(cache.layers[0][0], x).get(slice(0, level.offset), 0) for x in "kv")
    return reference.CodedTokens(k[0], v[0], k[1], k[2], v[1], v[2])


# --- then fast ------------------------------------------------------------------------------------


def measure(config: InfinityConfig, schedule: Schedule, started: float) -> dict[str, object]:
    """Milliseconds of every level, by variant; and of other tiles at the largest levels."""
    times: dict[str, list[float]] = {"sdpa": [], "bf16": []}
    times |= {f"{n} {r}": [] for n in FORMATS for r in ("expand", "codes")}
    caches = {name: new_cache(config, schedule, name) for name in ("bf16", *FORMATS)}
    for level in schedule.levels:
        inputs = inputs_of(config, schedule, level)
        times["sdpa"].append(milliseconds(ready_attention(config, level)))
        for variant in list(times)[1:]:
            name, _, route = variant.partition(" ")
            cache = caches[name]
            if isinstance(cache, CodedCache):
                cache.route = route
            times[variant].append(milliseconds(lambda: cache.attend_qkv(0, level, *inputs)))  # noqa: B023
        print(f"level {level.index}: {perf_counter() - started:.0f} s", file=sys.stderr)
    tiles = [row for name in FORMATS for row in sweep(config, schedule, caches[name], name)]
    print(f"tiles: {perf_counter() - started:.0f} s", file=sys.stderr)
    return {"levels_ms": times, "tiles": tiles}


def ready_attention(config: InfinityConfig, level: Level) -> Callable[[], Tensor]:
    """torch's attention on random keys and values of all positions up to a level."""
    q, k, v = (
        torch.randn(
            ROWS, config.num_heads, length, config.head_dim, dtype=torch.bfloat16, device="cuda"
        )
        for length in (level.num_tokens, level.end, level.end)
    )
    return lambda: fastest_attention(q, k, v)


def sweep(
    config: InfinityConfig, schedule: Schedule, cache: LevelCache, name: str
) -> list[dict[str, object]]:
    """The kernel on codes alone, with other tiles; milliseconds of each of the largest levels."""
    assert isinstance(cache, CodedCache)
    largest, rows = schedule.levels[-NUM_SWEPT_LEVELS:], []
    own = tiles_for(largest[-1].num_tokens, config.head_dim, torch.cuda.get_device_capability())
    for tiles in dict.fromkeys((own, *TILES)):
        found: list[float] = []
        try:
            for level in largest:
                q, k, _ = split_heads(*inputs_of(config, schedule, level))
                # strided, as the projection leaves them
                qkv, *_ = inputs_of(config, schedule, level)
                v = qkv.unflatten(-1, (3, config.num_heads, -1))[:, :, 2].transpose(1, 2)
                cached = cached_tokens(cache, level)
                found.append(milliseconds(lambda: attend_codes(q, cached, k, v, tiles=tiles)))  # noqa: B023
        except Exception as error:  # tiles that do not fit this GPU are a result, too
            print(f"{name} {tiles}: {type(error).__name__}", file=sys.stderr)
            continue
        rows.append({"format": name, **asdict(tiles), "ms": found})
    return rows


def milliseconds(run: Callable[[], Tensor]) -> float:
    """Median of a CUDA graph's replays; few, where they are long."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    graph.replay()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(9)]
    for before, after in pairs:
        before.record()
        graph.replay()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in pairs)


def markdown(name: str, found: dict[str, object]) -> str:
    times: dict[str, list[float]] = found["levels_ms"]  # type: ignore[assignment]
    baseline = sum(times["bf16"])
    lines = [
        f"\n{name}: one layer, ms, two rows, all levels of 1024x1024\n",
        "| attention | all levels | last three | to bf16 |",
        "|---|---|---|---|",
    ]
    for variant, each in times.items():
        last = " + ".join(f"{ms:.3f}" for ms in each[-3:])
        lines.append(f"| {variant} | {sum(each):.3f} | {last} | {sum(each) / baseline:.2f} |")
    floor = sum(times["sdpa"][-NUM_SWEPT_LEVELS:])
    lines += [
        f"\nCodes alone, largest {NUM_SWEPT_LEVELS} levels; sdpa alone takes {floor:.3f}\n",
        "| format | tiles m x n, warps, stages | ms | to sdpa |",
        "|---|---|---|---|",
    ]
    for row in found["tiles"]:  # type: ignore[attr-defined]
        tiles = f"{row['m']} x {row['n']}, {row['num_warps']}, {row['num_stages']}"
        total = sum(row["ms"])
        lines.append(f"| {row['format']} | {tiles} | {total:.3f} | {total / floor:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
