"""Time and memory of SVDQuant calibration for a random model of an exact architecture, on a GPU.

    python benchmarks/quantize.py infinity-2b --out results.json
    python benchmarks/quantize.py infinity-8b --stop-after-blocks 6 --out results.json

Full settings: 16 prompts at 1024x1024, guidance on, 39 smoothing candidates, rank 32, up to 100
refinement steps. With --stop-after-blocks the remaining blocks are extrapolated from the median of
the measured ones, and the output says so. Random features stand for the text encoder's. The floor
counts the multiplications of one recording, one calibration pass and all searches.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from var_compressor import InfinityPipeline
from var_compressor.models.config import InfinityConfig
from var_compressor.models.sampling import Sampling
from var_compressor.models.schedule import Schedule
from var_compressor.models.transformer import TextFeatures
from var_compressor.prompts import load_prompts, select_prompts
from var_compressor.quant.ptq import quantize_model
from var_compressor.quant.recording import Collection
from var_compressor.spec import PRESETS, QuantSpec

GIB = 2**30
NUM_PROMPTS = 16


class RandomText:
    """Features of the right shape, the same for the same prompt."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.channels, self.device = channels, device

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        lens = tuple(len(prompt.split()) + 2 for prompt in prompts)
        generator = torch.Generator().manual_seed(sum(map(ord, "".join(prompts))))
        features = torch.randn(sum(lens), self.channels, generator=generator) * 0.1
        return TextFeatures(features.to(self.device), lens)

    def release(self) -> None:
        pass


class EnoughBlocksError(Exception):
    """The measured range of blocks is done."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=["infinity-2b", "infinity-8b"])
    parser.add_argument("--checkpoint", type=Path, help="model directory; made when it is missing")
    parser.add_argument("--stop-after-blocks", type=int)
    parser.add_argument("--gpu-gib", type=float, help="let the allocator have no more than this")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint or Path(folder) / args.model
        if not checkpoint.exists():
            command = ["init", args.model, "--out", str(checkpoint)]
            subprocess.run([sys.executable, "-m", "var_compressor.cli", *command], check=True)
        result = measure(args.model, checkpoint, Path(folder) / "out", args)
    print(json.dumps(result, indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(model: str, checkpoint: Path, out: Path, args: argparse.Namespace) -> dict:
    pipeline = InfinityPipeline.from_pretrained(
        checkpoint, dtype=torch.bfloat16, device=args.device, stream_blocks=True
    )
    config = pipeline.transformer.config
    pipeline.text_encoder = RandomText(config.text_channels, pipeline.device)  # type: ignore[assignment]
    prompts = select_prompts(load_prompts("varied"), num_prompts=NUM_PROMPTS, seed=0)
    collection = Collection(prompts, 0, Sampling(cfg=3.0, tau=0.5, top_k=900, top_p=0.97))
    spec = PRESETS["svdquant"]
    enough = (args.stop_after_blocks or config.depth) * 7

    def on_progress(stage: str, done: int, total: int) -> None:
        if stage == "quantizing" and done % 7 == 0:
            print(f"block {done // 7}: {time.perf_counter() - began:.1f} s", file=sys.stderr)
        if stage == "quantizing" and done == enough < total:
            raise EnoughBlocksError

    shutil.rmtree(out, ignore_errors=True)
    if args.gpu_gib is not None:
        whole = torch.cuda.get_device_properties(pipeline.device).total_memory
        torch.cuda.set_per_process_memory_fraction(args.gpu_gib * GIB / whole)
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    with contextlib.suppress(EnoughBlocksError):
        quantize_model(
            pipeline, collection, spec, base=str(checkpoint), out=out, on_progress=on_progress
        )
    total = time.perf_counter() - began
    timing = json.loads((out / "timing.json").read_text())
    return summary(model, config, spec, timing, total, args.gpu_gib)


def summary(
    model: str,
    config: InfinityConfig,
    spec: QuantSpec,
    timing: dict,
    total: float,
    gpu_cap_gib: float | None,
) -> dict:
    blocks = list(timing["blocks"].values())
    per_block = [sum(block.values()) for block in blocks]
    recording = timing["stages"]["recording"]
    median = statistics.median(per_block)
    stages = {name: statistics.median(b[name] for b in blocks) for name in blocks[0]}
    complete = len(blocks) == config.depth
    other = total - recording - sum(per_block)
    return {
        "model": model,
        "machine": machine(),
        "measured_blocks": len(blocks),
        "total_s": total if complete else recording + median * config.depth + other,
        "total_is": "measured" if complete else "extrapolated from the measured blocks",
        "recording_s": recording,
        "block_s": {"median": median, "min": min(per_block), "max": max(per_block)},
        "block_stages_s": stages,
        "other_s": other,
        "gpu_cap_gib": gpu_cap_gib,
        "gpu_peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "gpu_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "host_peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "floor_s": floor(config, spec),
    }


def machine() -> dict:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }


def floor(config: InfinityConfig, spec: QuantSpec) -> dict:
    """Seconds that the multiplications alone would take at this GPU's measured matmul rates."""
    bf16, fp32 = (matmul_rate(dtype) for dtype in (torch.bfloat16, torch.float32))
    schedule = Schedule.of(1.0, config.pixel_budget)
    width = config.embed_dim
    weights = width * width * 8 + 2 * width * config.ffn_dim
    rows = 2 * NUM_PROMPTS
    ends = [level.end for level in schedule.levels]
    forward_tokens = rows * (sum(ends[:-1]) + ends[-1])
    share = spec.calibration.max_tokens_per_level // rows
    sampled = rows * sum(min(share, level.num_tokens) for level in schedule.levels)
    candidates = 2 * spec.smooth.num_grids - 1
    searches = 2 * sampled * weights * candidates
    return {
        "bf16_tflops": bf16 / 1e12,
        "fp32_tflops": fp32 / 1e12,
        "forward_s": 2 * forward_tokens * weights * config.depth / bf16,
        "smoothing_s": searches * config.depth / fp32,
    }


def matmul_rate(dtype: torch.dtype) -> float:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    times = []
    for _ in range(8):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * 8192**3 / statistics.median(times)


if __name__ == "__main__":
    main()
