"""KV caches behind ``attend()``: preallocated, the last level is never stored.

Shapes: R rows, H heads, L tokens, D head_dim. Keys arrive normalised and rotated; the softmax
scale is 1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from var_compressor.layers.kv_params import CacheFormat, CacheParams, LayerParams
from var_compressor.models.config import InfinityConfig
from var_compressor.models.schedule import Level, Schedule
from var_compressor.ops import reference as ops
from var_compressor.ops.packing import join_nibbles, unpack_int4
from var_compressor.ops.primitives import FORMATS, quantize_affine


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
        self.kv = [torch.empty(2, *shape, dtype=dtype, device=device) for _ in range(config.depth)]

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


class CodedCache(LevelCache):
    """Keys and values as codes, never dequantized: int8, int4 or e4m3, each head in its own format.

    The tokens of a level attend to each other unquantized; only what later levels read is codes.
    """

    def __init__(
        self,
        config: InfinityConfig,
        schedule: Schedule,
        params: CacheParams,
        *,
        rows: int,
        device: torch.device | str,
    ) -> None:
        self.layers = [
            [
                _Heads(heads, layer, params.format, schedule, (rows, config.head_dim), device)
                for heads in _heads_alike(layer)
            ]
            for layer in params.layers
        ]

    def attend_level(self, layer: int, level: Level, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = torch.empty(q.shape, dtype=v.dtype, device=v.device)
        for group in self.layers[layer]:
            own = [x[:, group.heads] for x in (q, k, v)]
            o[:, group.heads] = group.attend(level, *own)
            group.store(level, *own[1:])
        return o

    def store(self, layer: int, level: Level, k: Tensor, v: Tensor) -> None:
        """Keep what later levels read of a level."""
        for group in self.layers[layer]:
            group.store(level, k[:, group.heads], v[:, group.heads])

    def stored(self, layer: int, level: Level, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``store``, and what these keys and values stand for from then on, float32.

        For measuring; 0 where a head drops the level.
        """
        self.store(layer, level, k, v)
        k, v = (torch.zeros(x.shape, device=x.device) for x in (k, v))
        for group in self.layers[layer]:
            k[:, group.heads], v[:, group.heads] = group.stored(level)
        return k, v

    def tensors(self) -> list[Tensor]:
        """Everything allocated; not the calibrated ranges, which are the model's."""
        return [tensor for groups in self.layers for group in groups for tensor in group.tensors()]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())


def num_cache_bytes(
    params: CacheParams, config: InfinityConfig, schedule: Schedule, *, rows: int
) -> int:
    """Bytes that a cache of ``rows`` rows takes."""
    return CodedCache(config, schedule, params, rows=rows, device="meta").num_bytes


def _heads_alike(layer: LayerParams) -> list[list[int]]:
    """Heads that are stored alike, together."""
    groups = defaultdict(list)
    for head, alike in enumerate(zip(layer.nbits, layer.dropped, strict=True)):
        groups[alike].append(head)
    return list(groups.values())


def _all_or_some(heads: list[int], num_heads: int, device: torch.device | str) -> slice | Tensor:
    return slice(None) if len(heads) == num_heads else torch.tensor(heads, device=device)


class _Heads:
    """Some heads of one layer that are stored alike."""

    def __init__(
        self,
        heads: list[int],
        layer: LayerParams,
        format: CacheFormat,
        schedule: Schedule,
        size: tuple[int, int],
        device: torch.device | str,
    ) -> None:
        self.heads = _all_or_some(heads, len(layer.nbits), device)
        nbits, dropped = layer.nbits[heads[0]], layer.dropped[heads[0]]
        kept = [one for one in schedule.levels[:-1] if one.index not in dropped]
        self.plain = _places([one for one in kept if one.index < format.plain_levels])
        self.coded = _places([one for one in kept if one.index >= format.plain_levels])
        rows, head_dim = size
        self.plain_kv = torch.empty(
            (2, rows, len(heads), _end(self.plain), head_dim), dtype=torch.bfloat16, device=device
        )
        coding = _Coding(nbits, is_float=format.name == "fp8")
        shape = (rows, len(heads), _end(self.coded), head_dim)
        num_scales = len(self.coded) if format.dynamic else 0
        self.k, self.v = (_Codes(shape, coding, num_scales, device) for _ in range(2))
        if layer.ranges is not None:
            ranges = {name: t[heads].unsqueeze(1) for name, t in vars(layer.ranges).items()}
            self.k.calibrated(ranges["k_scale_HD"], ranges["k_zero_point_HD"])
            self.v.calibrated(ranges["v_scale_HD"], ranges["v_zero_point_HD"])

    def attend(self, level: Level, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        num_plain = _end(self.plain, before=level.index)
        plain_k, plain_v = self.plain_kv[:, :, :, :num_plain]
        cached = [self._read(place) for place in self._past(level)]
        now = (torch.cat([plain_k.to(k), k], dim=2), torch.cat([plain_v.to(v), v], dim=2))
        return ops.attend_codes(q, cached, *now).to(v.dtype)

    def store(self, level: Level, k: Tensor, v: Tensor) -> None:
        if place := self.plain.get(level.index):
            self.plain_kv[0][:, :, place], self.plain_kv[1][:, :, place] = k, v
        if place := self.coded.get(level.index):
            number = list(self.coded).index(level.index)
            self.k.put(place, number, k)
            self.v.put(place, number, v)

    def stored(self, level: Level) -> tuple[Tensor | int, Tensor | int]:
        if place := self.plain.get(level.index):
            return self.plain_kv[0][:, :, place].float(), self.plain_kv[1][:, :, place].float()
        if place := self.coded.get(level.index):
            number = list(self.coded).index(level.index)
            return self.k.decoded(place, number), self.v.decoded(place, number)
        return 0, 0

    def _past(self, level: Level) -> list[tuple[slice, int]]:
        """Places of coded levels before this one: one for all, or one each if scales are theirs."""
        past = [place for index, place in self.coded.items() if index < level.index]
        if past and not self.k.is_dynamic:
            past = [slice(0, past[-1].stop)]
        return [(place, number) for number, place in enumerate(past)]

    def _read(self, place: tuple[slice, int]) -> ops.CodedTokens:
        k_codes, k_scale, k_offset = self.k.get(*place)
        v_codes, v_scale, v_offset = self.v.get(*place)
        return ops.CodedTokens(k_codes, v_codes, k_scale, k_offset, v_scale, v_offset)

    def tensors(self) -> list[Tensor]:
        return [self.plain_kv, *self.k.tensors(), *self.v.tensors()]


def _places(levels: Sequence[Level]) -> dict[int, slice]:
    """Where the tokens of each level are stored, side by side."""
    places, start = {}, 0
    for level in levels:
        places[level.index] = slice(start, start := start + level.num_tokens)
    return places


def _end(places: dict[int, slice], *, before: int | None = None) -> int:
    ends = [place.stop for index, place in places.items() if before is None or index < before]
    return max(ends, default=0)


@dataclass(frozen=True)
class _Coding:
    """What one code is: a signed integer of 8 or 4 bits, or e4m3."""

    nbits: int
    is_float: bool

    @property
    def dtype(self) -> torch.dtype:
        if self.is_float:
            return torch.float8_e4m3fn
        return torch.int8 if self.nbits == 8 else torch.uint8

    def encode(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        if self.is_float:
            limit = FORMATS["fp8_e4m3"].qmax
            return (x.float() / scale).clamp_(-limit, limit).to(self.dtype)
        codes = quantize_affine(x, scale, zero_point, nbits=self.nbits)
        return codes if self.nbits == 8 else join_nibbles(codes)

    def scale_and_offset(self, lowest: Tensor, highest: Tensor) -> tuple[Tensor, Tensor]:
        """Of a range, float16; a code c stands for c * scale + offset."""
        largest = torch.finfo(torch.float16).max
        if self.is_float:
            scale = torch.maximum(-lowest, highest) / FORMATS["fp8_e4m3"].qmax
            return scale.clamp(_SMALLEST, largest).half(), torch.zeros_like(scale).half()
        scale = ((highest - lowest) / (2**self.nbits - 1)).clamp(_SMALLEST, largest).half()
        offset = lowest + 2 ** (self.nbits - 1) * scale.float()
        return scale, offset.clamp(-largest, largest).half()


# the smallest normal float16: a level of one token has no range
_SMALLEST = 2.0**-14


class _Codes:
    """K or V of some heads as codes, with calibrated scales, or those of ``num_scales`` levels.

    ``own_2RHSD`` float16: scale and offset of every level, head and channel.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        coding: _Coding,
        num_scales: int,
        device: torch.device | str,
    ) -> None:
        rows, heads, num_tokens, head_dim = shape
        packed = (rows, heads, num_tokens, head_dim * coding.nbits // 8)
        self.coding, self.is_dynamic = coding, num_scales > 0
        self.codes = torch.empty(packed, dtype=coding.dtype, device=device)
        own_shape = (2, rows, heads, num_scales, head_dim)
        self.own_2RHSD = torch.empty(own_shape, dtype=torch.float16, device=device)

    def calibrated(self, scale_H1D: Tensor, zero_point_H1D: Tensor) -> None:
        """Take these for all tokens."""
        self.scale_1H1D, self.zero_point_1H1D = scale_H1D[None], zero_point_H1D[None]
        self.offset_1H1D = -self.scale_1H1D * self.zero_point_1H1D

    def put(self, place: slice, number: int, x_RHLD: Tensor) -> None:
        if not self.is_dynamic:
            scale, zero_point = self.scale_1H1D, self.zero_point_1H1D
        else:
            bounds = x_RHLD.float().aminmax(dim=2)
            self.own_2RHSD[:, :, :, number] = torch.stack(self.coding.scale_and_offset(*bounds))
            scale, offset = self.own_2RHSD[:, :, :, number, None].float()
            zero_point = -offset / scale
        self.codes[:, :, place] = self.coding.encode(x_RHLD, scale, zero_point)

    def get(self, place: slice, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scale and offset of the tokens at ``place``, which are level ``number``."""
        if not self.is_dynamic:
            return self.codes[:, :, place], self.scale_1H1D, self.offset_1H1D
        scale, offset = self.own_2RHSD[:, :, :, number, None]
        return self.codes[:, :, place], scale, offset

    def decoded(self, place: slice, number: int) -> Tensor:
        codes, scale, offset = self.get(place, number)
        codes = unpack_int4(codes) if codes.dtype == torch.uint8 else codes
        return codes.float() * scale + offset

    def tensors(self) -> list[Tensor]:
        return [self.codes, self.own_2RHSD]
