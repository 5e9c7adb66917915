"""Bits of Infinity-Tiny by every compute path, against full precision and against the reference.

    python benchmarks/compute_paths.py ARTIFACT            # on a GPU

Teacher-forced on captions of test scenes, with guidance: the share of bits whose likelier value is
the same as at full precision (float32), and as in the reference operations of the same artifact in
bfloat16. With the artifact's KV cache, if it has one. Then, whether graphs, a batch and less memory
draw the same bits.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from variants import SPLIT

from var_compressor.artifact import read_manifest
from var_compressor.evaluation.agreement import bit_agreement
from var_compressor.evaluation.captions import captions
from var_compressor.evaluation.scenes import sample_scenes
from var_compressor.layers.compute import COMPUTE
from var_compressor.models.sampling import Sampling
from var_compressor.models.schedule import Schedule
from var_compressor.models.transformer import TextFeatures
from var_compressor.pipeline import InfinityPipeline


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--num-captions", type=int, default=128)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    base = read_manifest(args.artifact).base["source"]
    full = InfinityPipeline.from_pretrained(
        base, dtype=torch.float32, device="cuda", compute="reference"
    )
    texts = test_captions(args.num_captions)
    text = full.encode(texts)
    schedule = full.schedule_for(1.0, None)
    bits = full.draw(text, schedule, seed=0, sampling=Sampling(), with_trace=True).trace.bits
    reference = opened(args.artifact, "reference", torch.bfloat16)
    rows = {"reference, float32": opened(args.artifact, "reference", torch.float32)}
    rows["reference, bfloat16"] = reference
    rows |= {path: opened(args.artifact, path, torch.bfloat16) for path in COMPUTE}
    found = {}
    print("| path | bits equal to full precision | to the reference in bfloat16 |\n|---|---|---|")
    for name, pipeline in rows.items():
        to_full = bit_agreement(full, pipeline, text, bits, cfg=3.0).mean_same_bit
        to_reference = bit_agreement(reference, pipeline, text, bits, cfg=3.0).mean_same_bit
        found[name] = {"full": to_full, "reference": to_reference}
        print(f"| {name} | {100 * to_full:.2f} % | {100 * to_reference:.2f} % |", flush=True)
    print(check_draws(rows["auto"], text, schedule))
    if args.out is not None:
        args.out.write_text(
            json.dumps({"num_captions": args.num_captions, "rows": found}, indent=1)
        )


def opened(artifact: Path, compute: str, dtype: torch.dtype) -> InfinityPipeline:
    return InfinityPipeline.from_pretrained(artifact, dtype=dtype, device="cuda", compute=compute)


def test_captions(count: int) -> list[str]:
    return captions(sample_scenes(torch.arange(count), SPLIT))


def check_draws(pipeline: InfinityPipeline, text: TextFeatures, schedule: Schedule) -> str:
    """Whether graphs, another batch and less memory draw the same bits."""
    one = TextFeatures(text.rows()[0], text.lens[:1])

    def drawn(which: TextFeatures) -> Tensor:
        trace = pipeline.draw(which, schedule, seed=3, sampling=Sampling(), with_trace=True).trace
        return torch.cat([bits_BLQ[0].flatten() for bits_BLQ in trace.bits])

    runs, others = [drawn(one) for _ in range(3)], drawn(text)
    pipeline.save_memory()
    saving = drawn(one)

    def same(a: Tensor, b: Tensor) -> str:
        return f"{100 * (a == b).double().mean():.2f} %"

    return (
        f"bits equal to the first run: recorded graphs {same(runs[0], runs[1])}, replayed "
        f"{same(runs[0], runs[2])}, in a batch of {len(text.lens)} {same(runs[0], others)}, "
        f"with less memory {same(runs[0], saving)}"
    )


if __name__ == "__main__":
    main()
