"""KV caches behind ``attend()``: preallocated, the last level is never stored.

``attend_qkv()`` is the same from the output of the qkv projection on. On a GPU, in bf16, the common
formats do it with kernels: one pass from qkv to the cache, then scaled-dot-product attention of
torch, or one kernel that reads the codes.

Shapes: R rows, H heads, L tokens, D head_dim, N = 3*H*D, C = H*D. Keys arrive normalised and
rotated; the softmax scale is 1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from var_compressor.layers.kv_params import CacheFormat, CacheParams, LayerParams
from var_compressor.models.config import InfinityConfig
from var_compressor.models.schedule import Level, Schedule
from var_compressor.models.transformer import split_heads
from var_compressor.ops import reference as ops
from var_compressor.ops.packing import join_nibbles, unpack_int4
from var_compressor.ops.primitives import FORMATS, quantize_affine

if TYPE_CHECKING:
    from var_compressor.ops.qkv import CodesOut

# keys and values of some heads of one layer in bf16, past and present
SCRATCH_BYTES = 96 * 2**20
# rows * tokens from which expanding codes for the vendor's attention pays on Hopper
_EXPAND_FROM = 1024
_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def uses_kernels(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether a cache for this dtype makes ready for the kernels of ``attend_qkv``."""
    on_gpu = torch.device(device).type == "cuda" and dtype == torch.bfloat16
    return on_gpu and find_spec("triton") is not None


class LevelCache:
    """What all caches share: walking the levels of a call, one after the other.

    Handing several levels to ``attend`` at once (teacher forcing) does exactly what handing them
    over one by one does.
    """

    scratch: _Scratch | None = None

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

    def attend_qkv(
        self, layer: int, level: Level, qkv_RLN: Tensor, q_scale_H: Tensor, rope_2LD: Tensor
    ) -> Tensor:
        """Self-attention between its two projections, of one level: ``[R, L, C]``, contiguous.

        q_scale_H: float32, the factor of each head's unit queries. rope_2LD: float32
        ``[2, L, D/2]``, the level's part of the rotary table. Never waits for the GPU.
        """
        q, k, v = split_heads(qkv_RLN, q_scale_H, rope_2LD)
        return self.attend(layer, (level,), q, k, v).transpose(1, 2).flatten(2)

    def attend_level(self, layer: int, level: Level, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise AssertionError("a cache implements attend_level")

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        raise AssertionError("a cache implements num_bytes")

    @property
    def scratch_bytes(self) -> int:
        """Bytes allocated beside the cache, for all layers together."""
        return 0 if self.scratch is None else self.scratch.room.nbytes


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
        if uses_kernels(device, dtype):
            self.scratch = _Scratch(config, schedule, rows, device)

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

    def attend_qkv(
        self, layer: int, level: Level, qkv_RLN: Tensor, q_scale_H: Tensor, rope_2LD: Tensor
    ) -> Tensor:
        if self.scratch is None:
            return super().attend_qkv(layer, level, qkv_RLN, q_scale_H, rope_2LD)
        from var_compressor.ops.qkv import normalize_rotate

        qkv = qkv_RLN.unflatten(-1, (3, len(q_scale_H), -1))
        if level.is_last:
            past_2RHLD = self.kv[layer][:, :, :, : level.offset]

            def write_past(heads: slice, room_2RhLD: Tensor) -> None:
                room_2RhLD.copy_(past_2RHLD[:, :, heads])

            return self.scratch.attend(level, qkv, q_scale_H, rope_2LD, write_past, lambda _: None)
        kv_2RHLD = self.kv[layer][:, :, :, : level.end]
        k_out, v_out = kv_2RHLD[:, :, :, level.offset :]
        q = normalize_rotate(
            qkv, q_scale_H, rope_2LD, k_out_RHLD=k_out, v_out_RHLD=v_out, codes=None
        )
        return fastest_attention(q, *kv_2RHLD).transpose(1, 2).flatten(2)

    @property
    def num_bytes(self) -> int:
        return sum(kv.numel() * kv.element_size() for kv in self.kv)


class CodedCache(LevelCache):
    """Keys and values as codes, never dequantized: int8, int4 or e4m3, each head in its own format.

    The tokens of a level attend to each other unquantized; only what later levels read is codes.

    ``route`` of ``attend_qkv`` with kernels: attention on the codes, or the codes of a few heads at
    a time expanded for torch's attention; None for the faster one. Layers whose heads differ, drop
    levels, or have 16-bit levels or scales found on the fly go without kernels.
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
        self.route: Literal["codes", "expand"] | None = None
        is_fast = any(self._is_fast(layer) for layer in range(len(self.layers)))
        if is_fast and uses_kernels(device, torch.bfloat16):
            self.scratch = _Scratch(config, schedule, rows, device)

    def _is_fast(self, layer: int) -> bool:
        return len(self.layers[layer]) == 1 and self.layers[layer][0].is_simple

    def attend_qkv(
        self, layer: int, level: Level, qkv_RLN: Tensor, q_scale_H: Tensor, rope_2LD: Tensor
    ) -> Tensor:
        is_fast = self._is_fast(layer) and qkv_RLN.dtype == torch.bfloat16
        if self.scratch is None or not is_fast:
            return super().attend_qkv(layer, level, qkv_RLN, q_scale_H, rope_2LD)
        (group,) = self.layers[layer]
        qkv = qkv_RLN.unflatten(-1, (3, len(q_scale_H), -1))
        if (self.route or _faster_route(qkv_RLN)) == "codes":
            return group.attend_qkv(level, qkv, q_scale_H, rope_2LD)

        def write_past(heads: slice, room_2RhLD: Tensor) -> None:
            group.expand(level, heads, room_2RhLD)

        def codes(heads: slice) -> CodesOut | None:
            return group.codes_out(level, heads)

        return self.scratch.attend(level, qkv, q_scale_H, rope_2LD, write_past, codes)

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


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU; (0, 0) elsewhere, where kernels are interpreted."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _faster_route(qkv_RLN: Tensor) -> Literal["codes", "expand"]:
    rows, num_tokens, _ = qkv_RLN.shape
    is_large = rows * num_tokens >= _EXPAND_FROM
    return "expand" if is_large and _capability(qkv_RLN.device) >= (9, 0) else "codes"


def fastest_attention(q_RHLD: Tensor, k_RHLD: Tensor, v_RHLD: Tensor) -> Tensor:
    """torch's attention, cuDNN's where it can; softmax scale 1."""
    with sdpa_kernel(_BACKENDS, set_priority=True):
        return F.scaled_dot_product_attention(q_RHLD, k_RHLD, v_RHLD, scale=1.0)


class _Scratch:
    """Room for keys and values, past and present, of as many heads of a layer as fit; bf16."""

    def __init__(
        self, config: InfinityConfig, schedule: Schedule, rows: int, device: torch.device | str
    ) -> None:
        # of one head at the last level, the longest
        head_numel = 2 * rows * schedule.num_tokens * config.head_dim
        num_heads = min(config.num_heads, max(1, SCRATCH_BYTES // (2 * head_numel)))
        self.room = torch.empty(num_heads * head_numel, dtype=torch.bfloat16, device=device)

    def attend(
        self,
        level: Level,
        qkv_RL3HD: Tensor,
        q_scale_H: Tensor,
        rope_2LD: Tensor,
        write_past: Callable[[slice, Tensor], None],
        codes: Callable[[slice], CodesOut | None],
    ) -> Tensor:
        """torch's attention, some heads after the others: ``[R, L, C]``.

        ``write_past`` of the earlier levels' keys and values, of some heads, ``[2, R, h, L, D]``;
        ``codes`` says where those of this level go.
        """
        from var_compressor.ops.qkv import normalize_rotate

        R, _, _, H, D = qkv_RL3HD.shape
        step = self.room.numel() // (2 * R * level.end * D)
        outputs = []
        for start in range(0, H, step):
            heads = slice(start, min(H, start + step))
            shape = (2, R, heads.stop - start, level.end, D)
            kv_2RhLD = self.room[: torch.Size(shape).numel()].view(shape)
            write_past(heads, kv_2RhLD[:, :, :, : level.offset])
            k_out, v_out = kv_2RhLD[:, :, :, level.offset :]
            q_RhLD = normalize_rotate(
                qkv_RL3HD[:, :, :, heads], q_scale_H[heads], rope_2LD,
                k_out_RHLD=k_out, v_out_RHLD=v_out, codes=codes(heads),
            )  # fmt: skip
            outputs.append(fastest_attention(q_RhLD, *kv_2RhLD).transpose(1, 2))
        o_RLHD = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
        return o_RLHD.flatten(2)


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
        self.is_simple = not (format.dynamic or format.plain_levels or dropped)
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

    def attend_qkv(
        self, level: Level, qkv_RL3HD: Tensor, q_scale_H: Tensor, rope_2LD: Tensor
    ) -> Tensor:
        """Attention on the codes, and codes of this level: ``[R, L, C]``; if ``is_simple``."""
        from var_compressor.ops.attention import attend_codes, tiles_for
        from var_compressor.ops.qkv import normalize_rotate

        R, L, _, H, D = qkv_RL3HD.shape
        k_RHLD = torch.empty(R, H, L, D, dtype=qkv_RL3HD.dtype, device=qkv_RL3HD.device)
        q_RHLD = normalize_rotate(
            qkv_RL3HD, q_scale_H, rope_2LD,
            k_out_RHLD=k_RHLD, v_out_RHLD=None, codes=self.codes_out(level, slice(None)),
        )  # fmt: skip
        v_RHLD = qkv_RL3HD[:, :, 2].transpose(1, 2)
        cached = self._read((slice(0, level.offset), 0))
        tiles = tiles_for(L, D, _capability(qkv_RL3HD.device))
        o_RHLD = attend_codes(q_RHLD, cached, k_RHLD, v_RHLD, tiles=tiles)
        return o_RHLD.transpose(1, 2).flatten(2)

    def codes_out(self, level: Level, heads: slice) -> CodesOut | None:
        """Where codes of a level go, of some of these heads; None for the last level."""
        from var_compressor.ops.qkv import CodesOut

        if level.is_last:
            return None
        k, v = (
            one.calibrated_part(slice(level.offset, level.end), heads) for one in (self.k, self.v)
        )
        return CodesOut(k[0], v[0], k[1], k[2], v[1], v[2])

    def expand(self, level: Level, heads: slice, out_2RhLD: Tensor) -> None:
        """What the codes before a level stand for, of some of these heads, in bf16."""
        from var_compressor.ops.attention import expand_codes

        for one, out_RhLD in zip((self.k, self.v), out_2RhLD, strict=True):
            codes, scale_hD, _, offset_hD = one.calibrated_part(slice(0, level.offset), heads)
            expand_codes(codes, scale_hD, offset_hD, out_BHLD=out_RhLD)

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

    def calibrated_part(self, place: slice, heads: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes of some tokens and heads, and their ``[h, D]`` scales, zero points and offsets."""
        ranges = (self.scale_1H1D, self.zero_point_1H1D, self.offset_1H1D)
        scale_hD, zero_point_hD, offset_hD = (x[0, heads, 0] for x in ranges)
        return self.codes[:, heads, place], scale_hD, zero_point_hD, offset_hD

    def decoded(self, place: slice, number: int) -> Tensor:
        codes, scale, offset = self.get(place, number)
        codes = unpack_int4(codes) if codes.dtype == torch.uint8 else codes
        return codes.float() * scale + offset

    def tensors(self) -> list[Tensor]:
        return [self.codes, self.own_2RHSD]
