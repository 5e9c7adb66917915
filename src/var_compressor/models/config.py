"""Model sizes as data: what defines a transformer, a VAE and a text encoder; known presets."""

from __future__ import annotations

import math
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, TypeVar

from var_compressor.models.schedule import PIXEL_BUDGETS

T = TypeVar("T", "InfinityConfig", "VAEConfig")


@dataclass(frozen=True)
class InfinityConfig:
    """Shape of an Infinity transformer.

    ``num_chunks`` only matters for the official tensor names (``block_chunks.{chunk}.module.{i}``).
    ``patchify`` means one token covers 2x2 VAE positions, as in the 8B.
    Source: Infinity, Han et al. 2024 (arXiv 2412.04431), and its published checkpoints.
    """

    depth: int
    embed_dim: int
    num_heads: int
    num_chunks: int
    bits_per_token: int
    patchify: bool = False
    text_channels: int = 2048
    text_maxlen: int = 512
    pixel_budget: str = "1M"
    max_levels: int = 15

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads or self.head_dim % 4:
            raise ValueError(
                f"embed_dim {self.embed_dim} must split into {self.num_heads} heads "
                "whose size is a multiple of 4 (2-D rotation)"
            )
        if self.embed_dim % self.num_pool_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} is no multiple of the {self.num_pool_heads} "
                "text-pooling heads (text_channels / 128)"
            )
        if self.depth % self.num_chunks:
            raise ValueError(f"depth {self.depth} is no multiple of num_chunks {self.num_chunks}")
        if self.patchify and self.bits_per_token % 4:
            raise ValueError(f"patchify needs bits_per_token % 4 == 0, got {self.bits_per_token}")
        if self.pixel_budget not in PIXEL_BUDGETS:
            raise ValueError(
                f"pixel_budget is {self.pixel_budget!r}; use one of {', '.join(PIXEL_BUDGETS)}"
            )

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def ffn_dim(self) -> int:
        """Hidden width of the feed-forward: 4x, rounded half-to-even to a multiple of 256."""
        return round(self.embed_dim * 4 / 256) * 256

    @property
    def num_pool_heads(self) -> int:
        return self.text_channels // (64 if self.embed_dim > 4096 else 128)

    @property
    def code_dim(self) -> int:
        """Channels of the VAE latent that the bits stand for."""
        return self.bits_per_token // 4 if self.patchify else self.bits_per_token


@dataclass(frozen=True)
class VAEConfig:
    """Shape of the convolutional VAE around the binary spherical quantizer.

    ``stride`` is image pixels per latent position (16, or 8 below a patchifying transformer).
    """

    code_dim: int
    stride: int = 16
    base_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4, 4)
    num_res_blocks: int = 2
    num_norm_groups: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        if self.stride != 2 ** (len(self.channel_mult) - 1):
            raise ValueError(
                f"stride {self.stride} needs {int(math.log2(self.stride)) + 1} channel_mult "
                f"entries, got {self.channel_mult}"
            )
        for mult in self.channel_mult:
            if self.base_channels * mult % self.num_norm_groups:
                raise ValueError(
                    f"{self.base_channels * mult} channels do not split into "
                    f"{self.num_norm_groups} normalisation groups"
                )


@dataclass(frozen=True)
class ModelConfig:
    """A transformer with the VAE and the text encoder it was trained with."""

    transformer: InfinityConfig
    vae: VAEConfig
    text_encoder: str


_VAE_16_BITS = VAEConfig(code_dim=16)
FLAN_T5_XL_ID = "google/flan-t5-xl"


def _layer_model(depth: int, embed_dim: int, num_heads: int) -> ModelConfig:
    transformer = InfinityConfig(
        depth=depth, embed_dim=embed_dim, num_heads=num_heads, num_chunks=4, bits_per_token=16
    )
    return ModelConfig(transformer, _VAE_16_BITS, FLAN_T5_XL_ID)


MODELS: dict[str, ModelConfig] = {
    "infinity-2b": ModelConfig(
        InfinityConfig(depth=32, embed_dim=2048, num_heads=16, num_chunks=8, bits_per_token=32),
        VAEConfig(code_dim=32),
        FLAN_T5_XL_ID,
    ),
    "infinity-8b": ModelConfig(
        InfinityConfig(
            depth=40, embed_dim=3584, num_heads=28, num_chunks=8, bits_per_token=56, patchify=True
        ),
        VAEConfig(code_dim=14, stride=8, channel_mult=(1, 2, 4, 4)),
        FLAN_T5_XL_ID,
    ),
    "infinity-layer12": _layer_model(12, 768, 8),
    "infinity-layer16": _layer_model(16, 1152, 12),
    "infinity-layer24": _layer_model(24, 1536, 16),
    "infinity-layer32": _layer_model(32, 2080, 20),
    "infinity-layer40": _layer_model(40, 2688, 24),
    "infinity-layer48": _layer_model(48, 3360, 28),
    "infinity-tiny": ModelConfig(
        InfinityConfig(
            depth=8,
            embed_dim=256,
            num_heads=4,
            num_chunks=1,
            bits_per_token=32,
            text_channels=256,
            text_maxlen=64,
            pixel_budget="0.06M",
        ),
        VAEConfig(
            code_dim=32,
            base_channels=32,
            channel_mult=(1, 1, 2, 4, 6),
            num_res_blocks=1,
            num_norm_groups=8,
        ),
        "infinity-tiny",
    ),
}


def config_to_dict(config: InfinityConfig | VAEConfig) -> dict[str, Any]:
    """A JSON-able copy of every field."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(config).items()
    }


_JSON_TYPES: dict[str, type | tuple[type, ...]] = {
    "int": int,
    "bool": bool,
    "str": str,
    "tuple[int, ...]": (list, tuple),
}
_LARGEST_SIZE = 1 << 16


def _check_json_value(value: Any, type_name: str, where: str, name: str) -> None:
    if value is MISSING:
        raise ValueError(f"{where}: lacks {name}")
    if not isinstance(value, _JSON_TYPES[type_name]):
        raise ValueError(f"{where}: {name} is {value!r}, expected {type_name}")
    sizes = value if isinstance(value, list | tuple) else [value]
    if "int" in type_name and not all(type(n) is int and 0 < n <= _LARGEST_SIZE for n in sizes):
        raise ValueError(f"{where}: {name} is {value!r}, expected 1 to {_LARGEST_SIZE}")


def config_from_dict(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Rebuild a config from JSON values.

    Raises: ValueError naming ``where`` and every key that is unknown, missing or unusable.
    """
    known = {field.name for field in fields(cls)}
    if unknown := values.keys() - known:
        raise ValueError(f"{where}: unknown keys {sorted(unknown)}; known are {sorted(known)}")
    for field in fields(cls):
        _check_json_value(values.get(field.name, field.default), str(field.type), where, field.name)
    try:
        return cls(**values)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{where}: {error}") from None
