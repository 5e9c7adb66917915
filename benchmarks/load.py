"""Time and peak memory of `InfinityPipeline.from_pretrained` in a fresh process.

    python benchmarks/load.py                 # makes a random 2B (4.5 GB) in a temporary folder
    python benchmarks/load.py --model DIR     # measures a directory that is there

Peak RSS counts the pages of mapped weight files, which the system may drop; RssAnon is the memory
that loading itself takes. "touched" is after every weight was read once. Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a model directory; default: a random one")
    parser.add_argument("--preset", default="infinity-2b", help="what to make without --model")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(measure_here(args.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model, init_seconds = args.model, None
        if model is None:
            model = Path(folder) / args.preset
            init_seconds = make_random(args.preset, model)
        runs = [measure_in_new_process(model) for _ in range(args.repeats)]
    report(runs, init_seconds=init_seconds, model=args.preset if args.model is None else model.name)


def make_random(preset: str, out: Path) -> float:
    start = time.perf_counter()
    command = [sys.executable, "-m", "var_compressor.cli", "init", preset, "--out", str(out)]
    subprocess.run(command, check=True)
    return time.perf_counter() - start


def measure_in_new_process(model: Path) -> dict:
    command = [sys.executable, __file__, "--measure", str(model)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_here(model: Path) -> dict:
    import torch

    from var_compressor import InfinityPipeline

    before = memory()
    start = time.perf_counter()
    pipeline = InfinityPipeline.from_pretrained(model, dtype=torch.bfloat16)
    seconds = time.perf_counter() - start
    loaded = memory()
    tensors = [t for part in (pipeline.transformer, pipeline.vae) for t in part.parameters()]
    start = time.perf_counter()
    for tensor in tensors:
        tensor.view(torch.uint8).amax()
    touched = memory()
    return {
        "weight_bytes": sum(tensor.nbytes for tensor in tensors),
        "load_s": seconds,
        "touch_s": time.perf_counter() - start,
        "before": before,
        "loaded": loaded,
        "touched": touched,
    }


def memory() -> dict[str, int]:
    """Bytes: the peak of resident memory so far, and anonymous memory now."""
    status = Path("/proc/self/status").read_text()
    anonymous = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_rss": peak_kib * 1024, "rss_anon": int(anonymous.split()[1]) * 1024}


def report(runs: list[dict], *, init_seconds: float | None, model: str) -> None:
    times = sorted(run["load_s"] for run in runs)
    last = runs[-1]
    print(f"from_pretrained of {model}, bf16, CPU: {last['weight_bytes'] / GIB:.2f} GiB of weights")
    print(f"{'':<10}{'seconds':>10}{'peak RSS GiB':>15}{'RssAnon GiB':>14}")
    seconds = {"before": 0.0, "loaded": statistics.median(times), "touched": last["touch_s"]}
    for stage, stage_seconds in seconds.items():
        peak, anonymous = (last[stage][key] / GIB for key in ("peak_rss", "rss_anon"))
        print(f"{stage:<10}{stage_seconds:>10.2f}{peak:>15.2f}{anonymous:>14.2f}")
    summary = {
        "benchmark": "load",
        "model": model,
        "init_s": init_seconds,
        "load_s": {"median": statistics.median(times), "min": times[0], "max": times[-1]},
        "runs": runs,
        "machine": {
            "platform": platform.platform(),
            "cpu": platform.processor() or platform.machine(),
            "num_cpus": os.cpu_count(),
            "python": platform.python_version(),
        },
        "commit": commit(),
    }
    print(json.dumps(summary))


def commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


if __name__ == "__main__":
    main()
