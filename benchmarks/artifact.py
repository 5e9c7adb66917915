"""Loading a compressed model of real size from disk to a GPU, and its memory from prompt to PNG.

    python benchmarks/artifact.py --preset infinity-8b            # on a GPU; --device cpu elsewhere

Writes an artifact of random 4-bit weights with cache ranges, and a base model with its VAE and text
encoder, to a temporary folder; then opens it as users do, hashes checked, files in the page cache.
The peak is that of `varc generate --low-memory --release-text-encoder`, all parts counted.
Last line: JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from load import commit

from var_compressor.artifact import TRANSFORMER_FILE, Manifest, artifact_writer, put_kv
from var_compressor.bench.shapes import plausible_ranges, random_pipeline
from var_compressor.generation import Generation
from var_compressor.layers.kv_params import fingerprint, params_to_tensors
from var_compressor.models.config import config_to_dict
from var_compressor.models.convert import WriteOptions, init_random, model_config
from var_compressor.models.sampling import Sampling
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.ptq import describe_base
from var_compressor.spec import PRESETS

PROMPT = "a large red metal cube on a wooden floor, photographed in the last light of the day"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="infinity-8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        artifact = write_artifact(args.preset, Path(folder), device)
        load_s = [load_seconds(artifact, device) for _ in range(args.repeats)]
        found: dict[str, Any] = {
            "benchmark": "artifact", "model": args.preset, "commit": commit(),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "stored_bytes": InfinityPipeline.stored_bytes(artifact),
            "load_s": {"median": statistics.median(load_s), "min": min(load_s), "max": max(load_s)},
        }  # fmt: skip
        print(
            f"{args.preset}: {found['stored_bytes'] / 2**30:.2f} GiB open in "
            f"{statistics.median(load_s):.2f} s ({min(load_s):.2f} to {max(load_s):.2f})",
            flush=True,
        )
        if device.type == "cuda":
            for kv in ("int8", "int4"):
                found[kv] = draw_png(artifact, kv, device)
                peak, seconds = found[kv]["peak_bytes"] / 2**30, found[kv]["seconds"]
                stages = {k: round(v / 2**30, 2) for k, v in found[kv]["stage_bytes"].items()}
                print(f"  {kv} cache: peak {peak:.2f} GiB {stages}, {seconds:.2f} s", flush=True)
    print(json.dumps(found))


def write_artifact(preset: str, folder: Path, device: torch.device) -> Path:
    """As `varc quantize` and `varc calibrate-kv` leave it; its base has one block."""
    config, spec = model_config(preset), PRESETS["svdquant"]
    small = replace(config, transformer=replace(config.transformer, depth=1, num_chunks=1))
    options = WriteOptions(torch.bfloat16)
    base = folder / "base"
    init_random(small, base, seed=0, with_vae=True, with_text_encoder=True, options=options)
    model = random_pipeline(
        preset, spec=spec, kv=None, dtype=torch.bfloat16, device=device, seed=0
    ).transformer
    manifest = Manifest(
        config=config_to_dict(config.transformer), base=describe_base(str(base)),
        spec=spec.to_dict(), calibration={}, files={},
    )  # fmt: skip
    out = folder / "artifact"
    with artifact_writer(out, {}) as writer:
        for index, block in enumerate(model.blocks):
            writer.put_block(index, block.state_dict(), {})
        outside = {n: t for n, t in model.state_dict().items() if not n.startswith("blocks.")}
        writer.put_tensors(TRANSFORMER_FILE, outside)
        writer.finish(manifest, len(model.blocks))
    ranges = plausible_ranges(config.transformer, "int8")
    layers = [{"block": fingerprint(block)} for block in model.blocks]
    kv = {"format": asdict(ranges.format), "layers": layers}
    put_kv(out, {n: t.clone() for n, t in params_to_tensors(ranges).items()}, kv)
    return out


def load_seconds(artifact: Path, device: torch.device) -> float:
    gc.collect()
    start = time.perf_counter()
    pipeline = InfinityPipeline.from_pretrained(artifact, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    del pipeline
    return seconds


def draw_png(artifact: Path, kv: str, device: torch.device) -> dict[str, Any]:
    """The second image of a pipeline that saves memory; the first compiles kernels."""
    gc.collect()
    torch.cuda.empty_cache()
    pipeline = InfinityPipeline.from_pretrained(artifact, device=device, text_encoder_bits=8)
    pipeline.save_memory()
    pipeline.kv_params = plausible_ranges(pipeline.transformer.config, kv).to(device)
    stage_bytes: dict[str, int] = {}

    def end_of(stage: str) -> None:
        torch.cuda.synchronize(device)
        stage_bytes[stage] = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)

    for _ in range(2):
        torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        text = pipeline.encode([PROMPT])
        assert pipeline.text_encoder is not None
        pipeline.text_encoder.release()
        end_of("text")
        schedule = pipeline.schedule_for(1.0, None)
        drawn = pipeline.draw(text, schedule, seed=0, sampling=Sampling())
        end_of("draw")
        image_B3YX = pipeline.decode(drawn.latent_BDYX, strip_rows=None)
        end_of("VAE")
        Generation(image_B3YX, drawn).pil[0].save(BytesIO(), "png")
        seconds = time.perf_counter() - start
    return {
        "peak_bytes": max(stage_bytes.values()), "stage_bytes": stage_bytes, "seconds": seconds,
    }  # fmt: skip


if __name__ == "__main__":
    main()
