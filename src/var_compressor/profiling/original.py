"""The profile under the keys of Henvezz95/VAR-Compressor's diagnostics, `infinity_stats.json`.

    {"block_chunks.I.module.J.ffn_down": [{"kurtosis": …, "max": …, …}], …}

One entry for each tensor, over all levels and images together; the original has one for each of up
to three images of a cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FILE = "infinity_stats.json"

_LINEARS = {
    "self_attn.qkv": "to_qkv",
    "ffn.fc1": "ffn_up",
    "ffn.fc2": "ffn_down",
    "self_attn.proj": "out_proj",
    # not told of by the original
    "cross_attn.q": "cross_q",
    "cross_attn.kv": "cross_kv",
    "cross_attn.proj": "cross_out_proj",
}
_LINEAR_KEYS = ("kurtosis", "max_median_ratio", "max")
_CACHE_KEYS = (
    *(*_LINEAR_KEYS, "cv_channel", "cv_token", "dominance", "skewness", "max_skew"),
    *("ideal_zero_point", "global_min", "global_max"),
)


def stats_of(profile: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """By log key, in the order of the blocks."""
    config, found = profile["config"], {}
    per_chunk = config["depth"] // config["num_chunks"]
    for index, block in enumerate(profile["blocks"]):
        place = f"block_chunks.{index // per_chunk}.module.{index % per_chunk}"
        for name, key in _LINEARS.items():
            stats = block["linears"][name]["input"]["all"]
            found[f"{place}.{key}"] = [{key: stats[key] for key in _LINEAR_KEYS}]
        for name in ("k", "v"):
            stats = block["cache"][name]["all"]
            found[f"{place}.attn_{name}"] = [{key: stats[key] for key in _CACHE_KEYS}]
    return found
