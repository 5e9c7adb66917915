"""A model of your own size: make it, compress it, open it, compare it, draw with it.

python examples/custom_size.py OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image

from var_compressor import InfinityPipeline, load_artifact, quantize_model
from var_compressor.images import write_png
from var_compressor.models.agreement import compare_logits
from var_compressor.models.config import InfinityConfig, ModelConfig, VAEConfig
from var_compressor.models.convert import WriteOptions, init_random
from var_compressor.models.sampling import Sampling
from var_compressor.quant.linear import snr_db
from var_compressor.quant.recording import Collection
from var_compressor.spec import (
    ActSpec,
    CalibrationSpec,
    LowRankSpec,
    QuantSpec,
    SmoothSpec,
    WeightSpec,
)

CONFIG = ModelConfig(
    InfinityConfig(
        depth=4,
        embed_dim=192,
        num_heads=3,
        num_chunks=1,
        bits_per_token=16,
        text_channels=256,
        text_maxlen=64,
        pixel_budget="0.06M",
    ),
    VAEConfig(
        code_dim=16,
        base_channels=16,
        channel_mult=(1, 1, 2, 2, 4),
        num_res_blocks=1,
        num_norm_groups=8,
    ),
    text_encoder="infinity-tiny",
)
SPEC = QuantSpec(
    weight=WeightSpec("sint4", group_size=64),
    act=ActSpec("sint8", group_size=-1),
    low_rank=LowRankSpec(rank=16, max_iters=5),
    smooth=SmoothSpec(num_grids=5),
    calibration=CalibrationSpec(max_tokens_per_level=64),
)
PROMPTS = {"cube": "a large red cube.", "ball": "two blue balls on a wooden floor."}
UNSEEN = ["a green star to the left of a yellow cone."]
SAMPLING = Sampling(cfg=3.0)


def main(out: Path) -> dict[str, float]:
    # weights of your own would come from `varc convert`, or from pipeline.save_pretrained
    init_random(
        CONFIG,
        out / "model",
        seed=0,
        with_vae=True,
        with_text_encoder=False,
        options=WriteOptions(torch.float32),
    )
    full = InfinityPipeline.from_pretrained(out / "model", dtype=torch.float32, compute="reference")
    collection = Collection(PROMPTS, seed=0, sampling=SAMPLING)
    quantize_model(full, collection, SPEC, base=str(out / "model"), out=out / "artifact")
    compressed = load_artifact(out / "artifact", dtype=torch.float32)

    drawn = full.generate(UNSEEN, seed=1, sampling=SAMPLING, with_trace=True)
    bits = drawn.trace.bits
    wanted = full.teacher_logits(UNSEEN, bits, cfg=SAMPLING.cfg)
    found = compressed.teacher_logits(UNSEEN, bits, cfg=SAMPLING.cfg)
    result = {
        "full_bytes": sum(t.numel() * 2 for t in full.transformer.blocks.state_dict().values()),
        "compressed_bytes": sum(p.stat().st_size for p in (out / "artifact/blocks").iterdir()),
        "same_bits": compare_logits(wanted, found).pooled().mean_same_bit,
        "snr_db": snr_db(torch.cat(wanted, dim=1), torch.cat(found, dim=1)),
    }

    again = compressed.generate(UNSEEN, seed=1, sampling=SAMPLING)
    pair = Image.new("RGB", (2 * drawn.pil[0].width, drawn.pil[0].height))
    pair.paste(drawn.pil[0], (0, 0))
    pair.paste(again.pil[0], (drawn.pil[0].width, 0))
    write_png(pair, out / "pair.png", {"prompt": UNSEEN[0], "seed": 1})
    return result


def report(result: dict[str, float]) -> str:
    return (
        f"blocks: {result['full_bytes']} bytes in bf16, {result['compressed_bytes']} compressed\n"
        f"bits equal, teacher-forced: {result['same_bits']:.1%}\n"
        f"SNR of the logits: {result['snr_db']:.1f} dB"
    )


if __name__ == "__main__":
    print(report(main(Path(sys.argv[1]))))
