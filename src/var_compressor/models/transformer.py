"""The Infinity transformer, full precision: text conditioning, blocks, head.

It knows nothing of quantization: linears may be replaced by assignment, and keys and values go to
whatever ``KVCache`` is handed to ``forward``.

Shapes: R rows (conditional images, then unconditional ones), B images, L tokens, T text tokens,
C embed_dim, H heads, D head_dim, E text_channels, F feed-forward width, Q bits per token.

Dtypes: everything outside the blocks is float32; block linears and attention run in the dtype of
the block's weights; the residual stream, norms, modulation, q/k normalisation and rotation are
float32 always.

Source: Infinity, Han et al. 2024 (arXiv 2412.04431); behaviour checked against recorded tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_compressor.models.config import InfinityConfig
from var_compressor.models.schedule import Level, Schedule, rotary_table

NORM_EPS = 1e-6
MAX_LOG_SCALE = math.log(100.0)


@dataclass(frozen=True)
class TextFeatures:
    """Text-encoder output of several prompts, packed without padding.

    ``packed_TE`` float ``[sum(lens), E]``; ``lens`` tokens of each prompt.
    """

    packed_TE: Tensor
    lens: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.packed_TE.ndim != 2 or sum(self.lens) != len(self.packed_TE) or min(self.lens) < 1:
            raise ValueError(
                f"text features of shape {tuple(self.packed_TE.shape)} do not fit lengths "
                f"{self.lens}; expected [sum(lens), channels] with every length >= 1"
            )

    def rows(self) -> tuple[Tensor, ...]:
        return self.packed_TE.split(self.lens)

    @staticmethod
    def concat(parts: Sequence[TextFeatures]) -> TextFeatures:
        return TextFeatures(
            torch.cat([part.packed_TE for part in parts]),
            tuple(length for part in parts for length in part.lens),
        )


@dataclass(frozen=True)
class TextContext:
    """What the transformer needs of the text, computed once per image.

    ``cond_RC`` pooled text; ``ada_R16C`` shared modulation; ``text_RTC`` what cross-attention
    reads, and ``cross_kv`` its keys and values per block, ``[R, H, T, D]`` (empty until
    ``Infinity.with_cross_kv``); ``mask_R11T`` marks
    real text tokens (None if no row is padded); ``num_images`` rows are conditional, any further
    ones are their unconditional twins.
    """

    cond_RC: Tensor
    ada_R16C: Tensor
    text_RTC: Tensor
    cross_kv: tuple[tuple[Tensor, Tensor], ...]
    mask_R11T: Tensor | None
    num_images: int

    @property
    def is_guided(self) -> bool:
        return len(self.cond_RC) > self.num_images


class KVCache(Protocol):
    """Appends the keys and values of ``levels`` and attends to everything up to each level.

    q, k, v ``[R, H, L, D]`` with L the tokens of ``levels``; k is already normalised and rotated;
    the softmax scale is 1. Returns ``[R, H, L, D]``.
    """

    def attend(
        self, layer: int, levels: Sequence[Level], q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor: ...


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: a scale per level, applied at ``layers``.

    Layer 0 stands for the logits, -k for the output of the k-th block from the end.
    """

    scales: tuple[float, ...]
    layers: tuple[int, ...] = (0,)

    @property
    def is_on(self) -> bool:
        return any(scale != 1 for scale in self.scales)

    def after_block(self, x_RLC: Tensor, block_from_end: int, levels: Sequence[Level]) -> Tensor:
        """Merge conditional and unconditional rows where this block is a guidance layer."""
        if block_from_end not in self.layers:
            return x_RLC
        scale = self.scales[levels[0].index]
        return x_RLC if scale == 1 else combine(x_RLC, scale).repeat(2, 1, 1)


def combine(x_RLC: Tensor, scale: float) -> Tensor:
    """``scale * conditional + (1 - scale) * unconditional``; rows are halved."""
    conditional, unconditional = x_RLC.chunk(2)
    return scale * conditional + (1 - scale) * unconditional


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def rotate(x_RHLD: Tensor, rope_2LD: Tensor) -> Tensor:
    """Turn each interleaved pair of channels by its angle; float32 in and out."""
    even, odd = x_RHLD.unflatten(-1, (-1, 2)).unbind(-1)
    cos_LD, sin_LD = rope_2LD
    turned = (cos_LD * even - sin_LD * odd, sin_LD * even + cos_LD * odd)
    return torch.stack(turned, dim=-1).flatten(-2)


def split_heads(
    qkv_RLN: Tensor, q_scale_H: Tensor, rope_2LD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v ``[R, H, L, D]`` of a qkv projection's output: q and k normalised and rotated.

    q_scale_H: float32, the factor of each head's unit queries.
    """
    qkv = qkv_RLN.unflatten(-1, (3, len(q_scale_H), -1))
    q_RHLD, k_RHLD, v_RHLD = qkv.permute(2, 0, 3, 1, 4)
    q_unit, k_unit = (F.normalize(x.float(), dim=-1) for x in (q_RHLD, k_RHLD))
    q_RHLD = rotate(q_unit * q_scale_H[:, None, None], rope_2LD)
    dtype = v_RHLD.dtype
    return q_RHLD.to(dtype), rotate(k_unit, rope_2LD).to(dtype), v_RHLD


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + NORM_EPS)
        return (normed * self.weight).to(x.dtype)


class TextPool(nn.Module):
    """Attentive pooling of a prompt's tokens with one learned query per head."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        width, heads = config.embed_dim, config.num_pool_heads
        self.query = nn.Parameter(torch.zeros(1, heads, width // heads))
        self.kv = nn.Linear(config.text_channels, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, text_RTE: Tensor, mask_R11T: Tensor | None) -> Tensor:
        _, heads, head_dim = self.query.shape
        k, v = self.kv(text_RTE).unflatten(-1, (2, heads, head_dim)).permute(2, 0, 3, 1, 4)
        q = self.query[:, :, None].expand(len(text_RTE), -1, -1, -1)
        pooled = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_R11T)
        return self.proj(pooled.flatten(1))


class SelfAttention(nn.Module):
    """Cosine attention: q and k are unit vectors, q times a learned scale per head."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.q_log_scale = nn.Parameter(torch.full((1, config.num_heads, 1, 1), math.log(4.0)))
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(
        self, x_RLC: Tensor, rope_2LD: Tensor, cache: KVCache, layer: int, levels: Sequence[Level]
    ) -> Tensor:
        q_RHLD, k_RHLD, v_RHLD = self.heads(self.qkv(x_RLC), rope_2LD)
        o_RHLD = cache.attend(layer, levels, q_RHLD, k_RHLD, v_RHLD)
        return self.proj(o_RHLD.transpose(1, 2).flatten(2))

    def heads(self, qkv_RLN: Tensor, rope_2LD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v ``[R, H, L, D]`` of the projection's output: q and k normalised and rotated."""
        q_scale = self.q_log_scale.float().clamp(max=MAX_LOG_SCALE).exp()
        return split_heads(qkv_RLN, q_scale.flatten(), rope_2LD)


class CrossAttention(nn.Module):
    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.embed_dim, config.embed_dim)
        self.kv = nn.Linear(config.embed_dim, 2 * config.embed_dim)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def keys_values(self, text_RTC: Tensor) -> tuple[Tensor, Tensor]:
        return self.split_kv(self.kv(text_RTC))

    def split_kv(self, kv_RTN: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[R, H, T, D]`` of the projection's output."""
        k_RHTD, v_RHTD = kv_RTN.unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return k_RHTD, v_RHTD

    def forward(self, x_RLC: Tensor, kv: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        return self.proj(self.attend(self.q(x_RLC), kv, mask))

    def attend(self, q_RLC: Tensor, kv: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """Attention to the text, heads side by side ``[R, L, C]``: the input of ``proj``."""
        q_RHLD = q_RLC.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        o_RHLD = F.scaled_dot_product_attention(q_RHLD, *kv, attn_mask=mask)
        return o_RHLD.transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, config.embed_dim)

    def forward(self, x_RLC: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_RLC), approximate="tanh"))


class Block(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; AdaLN from shared modulation."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.ada_offset = nn.Parameter(torch.zeros(1, 1, 6, config.embed_dim))
        self.self_attn = SelfAttention(config)
        self.cross_norm = nn.LayerNorm(config.embed_dim, eps=NORM_EPS)
        self.cross_attn = CrossAttention(config)
        self.ffn = FeedForward(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.ada_offset.dtype

    def forward(
        self,
        x_RLC: Tensor,
        context: TextContext,
        rope_2LD: Tensor,
        cache: KVCache,
        layer: int,
        levels: Sequence[Level],
    ) -> Tensor:
        modulation = self.ada_offset.float() + context.ada_R16C
        gain1, gain2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
        h = (layer_norm(x_RLC) * (1 + scale1) + shift1).to(self.dtype)
        x_RLC = x_RLC + gain1 * self.self_attn(h, rope_2LD, cache, layer, levels)
        norm = self.cross_norm
        h = F.layer_norm(
            x_RLC, norm.normalized_shape, norm.weight.float(), norm.bias.float(), NORM_EPS
        )
        cross = self.cross_attn(h.to(self.dtype), context.cross_kv[layer], context.mask_R11T)
        x_RLC = x_RLC + cross
        h = (layer_norm(x_RLC) * (1 + scale2) + shift2).to(self.dtype)
        return x_RLC + gain2 * self.ffn(h)


class Infinity(nn.Module):
    """The whole transformer; ``forward`` runs one level, or several at once (teacher forcing)."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.config = config
        # the dtype that block linears and attention run in
        self.block_dtype = torch.float32
        width, text = config.embed_dim, config.text_channels
        self.uncond_text = nn.Parameter(torch.randn(config.text_maxlen, text) / text**0.5)
        self.start_position = nn.Parameter(torch.zeros(1, 1, width))
        self.text_norm = RMSNorm(text)
        self.text_pool = TextPool(config)
        self.text_proj = nn.Sequential(
            nn.Linear(text, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.level_embed = nn.Embedding(config.max_levels, width)
        self.bit_embed = nn.Linear(config.bits_per_token, width)
        self.ada_proj = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_ada_proj = nn.Linear(width, 2 * width)
        self.head_proj = nn.Linear(width, 2 * config.bits_per_token)

    def set_block_dtype(self, dtype: torch.dtype) -> Infinity:
        """Blocks in ``dtype``, everything around them in float32 (the module's dtype policy)."""
        self.float()
        self.blocks.to(dtype)
        self.block_dtype = dtype
        return self

    def unconditional_text(self, text: TextFeatures) -> TextFeatures:
        """The learned unconditional features, as long as each prompt."""
        if max(text.lens) > len(self.uncond_text):
            raise ValueError(
                f"a prompt has {max(text.lens)} tokens, the model takes {len(self.uncond_text)}"
            )
        rows = [self.uncond_text[:length] for length in text.lens]
        return TextFeatures(torch.cat(rows).float(), text.lens)

    def embed_text(self, text: TextFeatures, unconditional: TextFeatures | None) -> TextContext:
        """What the text is to every block; guided when ``unconditional`` is given.

        The blocks' own share of it is added by ``with_cross_kv``.
        """
        if text.packed_TE.shape[1] != self.config.text_channels:
            raise ValueError(
                f"text features have {text.packed_TE.shape[1]} channels, the model takes "
                f"{self.config.text_channels}; were they made by another text encoder?"
            )
        both = text if unconditional is None else TextFeatures.concat([text, unconditional])
        return self.context_of(*pad_text(both), num_images=len(text.lens))

    def context_of(
        self, features_RTE: Tensor, mask_R11T: Tensor | None, *, num_images: int
    ) -> TextContext:
        """``embed_text`` of features that are padded already."""
        features_RTE = self.text_norm(features_RTE)
        cond_RC = self.text_pool(features_RTE, mask_R11T)
        ada_R16C = self.ada_proj(F.silu(cond_RC)).unflatten(-1, (1, 6, -1))
        text_RTC = self.text_proj(features_RTE)
        return TextContext(cond_RC, ada_R16C, text_RTC, (), mask_R11T, num_images)

    def with_cross_kv(self, context: TextContext) -> TextContext:
        """The context with every block's cross-attention keys and values, once per image."""
        text_RTC = context.text_RTC.to(self.block_dtype)
        cross_kv = tuple(block.cross_attn.keys_values(text_RTC) for block in self.blocks)  # type: ignore[union-attr, operator]
        return replace(context, cross_kv=cross_kv)

    def start_token(self, context: TextContext) -> Tensor:
        """Input of level 0: ``[R, 1, C]``."""
        return context.cond_RC[:, None] + self.start_position

    def embed_bits(self, tokens_BLQ: Tensor, context: TextContext) -> Tensor:
        """Input of a later level from the accumulated latent; same tokens for every row."""
        repeats = len(context.cond_RC) // len(tokens_BLQ)
        return self.bit_embed(tokens_BLQ).repeat(repeats, 1, 1)

    def add_level_embedding(self, x_RLC: Tensor, levels: Sequence[Level]) -> Tensor:
        """Tell every token which level it belongs to; the last step before the first block."""
        level_of_token = torch.cat(
            [torch.full((lv.num_tokens,), lv.index, device=x_RLC.device) for lv in levels]
        )
        return x_RLC + self.level_embed(level_of_token)

    def forward(
        self,
        x_RLC: Tensor,
        levels: Sequence[Level],
        context: TextContext,
        cache: KVCache,
        rope_2LD: Tensor,
        guidance: Guidance | None = None,
    ) -> Tensor:
        """Run consecutive ``levels``; ``rope_2LD`` is the table of the whole schedule.

        Inner guidance layers need one level at a time.
        """
        x_RLC = self.add_level_embedding(x_RLC, levels)
        rope_2LD = rope_2LD[:, levels[0].offset : levels[-1].end]
        for layer, block in enumerate(self.blocks):
            x_RLC = block(x_RLC, context, rope_2LD, cache, layer, levels)
            if guidance is not None:
                x_RLC = guidance.after_block(x_RLC, layer - len(self.blocks), levels)
        return x_RLC

    def head(self, x_RLC: Tensor, cond_RC: Tensor) -> Tensor:
        """Logits of every bit being 0 or 1: float32 ``[R, L, Q, 2]``."""
        scale_RC, shift_RC = self.head_ada_proj(F.silu(cond_RC)).chunk(2, dim=-1)
        h_RLC = layer_norm(x_RLC) * (1 + scale_RC[:, None]) + shift_RC[:, None]
        return self.head_proj(h_RLC).unflatten(-1, (-1, 2))

    def guided_logits(self, h_RLC: Tensor, context: TextContext, cfg: float) -> Tensor:
        """Logits ``[B, L, Q, 2]``; both guidance rows are combined unless cfg is 1."""
        if cfg == 1 or not context.is_guided:
            batch = context.num_images
            return self.head(h_RLC[:batch], context.cond_RC[:batch])
        return combine(self.head(h_RLC, context.cond_RC), cfg)

    def rotary_table(self, schedule: Schedule) -> Tensor:
        return rotary_table(schedule, self.config.head_dim, self.start_position.device)


def pad_text(text: TextFeatures) -> tuple[Tensor, Tensor | None]:
    """Rows padded to the longest, and the mask of real tokens (None when nothing is padded)."""
    padded_RTE = nn.utils.rnn.pad_sequence(list(text.rows()), batch_first=True)
    if min(text.lens) == max(text.lens):
        return padded_RTE, None
    lens_R = torch.tensor(text.lens, device=padded_RTE.device)
    positions_T = torch.arange(padded_RTE.shape[1], device=padded_RTE.device)
    return padded_RTE, (positions_T < lens_R[:, None])[:, None, None]
