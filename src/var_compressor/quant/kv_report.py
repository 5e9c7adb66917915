"""What is told of a calibrated KV cache: per layer how K and V are spread and what codes cost them.

Shapes: H heads, S levels, T sampled tokens, D head channels.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from torch import Tensor

from var_compressor.quant.kv import KVRange
from var_compressor.quant.kv_budget import LayerChoice, LayerNeeds
from var_compressor.quant.kv_measure import CacheNoise
from var_compressor.quant.kv_record import LayerRecord


def spread(x_HTD: Tensor) -> dict[str, float]:
    """How unlike the ranges are, and how lopsided the channels.

    The coefficient of variation of the ranges of all channels, and of all tokens' vectors; the
    median and the largest magnitude of the channels' skewness.
    """
    range_HD = x_HTD.amax(1) - x_HTD.amin(1)
    range_HT = x_HTD.amax(2) - x_HTD.amin(2)
    centered = x_HTD - x_HTD.mean(1, keepdim=True)
    variance_HD = centered.square().mean(1).clamp_min(1e-30)
    skewness_HD = (centered.pow(3).mean(1) / variance_HD.pow(1.5)).abs()
    return {
        "range_cv_channels": float(range_HD.std() / range_HD.mean()),
        "range_cv_tokens": float(range_HT.std() / range_HT.mean()),
        "skewness_median": float(skewness_HD.median()),
        "skewness_max": float(skewness_HD.max()),
    }


def clipping(
    record: LayerRecord, found: dict[str, KVRange], *, nbits: int
) -> dict[str, dict[str, Any]]:
    """Of keys and of values: the smallest, median and largest share of a channel's tokens that its
    bounds do not clip, and the percentile of a search that has one for all.
    """
    told: dict[str, dict[str, Any]] = {}
    half = 2 ** (nbits - 1)
    for name, x_HTD in (("k", record.k_HTD), ("v", record.v_HTD)):
        scale_HD, zero_HD = found[name].scale_HD, found[name].zero_point_HD
        # a value within half a step of the last code is rounded, not clipped
        lowest, highest = ((code - zero_HD) * scale_HD for code in (-half - 0.5, half - 0.5))
        inside_HTD = (x_HTD >= lowest[:, None]) & (x_HTD <= highest[:, None])
        share_HD = inside_HTD.float().mean(1)
        told[name] = {
            "kept_share": [float(x) for x in (share_HD.min(), share_HD.median(), share_HD.max())]
        }
        if found[name].percentile is not None:
            told[name]["percentile"] = found[name].percentile
    return told


def layer_report(record: LayerRecord, noise: CacheNoise) -> dict[str, Any]:
    """What is printed and stored of a layer."""
    parts: dict[str, Any] = {
        name: {
            **spread(x_HTD),
            "mse": float(getattr(noise, f"{name}_mse_HD").mean()),
            "snr_db": getattr(noise, f"{name}_snr_db"),
            "output_snr_db": getattr(noise, f"{name}_output_snr_db"),
        }
        for name, x_HTD in (("k", record.k_HTD), ("v", record.v_HTD))
    }
    return {**parts, "num_tokens": record.k_HTD.shape[1]}


def output_snr_db(needs: LayerNeeds, nbits: tuple[int, ...]) -> float:
    """Of the layer's attention output, before levels are dropped."""
    noise = sum(float(needs.noise_H[bits][head]) for head, bits in enumerate(nbits))
    return -10 * math.log10(max(noise, 1e-30))


def attention_kept(mass_HS: Tensor, choice: LayerChoice) -> float:
    """Of the attention that later levels give to earlier ones, the share that still reaches."""
    lost = sum(
        float(mass_HS[head, list(levels)].sum()) for head, levels in enumerate(choice.dropped)
    )
    return 1 - lost / float(mass_HS.sum())


# --- printed ---

COLUMNS = (
    *(
        "layer",
        "bits",
        "attention kept, %",
        "output SNR of both, dB",
        "",
        "range CV: channels",
        "tokens",
    ),
    *("skewness: median", "max", "kept share: min", "median", "MSE", "SNR, dB", "output SNR, dB"),
)


def table_rows(kv: dict[str, Any]) -> list[tuple[str, ...]]:
    """Two rows a layer, K and V."""
    return [_table_row(layer, part) for layer in kv["layers"] for part in "kv"]


def _table_row(layer: dict[str, Any], part: str) -> tuple[str, ...]:
    own = layer[part]
    share = own.get("kept_share")
    first = part == "k"
    return (
        str(layer["layer"]) if first else "",
        "/".join(map(str, sorted(set(layer["nbits"]), reverse=True))) if first else "",
        f"{100 * layer['attention_kept']:.1f}" if first else "",
        f"{layer['output_snr_db']:.1f}" if first else "",
        part.upper(),
        f"{own['range_cv_channels']:.2f}",
        f"{own['range_cv_tokens']:.2f}",
        f"{own['skewness_median']:.2f}",
        f"{own['skewness_max']:.1f}",
        "" if share is None else f"{share[0]:.4f}",
        "" if share is None else f"{share[1]:.4f}",
        f"{own['mse']:.2e}",
        f"{own['snr_db']:.1f}",
        f"{own['output_snr_db']:.1f}",
    )


def choice_text(kv: dict[str, Any]) -> str:
    """The choice in words: bits, what is dropped, bytes."""
    layers = kv["layers"]
    bits = Counter(nbits for layer in layers for nbits in layer["nbits"])
    words = [
        f"{count} heads in {nbits} bits" for nbits, count in sorted(bits.items(), reverse=True)
    ]
    dropping = [levels for layer in layers for levels in layer["dropped"] if levels]
    if dropping:
        kept = sum(layer["attention_kept"] for layer in layers) / len(layers)
        words.append(
            f"{len(dropping)} of them drop levels, {sum(map(len, dropping))} in all; "
            f"{100 * kept:.1f} % of the attention to earlier levels is kept"
        )
    return f"{', '.join(words)}; {kv['bytes_per_image'] / 2**20:.2f} MiB per image"
