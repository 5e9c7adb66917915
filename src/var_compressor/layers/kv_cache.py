"""KV caches behind ``attend()``: preallocated, the last level is never stored.

Shapes: R rows, H heads, L tokens, D head_dim. Keys arrive normalised and rotated; the softmax
scale is 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from var_compressor.models.config import InfinityConfig
from var_compressor.models.schedule import Level, Schedule
from var_compressor.ops import reference as ops
from var_compressor.ops.primitives import quantize_affine


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


@dataclass(frozen=True)
class KVParams:
    """Affine parameters of one layer's cache, per head and channel.

    A code stands for x = (code - zero_point) * scale. Scales are float32 ``[H, D]``, positive; zero
    points int32 ``[H, D]``, not confined to the range of the codes.
    """

    k_scale_HD: Tensor
    k_zero_point_HD: Tensor
    v_scale_HD: Tensor
    v_zero_point_HD: Tensor

    def to(self, device: torch.device | str) -> KVParams:
        return KVParams(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def params_to_tensors(params: Sequence[KVParams]) -> dict[str, Tensor]:
    """All layers' parameters under the names they have in a file."""
    return {
        f"{layer:03d}.{name}": tensor
        for layer, one in enumerate(params)
        for name, tensor in vars(one).items()
    }


def params_from_tensors(
    tensors: Mapping[str, Tensor], config: InfinityConfig, where: str
) -> tuple[KVParams, ...]:
    """The inverse, checked against the model.

    Raises: ValueError naming the layer and tensor that is missing, foreign, mis-shaped, of another
    dtype, NaN or not positive.
    """
    shape = (config.num_heads, config.head_dim)
    names = [field.name for field in fields(KVParams)]
    known = {f"{layer:03d}.{name}" for layer in range(config.depth) for name in names}
    if foreign := sorted(tensors.keys() - known):
        raise ValueError(
            f"{where}: holds {foreign[0]}, which a model of {config.depth} layers does not have; "
            "is it from another model?"
        )
    params = []
    for layer in range(config.depth):
        one = {}
        for name in names:
            tensor = tensors.get(f"{layer:03d}.{name}")
            if tensor is None or tuple(tensor.shape) != shape:
                found = "nothing" if tensor is None else list(tensor.shape)
                raise ValueError(
                    f"{where}: layer {layer} {name} is {found}, expected {list(shape)}; "
                    "run `varc calibrate-kv` again"
                )
            is_scale = name.endswith("_scale_HD")
            dtype = torch.float32 if is_scale else torch.int32
            if tensor.dtype != dtype:
                raise ValueError(
                    f"{where}: layer {layer} {name} is {tensor.dtype}, expected {dtype}; "
                    "run `varc calibrate-kv` again"
                )
            if is_scale and not (tensor.isfinite() & (tensor > 0)).all():
                raise ValueError(
                    f"{where}: layer {layer} {name} holds values that are not finite and positive; "
                    "run `varc calibrate-kv` again"
                )
            one[name] = tensor
        params.append(KVParams(**one))
    return tuple(params)


class Int8Cache(LevelCache):
    """Keys and values as int8 codes, asymmetric per head and channel, never dequantized.

    The tokens of a level attend to each other unquantized; only what later levels read is codes.
    """

    def __init__(
        self,
        config: InfinityConfig,
        schedule: Schedule,
        params: Sequence[KVParams],
        *,
        rows: int,
        device: torch.device | str,
    ) -> None:
        shape = (2, rows, config.num_heads, schedule.num_cached_tokens, config.head_dim)
        self.codes = [torch.empty(shape, dtype=torch.int8, device=device) for _ in params]
        self.params = params

    def attend_level(self, layer: int, level: Level, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        params = self.params[layer]
        k_codes, v_codes = self.codes[layer]
        past = slice(0, level.offset)
        o = ops.attend_codes(
            q,
            k_codes[:, :, past],
            v_codes[:, :, past],
            k,
            v,
            k_scale_HD=params.k_scale_HD,
            k_zero_point_HD=params.k_zero_point_HD,
            v_scale_HD=params.v_scale_HD,
            v_zero_point_HD=params.v_zero_point_HD,
        )
        if not level.is_last:
            now = slice(level.offset, level.end)
            k_scale, k_zero = params.k_scale_HD[:, None], params.k_zero_point_HD[:, None]
            v_scale, v_zero = params.v_scale_HD[:, None], params.v_zero_point_HD[:, None]
            k_codes[:, :, now] = quantize_affine(k.float(), k_scale, k_zero, nbits=8)
            v_codes[:, :, now] = quantize_affine(v.float(), v_scale, v_zero, nbits=8)
        return o.to(v.dtype)

    @property
    def num_bytes(self) -> int:
        return sum(codes.numel() for codes in self.codes)
