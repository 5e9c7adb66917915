"""How a KV cache is stored: the format, and every layer's bits, dropped levels and ranges.

Shapes: H heads, D head_dim, S the most levels that a schedule has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from var_compressor.models.config import InfinityConfig
from var_compressor.models.schedule import PIXEL_BUDGETS
from var_compressor.models.transformer import Block

AGAIN = "run `varc calibrate-kv` again"
MAX_LEVELS = max(PIXEL_BUDGETS.values())
BITS = {"fp8": (8,), "int8": (8,), "int4": (4,), "mixed": (4, 8)}


@dataclass(frozen=True)
class CacheFormat:
    """What all layers share.

    ``name``: "int8", "int4", "mixed" (each head its own of both) or "fp8" (e4m3). ``dynamic``: the
    scale of every level, head and channel is taken from the level itself. The first
    ``plain_levels`` levels stay in bf16.
    """

    name: str
    dynamic: bool
    plain_levels: int

    @staticmethod
    def of(kv: Mapping[str, Any], where: str) -> CacheFormat:
        """Of a manifest's ``kv``. Raises: ValueError for what this program does not read."""
        types = {"name": str, "dynamic": bool, "plain_levels": int}
        found = kv.get("format")
        values = found if isinstance(found, dict) else {}
        for key, kind in types.items():
            if type(values.get(key)) is not kind:
                raise ValueError(
                    f"{where}kv.format.{key} is {values.get(key)!r}, expected {kind.__name__}"
                )
        if values["name"] not in BITS:
            raise ValueError(
                f"{where}kv.format.name is {values['name']!r}, this program reads {', '.join(BITS)}"
            )
        return CacheFormat(**{key: values[key] for key in types})


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


@dataclass(frozen=True)
class LayerParams:
    """How one layer's cache is stored.

    ``nbits`` of every head, 8 or 4; ``dropped`` levels of every head, which no later level reads;
    ``ranges`` None for scales found on the fly.
    """

    nbits: tuple[int, ...]
    dropped: tuple[tuple[int, ...], ...]
    ranges: KVParams | None


@dataclass(frozen=True)
class CacheParams:
    """All that a cache of codes needs to know of a model."""

    format: CacheFormat
    layers: tuple[LayerParams, ...]

    def to(self, device: torch.device | str) -> CacheParams:
        moved = [None if one.ranges is None else one.ranges.to(device) for one in self.layers]
        layers = [
            replace(one, ranges=ranges) for one, ranges in zip(self.layers, moved, strict=True)
        ]
        return CacheParams(self.format, tuple(layers))


def whole_layer(ranges: KVParams | None, *, nbits: int, num_heads: int) -> LayerParams:
    """Every head in as many bits, nothing dropped."""
    return LayerParams((nbits,) * num_heads, ((),) * num_heads, ranges)


def fingerprint(block: Block) -> str:
    """Tells the blocks of one model from those of another, compressed or not, in any dtype."""
    content = block.ada_offset.detach().to("cpu", torch.bfloat16).contiguous()
    return sha256(content.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


# --- in a file ------------------------------------------------------------------------------------


def params_to_tensors(params: CacheParams) -> dict[str, Tensor]:
    """All layers' parameters under the names they have in a file."""
    tensors: dict[str, Tensor] = {}
    for index, layer in enumerate(params.layers):
        dropped_HS = torch.zeros(len(layer.nbits), MAX_LEVELS, dtype=torch.bool)
        for head, levels in enumerate(layer.dropped):
            dropped_HS[head, list(levels)] = True
        found = {
            "nbits_H": torch.tensor(layer.nbits, dtype=torch.uint8),
            "dropped_HS": dropped_HS,
            **({} if layer.ranges is None else vars(layer.ranges)),
        }
        tensors |= {f"{index:03d}.{name}": tensor for name, tensor in found.items()}
    return tensors


def params_from_tensors(
    tensors: Mapping[str, Tensor], format: CacheFormat, config: InfinityConfig, where: str
) -> CacheParams:
    """The inverse, checked against the model.

    Raises: ValueError naming the layer and tensor that is missing, foreign, mis-shaped, of another
    dtype, NaN, not positive, or at odds with the format.
    """
    range_names = () if format.dynamic else tuple(field.name for field in fields(KVParams))
    names = ("nbits_H", "dropped_HS", *range_names)
    known = {f"{layer:03d}.{name}" for layer in range(config.depth) for name in names}
    if foreign := sorted(tensors.keys() - known):
        raise ValueError(
            f"{where}: holds {foreign[0]}, which a model of {config.depth} layers does not have "
            f"in {format.name}; is it from another model?"
        )
    layers = []
    for layer in range(config.depth):
        found = {
            name: _checked(
                tensors.get(f"{layer:03d}.{name}"), name, config, f"{where}: layer {layer}"
            )
            for name in names
        }
        nbits = tuple(found.pop("nbits_H").tolist())
        if not set(nbits) <= set(BITS[format.name]):
            raise ValueError(
                f"{where}: layer {layer} nbits_H holds {sorted(set(nbits))}, {format.name} has "
                f"{' or '.join(map(str, BITS[format.name]))}; {AGAIN}"
            )
        dropped = tuple(
            tuple(levels_S.nonzero().flatten().tolist()) for levels_S in found.pop("dropped_HS")
        )
        layers.append(LayerParams(nbits, dropped, KVParams(**found) if found else None))
    return CacheParams(format, tuple(layers))


def _checked(tensor: Tensor | None, name: str, config: InfinityConfig, where: str) -> Tensor:
    shape, dtype = {
        "nbits_H": ((config.num_heads,), torch.uint8),
        "dropped_HS": ((config.num_heads, MAX_LEVELS), torch.bool),
    }.get(name, ((config.num_heads, config.head_dim), torch.int32))
    if is_scale := name.endswith("_scale_HD"):
        dtype = torch.float32
    if tensor is None or tuple(tensor.shape) != shape:
        found = "nothing" if tensor is None else list(tensor.shape)
        raise ValueError(f"{where} {name} is {found}, expected {list(shape)}; {AGAIN}")
    if tensor.dtype != dtype:
        raise ValueError(f"{where} {name} is {tensor.dtype}, expected {dtype}; {AGAIN}")
    if is_scale and not (tensor.isfinite() & (tensor > 0)).all():
        raise ValueError(f"{where} {name} holds values that are not finite and positive; {AGAIN}")
    return tensor


def check_fingerprints(kv: Mapping[str, Any], blocks: Iterable[Block], where: str) -> None:
    """Raises: ValueError naming the first layer that the parameters were not found on."""
    found = [layer.get("block") for layer in kv.get("layers", ())]
    for index, (block, known) in enumerate(zip_longest(blocks, found)):
        if block is None or known != fingerprint(block):
            raise ValueError(
                f"{where}: layer {index} is of another model than the one that the ranges were "
                f"found on; {AGAIN} on this one"
            )
