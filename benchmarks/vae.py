"""Time and peak memory of decoding 1024x1024, at once and in strips of several heights.

python benchmarks/vae.py
"""

from __future__ import annotations

from statistics import median

import torch

from var_compressor.models.config import MODELS
from var_compressor.models.directory import meta_vae


@torch.inference_mode()
def main() -> None:
    for name in ("infinity-2b", "infinity-8b"):
        config = MODELS[name].vae
        vae = meta_vae(config, torch.bfloat16).to_empty(device="cuda")
        for tensor in vae.state_dict().values():
            tensor.normal_(std=0.02)
        side = 1024 // config.stride
        latent = torch.randn(1, config.code_dim, side, side, device="cuda")
        for rows in (None, 256, 128, 64, 32):
            times = []
            for _ in range(4):
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                vae.decode(latent, strip_rows=rows)
                end.record()
                torch.cuda.synchronize()
                times.append(start.elapsed_time(end))
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
            print(f"{name} strips of {rows}: {median(times[1:]):.1f} ms, peak {peak:.0f} MiB")


if __name__ == "__main__":
    main()
