"""Time and memory of `varc profile` for a random model of an exact architecture, by stage.

    python benchmarks/profiling.py infinity-2b --out results.json
    python benchmarks/profiling.py infinity-2b --sensitivity all --out results.json
    python benchmarks/profiling.py infinity-tiny --device cpu

4 prompts at the model's full size, guidance on, everything that the command does, from opening the
files to the written report; making the random checkpoint is not counted. Random features stand for
the text encoder's; Infinity-Tiny has its own. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from quantize import GIB, RandomText

from var_compressor import InfinityPipeline
from var_compressor.compress import choose_device, choose_dtype
from var_compressor.models.sampling import Sampling
from var_compressor.profiling.run import profile_model
from var_compressor.prompts import load_prompts, select_prompts
from var_compressor.quant.ptq import describe_base
from var_compressor.quant.recording import Collection
from var_compressor.spec import PRESETS

TINY = "infinity-tiny"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=["infinity-2b", "infinity-8b", TINY])
    parser.add_argument("--checkpoint", type=Path, help="model directory; made when it is missing")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--sensitivity", default="auto", choices=["auto", "all", "worst", "none"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--report", type=Path, help="folder that keeps the profile")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = TINY if args.model == TINY else checkpoint(args, Path(folder))
        result = measure(source, args.report or Path(folder) / "profile", args)
    for stage, seconds in result["seconds"].items():
        print(f"{stage:12} {seconds:8.1f} s")
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def checkpoint(args: argparse.Namespace, folder: Path) -> str:
    """The directory of a random model, which is written where it is missing."""
    path = args.checkpoint or folder / args.model
    if not path.exists():
        command = ["init", args.model, "--out", str(path)]
        subprocess.run([sys.executable, "-m", "var_compressor.cli", *command], check=True)
    return str(path)


def measure(source: str, out: Path, args: argparse.Namespace) -> dict:
    device = choose_device(args.device)
    is_gpu = device.type == "cuda"
    began = time.perf_counter()
    pipeline = InfinityPipeline.from_pretrained(
        source,
        dtype=choose_dtype("auto", device),
        device=device,
        stream_blocks=True,
        compute="reference",
    )
    if source != TINY:
        channels = pipeline.transformer.config.text_channels
        pipeline.text_encoder = RandomText(channels, pipeline.device)  # type: ignore[assignment]
    prompts = load_prompts("tiny" if source == TINY else "varied")
    collection = Collection(
        select_prompts(prompts, num_prompts=args.prompts, seed=0), 0, Sampling(cfg=3.0, tau=0.5)
    )
    opened = time.perf_counter()
    base = describe_base(source)
    hashed = time.perf_counter()
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    profile = profile_model(
        pipeline, collection, PRESETS["svdquant"], source=base, out=out, probe=args.sensitivity
    )
    total = time.perf_counter() - began
    timing = json.loads((out / "timing.json").read_text())
    seconds = {"opening": opened - began, "hashes": hashed - opened, **timing["stages"]}
    followed = (profile["sensitivity"] or {"layers": {}})["layers"].values()
    return {
        "model": args.model,
        "num_prompts": args.prompts,
        "machine": timing["machine"],
        "seconds": {**seconds, "all": total},
        "num_layers_followed": sum(one["kl_nats"] is not None for one in followed),
        "gpu_peak_gib": torch.cuda.max_memory_allocated() / GIB if is_gpu else None,
        "host_peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


if __name__ == "__main__":
    main()
