"""KV caches behind ``attend()``: preallocated, the last level is never stored.

Shapes: R rows, H heads, L tokens, D head_dim. Keys arrive normalised and rotated; the softmax
scale is 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from var_compressor.models.config import InfinityConfig
from var_compressor.models.schedule import Level, Schedule


class LevelCache:
    """What all caches share: walking the levels of a call, one after the other.

    Handing several levels to ``attend`` at once (teacher forcing) does exactly what handing them
    over one by one does.
    """

    def attend(
        self, layer: int, levels: Sequence[Level], q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        start, outputs = levels[0].offset, []
        for level in levels:
            part = slice(level.offset - start, level.end - start)
            outputs.append(
                self.attend_level(layer, level, q[:, :, part], k[:, :, part], v[:, :, part])
            )
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def attend_level(self, layer: int, level: Level, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise AssertionError("a cache implements attend_level")

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        raise AssertionError("a cache implements num_bytes")


class PlainCache(LevelCache):
    """Keys and values in the dtype they are computed in (bf16 or float32)."""

    def __init__(
        self,
        config: InfinityConfig,
        schedule: Schedule,
        *,
        rows: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (rows, config.num_heads, schedule.num_cached_tokens, config.head_dim)
        self.kv = [
            torch.empty(2, *shape, dtype=dtype, device=device) for _ in range(config.depth)
        ]

    def attend_level(self, layer: int, level: Level, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        past_k, past_v = self.kv[layer]
        if level.is_last:
            k = torch.cat([past_k[:, :, : level.offset], k], dim=2)
            v = torch.cat([past_v[:, :, : level.offset], v], dim=2)
        else:
            past_k[:, :, level.offset : level.end] = k
            past_v[:, :, level.offset : level.end] = v
            k, v = past_k[:, :, : level.end], past_v[:, :, : level.end]
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)

    @property
    def num_bytes(self) -> int:
        return sum(kv.numel() * kv.element_size() for kv in self.kv)
