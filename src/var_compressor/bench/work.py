"""The operations and bytes that drawing images takes, counted from shapes alone.

Counted is the model's own work, the same for all ways to compute it: a low-rank branch, quantizing
inputs or a recomputation do not raise the figures of whoever needs them. A multiplication and an
addition are two operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import cast

from torch import nn

from var_compressor.models.config import InfinityConfig
from var_compressor.models.sampling import Sampling
from var_compressor.models.schedule import Schedule
from var_compressor.models.transformer import Block, Infinity


@dataclass(frozen=True)
class Work:
    """Of one ``draw``: operations, and bytes that cross the memory bus at least once a level.

    ``weight_bytes``: every level reads the blocks. ``cache_bytes``: what is stored of earlier
    levels is read by every level, and written once; tokens count alike.
    """

    linear_ops: int
    attention_ops: int
    weight_bytes: int
    cache_bytes: int


@dataclass(frozen=True)
class Batch:
    """What is drawn at once: ``text_lens`` tokens of each prompt, by ``sampling`` on ``schedule``.

    With guidance every prompt has two rows.
    """

    schedule: Schedule
    sampling: Sampling
    text_lens: tuple[int, ...]

    @property
    def num_images(self) -> int:
        return len(self.text_lens)

    def num_rows(self, config: InfinityConfig) -> int:
        guided = self.sampling.guidance(self.schedule, config.depth).is_on
        return self.num_images * (2 if guided else 1)


def count(transformer: Infinity, batch: Batch, *, kv_bytes: int) -> Work:
    """Exact operations; bytes with a cache that takes ``kv_bytes`` in all."""
    config, rows = transformer.config, batch.num_rows(transformer.config)
    return Work(
        linear_ops=linear_ops(config, batch, rows),
        attention_ops=attention_ops(config, batch, rows),
        weight_bytes=_weight_bytes(transformer, len(batch.schedule.levels)),
        cache_bytes=_cache_bytes(batch.schedule, kv_bytes),
    )


def linear_ops(config: InfinityConfig, batch: Batch, rows: int) -> int:
    C, E, Q = config.embed_dim, config.text_channels, config.bits_per_token
    schedule, text_tokens = batch.schedule, rows * max(batch.text_lens)
    # qkv, self proj, cross q, cross proj; fc1, fc2
    per_token = 3 * C * C + 3 * C * C + 2 * C * config.ffn_dim
    blocks = config.depth * (rows * schedule.num_tokens * per_token + text_tokens * 2 * C * C)
    # pooling: keys, values, proj; text_proj; ada_proj
    text = text_tokens * (2 * C * E + C * E + C * C) + rows * (C * C + 6 * C * C)
    # the first level has no bits to embed
    embedding = batch.num_images * (schedule.num_tokens - 1) * Q * C
    scales = batch.sampling.guidance(schedule, config.depth).scales
    head = 0
    for scale, level in zip(scales, schedule.levels, strict=False):
        guided = scale != 1 and 0 in batch.sampling.cfg_layers
        head_rows = rows if guided else batch.num_images
        head += head_rows * (level.num_tokens * 2 * Q * C + 2 * C * C)
    return 2 * (blocks + text + embedding + head)


def attention_ops(config: InfinityConfig, batch: Batch, rows: int) -> int:
    """Logits and outputs of self-attention, cross-attention and the pooling of the text."""
    longest, C = max(batch.text_lens), config.embed_dim
    pairs = sum(one.num_tokens * (one.end + longest) for one in batch.schedule.levels)
    return 4 * rows * C * (config.depth * pairs + longest)


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in chain(module.parameters(), module.buffers()))


def _weight_bytes(transformer: Infinity, num_levels: int) -> int:
    """Blocks, head and bit embedding once a level; what concerns the text alone once."""
    blocks = cast("list[Block]", list(transformer.blocks))
    cross_bytes = sum(parameter_bytes(block.cross_attn.kv) for block in blocks)
    text = (transformer.text_pool, transformer.text_proj, transformer.ada_proj)
    text_bytes = cross_bytes + sum(parameter_bytes(part) for part in text)
    others = (*blocks, transformer.head_ada_proj, transformer.head_proj, transformer.bit_embed)
    level_bytes = sum(parameter_bytes(part) for part in others) - cross_bytes
    return text_bytes + num_levels * level_bytes


def _cache_bytes(schedule: Schedule, kv_bytes: int) -> int:
    tokens_read = sum(level.offset for level in schedule.levels)
    return kv_bytes + kv_bytes * tokens_read // max(1, schedule.num_cached_tokens)
