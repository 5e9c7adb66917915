"""Logits of one image's levels, one after the other: the transformer with its cache.

Shapes: R rows (images, then their unconditional twins), B images, L tokens of a level, C channels,
Q bits of a token, T text tokens.
"""

from __future__ import annotations

from torch import Tensor

from var_compressor.layers.kv_cache import LevelCache
from var_compressor.layers.level_graphs import LevelGraphs
from var_compressor.models.schedule import Level, Schedule
from var_compressor.models.transformer import Guidance, Infinity, TextContext


class LevelLogits:
    """``cache`` is filled level by level; ``graphs``, if given, serve every image alike."""

    def __init__(
        self,
        transformer: Infinity,
        schedule: Schedule,
        cache: LevelCache,
        guidance: Guidance,
        taus: tuple[float, ...],
        graphs: LevelGraphs | None = None,
    ) -> None:
        self.transformer, self.cache, self.graphs = transformer, cache, graphs
        self.guidance, self.taus = guidance, taus
        self.rope_2LD = transformer.rotary_table(schedule)

    def read(self, context: TextContext) -> TextContext:
        """The text as the graphs read it, with the blocks' keys and values of it."""
        assert self.graphs is not None
        return self.graphs.use(context, self.transformer.with_cross_kv)

    def __call__(self, level: Level, x_RLC: Tensor, context: TextContext) -> Tensor:
        """``[B, L, Q, 2]`` after guidance and temperature; valid until the level is asked again.

        ``context`` is what `read` returned, where there are graphs.
        """
        if self.graphs is not None:
            return self.graphs(level, x_RLC, self._step)
        return self._step(level, x_RLC, context)

    def _step(self, level: Level, x_RLC: Tensor, context: TextContext) -> Tensor:
        guidance = self.guidance
        h_RLC = self.transformer(x_RLC, (level,), context, self.cache, self.rope_2LD, guidance)
        cfg = guidance.scales[level.index] if 0 in guidance.layers else 1.0
        return self.transformer.guided_logits(h_RLC, context, cfg) / self.taus[level.index]
