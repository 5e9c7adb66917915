"""A KV cache of its own: keys in 8 bits, values in 4, scales from each token, no calibration.

python examples/cache_format.py OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from var_compressor import InfinityPipeline
from var_compressor.images import write_png
from var_compressor.layers.kv_cache import LevelCache, PlainCache
from var_compressor.models.agreement import compare_logits
from var_compressor.models.config import InfinityConfig
from var_compressor.models.sampling import Sampling
from var_compressor.models.schedule import Level, Schedule
from var_compressor.ops.packing import pack_codes, unpack_codes
from var_compressor.ops.primitives import FORMATS, dequantize_symmetric, quantize_dynamic
from var_compressor.quant.linear import snr_db

SAMPLING = Sampling(cfg=3.0)
UNSEEN = ["a large red metal cube to the left of a small blue striped ball on a wooden floor."]


class Coded:
    """Keys or values of one layer: codes of a format, a float16 scale for `group` channels."""

    def __init__(self, shape: tuple[int, ...], name: str, group: int, device: torch.device):
        self.format, self.group = FORMATS[name], group
        *tokens, D = shape
        dtype = torch.int8 if self.format.nbits == 8 else torch.uint8
        self.codes = torch.empty(*tokens, D * self.format.nbits // 8, dtype=dtype, device=device)
        self.scales = torch.empty(*tokens, D // group, dtype=torch.float16, device=device)

    def write(self, place: slice, x_RHLD: Tensor) -> None:
        codes_RHLD, scales_RHLG = quantize_dynamic(
            x_RHLD, format=self.format, group_size=self.group, scale_dtype=torch.float16
        )
        self.codes[:, :, place] = pack_codes(codes_RHLD, format=self.format)
        self.scales[:, :, place] = scales_RHLG.half()

    def read(self, end: int) -> Tensor:
        codes_RHLD = unpack_codes(self.codes[:, :, :end], format=self.format)
        scales_RHLG = self.scales[:, :, :end].float()
        return dequantize_symmetric(codes_RHLD, scales_RHLG, format=self.format)


class K8V4Cache(LevelCache):
    """A level attends to itself as it is, and to earlier levels as they are stored."""

    def __init__(
        self, config: InfinityConfig, schedule: Schedule, *, rows: int, device: torch.device
    ) -> None:
        D = config.head_dim
        shape = (rows, config.num_heads, schedule.num_cached_tokens, D)
        self.layers = [
            (Coded(shape, "sint8", D, device), Coded(shape, "sint4", D // 2, device))
            for _ in range(config.depth)
        ]

    def attend_level(self, layer: int, level: Level, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.layers[layer]
        k_all = torch.cat([keys.read(level.offset).to(k), k], dim=2)
        v_all = torch.cat([values.read(level.offset).to(v), v], dim=2)
        # nothing comes after the last level: there is no room for it
        if not level.is_last:
            place = slice(level.offset, level.end)
            keys.write(place, k)
            values.write(place, v)
        return F.scaled_dot_product_attention(q, k_all, v_all, scale=1.0)

    @property
    def num_bytes(self) -> int:
        coded = [one for layer in self.layers for one in layer]
        return sum(one.codes.nbytes + one.scales.nbytes for one in coded)


class K8V4Pipeline(InfinityPipeline):
    def new_cache(self, schedule: Schedule, *, rows: int) -> LevelCache:
        return K8V4Cache(self.transformer.config, schedule, rows=rows, device=self.device)


def main(out: Path) -> dict[str, float]:
    plain = InfinityPipeline.from_pretrained("infinity-tiny", dtype=torch.float32)
    coded = K8V4Pipeline.from_pretrained("infinity-tiny", dtype=torch.float32)
    bits = plain.generate(UNSEEN, seed=1, sampling=SAMPLING, with_trace=True).trace.bits
    wanted = plain.teacher_logits(UNSEEN, bits, cfg=SAMPLING.cfg)
    found = coded.teacher_logits(UNSEEN, bits, cfg=SAMPLING.cfg)

    drawn = coded.generate(UNSEEN, seed=1, sampling=SAMPLING)
    write_png(drawn.pil[0], out / "k8v4.png", {"prompt": UNSEEN[0], "seed": 1})
    bf16 = PlainCache(
        plain.transformer.config,
        plain.schedule_for(1.0, None),
        rows=2,
        dtype=torch.bfloat16,
        device="meta",
    )
    return {
        "plain_bytes": bf16.num_bytes,
        "coded_bytes": drawn.kv_bytes,
        "snr_db": snr_db(torch.cat(wanted, dim=1), torch.cat(found, dim=1)),
        "same_bits": compare_logits(wanted, found).pooled().mean_same_bit,
    }


def report(result: dict[str, float]) -> str:
    return (
        f"cache: {result['plain_bytes']} bytes in bf16, {result['coded_bytes']} as K8 V4\n"
        f"bits equal, teacher-forced: {result['same_bits']:.1%}\n"
        f"SNR of the logits: {result['snr_db']:.1f} dB"
    )


if __name__ == "__main__":
    print(report(main(Path(sys.argv[1]))))
