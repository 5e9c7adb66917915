"""What a search for one linear compares: the output of the linear, or of the attention it feeds.

A projection that feeds an attention is judged by that attention's output, with rotary positions and
the real past keys and values of a recorded generation, because softmax forgives some errors and not
others. Only the projection under search is quantized; everything else stays as it is.

Shapes: C candidates, T tokens that the projection reads, N its outputs, K its inputs, B image rows
(every conditional and unconditional row of a recording is one), L tokens of a row, S sampled tokens
of a row, W width of the model, H heads, D head channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_compressor.models.schedule import Level
from var_compressor.models.transformer import CrossAttention, SelfAttention


class Objective(Protocol):
    """Squared error of candidates for one linear, on its recorded inputs.

    ``x_TK`` are the inputs; ``errors`` maps the linear's outputs of C candidates (float32, without
    bias) to float64 ``[C]``.
    """

    name: str
    x_TK: Tensor

    def errors(self, y_CTN: Tensor) -> Tensor: ...


class ProjectionOutput:
    """The linear's own output."""

    name = "projection output"

    def __init__(self, x_TK: Tensor, weight_NK: Tensor) -> None:
        self.x_TK = x_TK.float()
        self.wanted_TN = self.x_TK @ weight_NK.float().T

    def errors(self, y_CTN: Tensor) -> Tensor:
        return squared_distance(y_CTN, self.wanted_TN)


class SelfAttentionOutput:
    """Output of self-attention for sampled queries, for its fused q/k/v projection.

    Every token of the given rows is a key, so each query meets its real past; keys and values
    carry the candidate's error as they do in a compressed model, where the cache stores them.
    """

    name = "attention output"

    def __init__(
        self,
        attention: SelfAttention,
        x_BLC: Tensor,
        rope_2LD: Tensor,
        levels: Sequence[Level],
        queries_S: Tensor,
    ) -> None:
        self.rows, self.tokens = x_BLC.shape[:2]
        self.x_TK = x_BLC.flatten(0, 1).float()
        self.attention, self.rope_2LD = attention, rope_2LD
        self.bias_N = attention.qkv.bias.float()
        self.proj_NW = attention.proj.weight.float()
        # queries sorted by level: (positions of the queries, number of keys they see)
        self.parts = [
            (queries_S[(queries_S >= level.offset) & (queries_S < level.end)], level.end)
            for level in levels
        ]
        full_1TN = (self.x_TK @ attention.qkv.weight.float().T).unsqueeze(0)
        self.wanted_SN = self.outputs(full_1TN)[0]

    def outputs(self, y_CTN: Tensor) -> Tensor:
        """``[C, B * S, W]``."""
        qkv = (y_CTN + self.bias_N).view(-1, self.tokens, y_CTN.shape[-1])
        q_RHLD, k_RHLD, v_RHLD = self.attention.heads(qkv, self.rope_2LD)
        o_RHSD = torch.cat(
            [
                F.scaled_dot_product_attention(
                    q_RHLD[:, :, queries], k_RHLD[:, :, :end], v_RHLD[:, :, :end], scale=1.0
                )
                for queries, end in self.parts
                if len(queries)
            ],
            dim=2,
        )
        return (o_RHSD.transpose(1, 2).flatten(2) @ self.proj_NW.T).view(
            len(y_CTN), -1, len(self.proj_NW)
        )

    def errors(self, y_CTN: Tensor) -> Tensor:
        return squared_distance(self.outputs(y_CTN), self.wanted_SN)


class CrossAttentionOutput:
    """Output of cross-attention for sampled tokens, for its q or its k/v projection.

    ``queries_BSC`` sampled inputs of the q projection, ``texts`` the text ``[T, C]`` of each row.
    """

    name = "attention output"

    def __init__(
        self,
        attention: CrossAttention,
        queries_BSC: Tensor,
        texts: Sequence[Tensor],
        *,
        of_text: bool,
    ) -> None:
        self.attention, self.of_text = attention, of_text
        self.proj_NW = attention.proj.weight.float()
        self.rows = len(texts)
        lens_B = torch.tensor([len(text) for text in texts])
        device = queries_BSC.device
        starts_B1 = (lens_B.cumsum(0) - lens_B)[:, None]
        within_L = torch.arange(int(lens_B.max()))
        is_text_BL = within_L < lens_B[:, None]
        # where each row's text stands among all rows' text; padding points at its first token
        self.text_index_BL = torch.where(is_text_BL, starts_B1 + within_L, starts_B1).to(device)
        self.mask_B11L = is_text_BL[:, None, None].to(device)
        text_TC, q_TC = torch.cat(list(texts)).float(), queries_BSC.flatten(0, 1).float()
        linear, other = attention.q, attention.kv
        self.x_TK, other_TK = q_TC, text_TC
        if of_text:
            linear, other, self.x_TK, other_TK = other, linear, text_TC, q_TC
        self.bias_N = linear.bias.float()
        self.other_1TN = _projected(other, other_TK)
        self.wanted_TN = self.outputs(_projected(linear, self.x_TK) - self.bias_N)[0]

    def outputs(self, y_CTN: Tensor) -> Tensor:
        """``[C, B * S, W]``."""
        count = len(y_CTN)
        y_CTN = y_CTN + self.bias_N
        other_CTN = self.other_1TN.expand(count, -1, -1)
        q_CTN, kv_CTN = (other_CTN, y_CTN) if self.of_text else (y_CTN, other_CTN)
        kv = self.attention.split_kv(kv_CTN[:, self.text_index_BL].flatten(0, 1))
        mask = self.mask_B11L.repeat(count, 1, 1, 1)
        q_RSN = q_CTN.reshape(count * self.rows, -1, q_CTN.shape[-1])
        o_RSW = self.attention.attend(q_RSN, kv, mask)
        return (o_RSW @ self.proj_NW.T).view(count, -1, len(self.proj_NW))

    def errors(self, y_CTN: Tensor) -> Tensor:
        return squared_distance(self.outputs(y_CTN), self.wanted_TN)


def squared_distance(found_CTN: Tensor, wanted_TN: Tensor) -> Tensor:
    """Float64 ``[C]``: what separates each candidate from what is wanted."""
    return (found_CTN - wanted_TN).square().sum((1, 2), dtype=torch.float64)


def _projected(linear: nn.Linear, x_TK: Tensor) -> Tensor:
    return F.linear(x_TK, linear.weight.float(), linear.bias.float()).unsqueeze(0)
