"""Time and memory of calibrating the KV cache of a random model of an exact architecture.

    python benchmarks/kv_calibration.py infinity-8b --stop-after-blocks 4 --out results.json

16 prompts at 1024x1024, guidance on; random bits and features stand for the traces, whose drawing
is not part of it. Timed is what comes after: one pass over the blocks with all recordings, the
sample, the search of ranges and the measurement. Not all blocks are measured: the rest is
extrapolated from the median of the measured ones, and the output says so.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from quantize import GIB, NUM_PROMPTS, RandomText, machine

from var_compressor import InfinityPipeline
from var_compressor.models.config import MODELS
from var_compressor.models.convert import WriteOptions, init_random
from var_compressor.prompts import load_prompts, select_prompts
from var_compressor.quant.activations import MemoryBounds, activation_store
from var_compressor.quant.calibration import BlockStream, CalibrationTrace, Recording
from var_compressor.quant.kv_calibration import measure_layer, record_layer
from var_compressor.quant.kv_record import RecordPlan
from var_compressor.spec import KVSpec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=["infinity-tiny", "infinity-2b", "infinity-8b"])
    parser.add_argument("--checkpoint", type=Path, help="model directory; made when it is missing")
    parser.add_argument("--stop-after-blocks", type=int, default=4)
    parser.add_argument("--format", choices=["int8", "int4"], default="int8")
    parser.add_argument("--budget", help="e.g. 2GiB: measures 8 and 4 bits")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint or Path(folder) / args.model
        if not checkpoint.exists():
            init_some_blocks(args.model, args.stop_after_blocks, checkpoint)
        result = measure(args, checkpoint, Path(folder))
    print(json.dumps(result, indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


@torch.inference_mode()
def measure(args: argparse.Namespace, checkpoint: Path, folder: Path) -> dict:
    spec = KVSpec(args.format, budget=args.budget)
    pipeline = InfinityPipeline.from_pretrained(
        checkpoint, dtype=torch.bfloat16, device=args.device, stream_blocks=True
    )
    trace = random_trace(pipeline)
    plan = RecordPlan.of(
        trace, max_tokens_per_level=spec.max_tokens_per_level, seed=0, device=pipeline.device
    )
    depth, times = MODELS[args.model].transformer.depth, []
    with activation_store(pipeline.device, MemoryBounds(), folder) as store:
        began = time.perf_counter()
        stream = BlockStream.of_trace(pipeline, trace, store, range(NUM_PROMPTS))
        synchronize(pipeline.device)
        prepared = time.perf_counter() - began
        for block in islice(pipeline.transformer.blocks, args.stop_after_blocks):
            began = time.perf_counter()
            seen = record_layer(pipeline, stream, block, plan)
            synchronize(pipeline.device)
            recorded = time.perf_counter()
            measure_layer(seen, spec, plan.schedule, pipeline)
            synchronize(pipeline.device)
            times.append((recorded - began, time.perf_counter() - recorded))
            print(f"block {len(times)}: {sum(times[-1]):.2f} s", file=sys.stderr)
    per_block = [sum(pair) for pair in times]
    complete = len(times) == depth
    all_blocks = sum(per_block) if complete else depth * statistics.median(per_block)
    return {
        "model": args.model,
        "spec": {"format": spec.format, "budget": spec.budget},
        "machine": machine() if pipeline.device.type == "cuda" else "cpu",
        "measured_blocks": len(times),
        "total_s": prepared + all_blocks,
        "total_is": "measured" if complete else "extrapolated from the measured blocks",
        "prepare_s": prepared,
        "block_s": {
            "median": statistics.median(per_block),
            "min": min(per_block),
            "max": max(per_block),
            "pass_median": statistics.median(passed for passed, _ in times),
            "search_median": statistics.median(searched for _, searched in times),
        },
        "sampled_tokens": seen.k_HTD.shape[1],
        "gpu_peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "host_peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def init_some_blocks(model: str, num_blocks: int, out: Path) -> None:
    """A random checkpoint of the model with fewer blocks: no more of them are read."""
    config = MODELS[model]
    transformer = replace(config.transformer, depth=num_blocks, num_chunks=1)
    options = WriteOptions(torch.bfloat16, overwrite=False, on_tensor=lambda name, size: None)
    fewer = replace(config, transformer=transformer)
    init_random(fewer, out, seed=0, with_vae=True, options=options)


def random_trace(pipeline: InfinityPipeline) -> CalibrationTrace:
    """Recordings of the right shape: random bits for the prompts of a calibration."""
    config = pipeline.transformer.config
    schedule = pipeline.schedule_for(1.0, None)
    prompts = select_prompts(load_prompts("varied"), num_prompts=NUM_PROMPTS, seed=0)
    encoder = RandomText(config.text_channels, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    recordings = []
    for prompt in prompts.values():
        shapes = [(1, level.num_tokens, config.bits_per_token) for level in schedule.levels[:-1]]
        bits = [torch.randint(2, shape, generator=generator).to(torch.uint8) for shape in shapes]
        recordings.append(Recording(encoder.encode([prompt]), tuple(bits)))
    return CalibrationTrace(tuple(recordings), schedule, guided=True)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
