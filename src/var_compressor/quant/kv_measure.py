"""What a cache does to one layer: the noise in attention's output.

Shapes: P rows, H heads, L tokens, N queries of a level, D head channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from var_compressor.layers.kv_cache import CodedCache
from var_compressor.layers.kv_params import CacheFormat, CacheParams, LayerParams
from var_compressor.models.config import InfinityConfig
from var_compressor.models.schedule import Schedule
from var_compressor.quant.kv_record import Probe


@dataclass(frozen=True)
class CacheNoise:
    """What a cache does to a probe.

    ``share_H``: each head's noise power in the attention output over the whole layer's signal
    power, so that heads and layers can be compared; the others are of the whole layer.
    """

    share_H: Tensor
    k_output_snr_db: float
    v_output_snr_db: float
    k_mse_HD: Tensor
    v_mse_HD: Tensor
    k_snr_db: float
    v_snr_db: float


def cache_noise(
    probe: Probe,
    layer: LayerParams,
    format: CacheFormat,
    config: InfinityConfig,
    schedule: Schedule,
) -> CacheNoise:
    """Noise of a cache that drops no level; every level but the first counts alike."""
    k_hat, v_hat = stored_values(probe, layer, format, config, schedule)
    exact = attention_outputs(probe, probe.k_PHLD, probe.v_PHLD, schedule)
    signal = power_H(exact).sum()

    def noise_H(k_PHLD: Tensor, v_PHLD: Tensor) -> Tensor:
        found = attention_outputs(probe, k_PHLD, v_PHLD, schedule)
        return power_H([a - b for a, b in zip(found, exact, strict=True)])

    both_H = noise_H(k_hat, v_hat)
    cached = slice(0, schedule.num_cached_tokens)
    k, v = probe.k_PHLD[:, :, cached], probe.v_PHLD[:, :, cached]
    k_mse_HD, v_mse_HD = (
        (stored[:, :, cached] - x).square().mean(dim=(0, 2))
        for stored, x in ((k_hat, k), (v_hat, v))
    )
    return CacheNoise(
        share_H=both_H / signal,
        k_output_snr_db=_db(signal, noise_H(k_hat, probe.v_PHLD).sum()),
        v_output_snr_db=_db(signal, noise_H(probe.k_PHLD, v_hat).sum()),
        k_mse_HD=k_mse_HD,
        v_mse_HD=v_mse_HD,
        k_snr_db=_db(k.square().mean(), k_mse_HD.mean()),
        v_snr_db=_db(v.square().mean(), v_mse_HD.mean()),
    )


def stored_values(
    probe: Probe,
    layer: LayerParams,
    format: CacheFormat,
    config: InfinityConfig,
    schedule: Schedule,
) -> tuple[Tensor, Tensor]:
    """Keys and values as later levels read them, float32; those of the last level as they are."""
    params = CacheParams(format, (layer,))
    rows, device = len(probe.k_PHLD), probe.k_PHLD.device
    cache = CodedCache(config, schedule, params, rows=rows, device=device)
    k_hat, v_hat = probe.k_PHLD.clone(), probe.v_PHLD.clone()
    for level in schedule.levels[:-1]:
        now = slice(level.offset, level.end)
        k_hat[:, :, now], v_hat[:, :, now] = cache.stored(
            0, level, probe.k_PHLD[:, :, now], probe.v_PHLD[:, :, now]
        )
    return k_hat, v_hat


def attention_outputs(
    probe: Probe, k_PHLD: Tensor, v_PHLD: Tensor, schedule: Schedule
) -> list[Tensor]:
    """Output ``[P, H, N, D]`` of every level but the first, with these for what is cached."""
    outputs = []
    for level in schedule.levels[1:]:
        past, now = slice(0, level.offset), slice(level.offset, level.end)
        k, v = (
            torch.cat([stored[:, :, past], own[:, :, now]], dim=2)
            for stored, own in ((k_PHLD, probe.k_PHLD), (v_PHLD, probe.v_PHLD))
        )
        outputs.append((probe.q_PHND[level.index] @ k.mT).softmax(-1) @ v)
    return outputs


def power_H(outputs: list[Tensor]) -> Tensor:
    """Mean square of every head, levels alike, float64."""
    return torch.stack([o.double().square().mean(dim=(0, 2, 3)) for o in outputs]).mean(0)


def _db(signal: Tensor, noise: Tensor) -> float:
    return float(10 * torch.log10(signal.double() / noise.double().clamp_min(1e-30)))
