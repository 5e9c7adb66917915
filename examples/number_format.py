"""Two number formats for weights: integers of 3 bits, and a table of 16 values (NF4).

python examples/number_format.py OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from var_compressor import InfinityPipeline, load_artifact, quantize_model
from var_compressor.images import write_png
from var_compressor.models.agreement import compare_logits
from var_compressor.models.sampling import Sampling
from var_compressor.ops.packing import pack_codes
from var_compressor.ops.primitives import FORMATS, NumberFormat, quantize_dynamic, round_to_grid
from var_compressor.quant.linear import snr_db
from var_compressor.quant.recording import Collection
from var_compressor.spec import (
    WEIGHT_FORMATS,
    ActSpec,
    CalibrationSpec,
    LowRankSpec,
    QuantSpec,
    SmoothSpec,
    WeightSpec,
)

# quantiles of a normal distribution, and 0 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314)
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

FORMATS["sint3"] = NumberFormat("sint3", 3, "int", -3, 3, torch.int8)
FORMATS["nf4"] = NumberFormat("nf4", 4, "table", -1, 1, torch.uint8, values=NF4_VALUES)
WEIGHT_FORMATS["sint3"] = WEIGHT_FORMATS["nf4"] = 64

BASE = "infinity-tiny"
SAMPLING = Sampling(cfg=3.0)
PROMPTS = {"cube": "a large red cube.", "ball": "two blue balls on a wooden floor."}
UNSEEN = ["a large red metal cube to the left of a small blue striped ball on a wooden floor."]


def rounding(weight_NK: Tensor, name: str) -> tuple[float, float]:
    """Signal over noise of a rounded weight in dB, and the bits that a value takes in storage."""
    format, options = FORMATS[name], {"group_size": 64, "scale_dtype": torch.bfloat16}
    codes_NK, scales_NG = quantize_dynamic(weight_NK, format=format, **options)
    num_bytes = pack_codes(codes_NK, format=format).nbytes + scales_NG.bfloat16().nbytes
    rounded_NK = round_to_grid(weight_NK, scales_NG, format=format)
    return snr_db(weight_NK, rounded_NK), 8 * num_bytes / weight_NK.numel()


def compressed(full: InfinityPipeline, name: str, out: Path) -> InfinityPipeline:
    """The model with such weights and 16-bit inputs, through an artifact and back."""
    spec = QuantSpec(
        weight=WeightSpec(name, group_size=64),
        act=ActSpec(None),
        low_rank=LowRankSpec(rank=0),
        smooth=SmoothSpec(enabled=False),
        calibration=CalibrationSpec(max_tokens_per_level=64),
    )
    collection = Collection(PROMPTS, seed=0, sampling=SAMPLING)
    quantize_model(full, collection, spec, base=BASE, out=out)
    return load_artifact(out, dtype=torch.float32)


def main(out: Path) -> dict[str, dict[str, float]]:
    full = InfinityPipeline.from_pretrained(BASE, dtype=torch.float32, compute="reference")
    weight_NK = full.transformer.blocks[0].ffn.fc1.weight
    bits = full.generate(UNSEEN, seed=1, sampling=SAMPLING, with_trace=True).trace.bits
    wanted = full.teacher_logits(UNSEEN, bits, cfg=SAMPLING.cfg)
    results = {}
    for name in ("sint4", "nf4", "sint3"):
        pipeline = compressed(full, name, out / name)
        found = pipeline.teacher_logits(UNSEEN, bits, cfg=SAMPLING.cfg)
        weight_snr_db, bits_per_value = rounding(weight_NK, name)
        results[name] = {
            "bits_per_value": bits_per_value,
            "weight_snr_db": weight_snr_db,
            "logits_snr_db": snr_db(torch.cat(wanted, dim=1), torch.cat(found, dim=1)),
            "same_bits": compare_logits(wanted, found).pooled().mean_same_bit,
        }
        image = pipeline.generate(UNSEEN, seed=1, sampling=SAMPLING).pil[0]
        write_png(image, out / f"{name}.png", {"prompt": UNSEEN[0], "seed": 1})
    return results


def report(results: dict[str, dict[str, float]]) -> str:
    return "\n".join(
        f"{name}: {one['bits_per_value']:.2f} bits a value, weight {one['weight_snr_db']:.1f} dB, "
        f"logits {one['logits_snr_db']:.1f} dB, {one['same_bits']:.1%} of the bits equal"
        for name, one in results.items()
    )


if __name__ == "__main__":
    print(report(main(Path(sys.argv[1]))))
