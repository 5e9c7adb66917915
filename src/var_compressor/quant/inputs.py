"""All that a block's linears read, brought together: the inputs and objectives of its searches.

Shapes: B image rows, S sampled tokens of a row, L tokens of a row, K input channels, C embed_dim.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from var_compressor.models.schedule import Schedule
from var_compressor.models.transformer import Block
from var_compressor.quant.calibration import RecordedInputs, TokenSample, sampled_tokens
from var_compressor.quant.linear import LinearInputs
from var_compressor.quant.objectives import (
    CrossAttentionOutput,
    Objective,
    ProjectionOutput,
    SelfAttentionOutput,
)

# queries of each level whose attention output is compared, over all rows
_QUERIES_PER_LEVEL = 256


class BlockInputs:
    """The recorded inputs of one block, over all recordings in their order."""

    def __init__(
        self,
        block: Block,
        recorded: Mapping[int, RecordedInputs],
        sample: TokenSample,
        schedule: Schedule,
        rope_2LD: Tensor,
    ) -> None:
        self.block, self.schedule, self.rope_2LD = block, schedule, rope_2LD
        self.parts, self.num_rows = list(recorded.values()), sample.num_rows

    def of(self, name: str) -> LinearInputs:
        lowest = torch.stack([part.lowest[name] for part in self.parts])
        highest = torch.stack([part.highest[name] for part in self.parts])
        x_TK = torch.cat([part.samples[name] for part in self.parts])
        return LinearInputs(x_TK, lowest.amin(0), highest.amax(0))

    def objective(self, name: str, inputs: LinearInputs) -> Objective:
        """The attention's output for what feeds an attention, else the linear's own."""
        if name == "self_attn.qkv":
            return self._self_attention()
        if name in ("cross_attn.q", "cross_attn.kv"):
            return self._cross_attention(of_text=name == "cross_attn.kv")
        linear = self.block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        return ProjectionOutput(inputs.x_TK, linear.weight)

    def _self_attention(self) -> Objective:
        x_BLC = torch.stack([x_LC for part in self.parts for x_LC in part.rows.values()])
        share = max(1, _QUERIES_PER_LEVEL // len(x_BLC))
        queries_S = sampled_tokens(self.schedule, share, torch.Generator().manual_seed(0))
        return SelfAttentionOutput(
            self.block.self_attn,
            x_BLC,
            self.rope_2LD,
            self.schedule.levels,
            queries_S.to(x_BLC.device),
        )

    def _cross_attention(self, *, of_text: bool) -> Objective:
        queries_TC = torch.cat([part.samples["cross_attn.q"] for part in self.parts])
        texts = [
            text_TC
            for part in self.parts
            for text_TC in part.samples["cross_attn.kv"].chunk(self.num_rows)
        ]
        queries_BSC = queries_TC.unflatten(0, (len(texts), -1))
        return CrossAttentionOutput(self.block.cross_attn, queries_BSC, texts, of_text=of_text)


def rows_kept_whole(
    block: int, *, num_recordings: int, num_rows: int, tokens_per_row: int, max_tokens: int
) -> dict[int, list[int]]:
    """Guidance rows, by recording, on which a block's self-attention is judged.

    As many as ``max_tokens`` allows, one at least; the next block takes the next ones.
    """
    available = num_recordings * num_rows
    count = min(max(1, max_tokens // tokens_per_row), available)
    chosen: dict[int, list[int]] = {}
    for k in range(count):
        recording, row = divmod((block * count + k) % available, num_rows)
        chosen.setdefault(recording, []).append(row)
    return chosen
