"""Pipelines of exact shapes without files: random weights, made on the device that runs them.

Times and memory are those of a trained model of the same shape; images are noise. A compressed
transformer is made compressed: no 16-bit copy of it ever exists.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from var_compressor.layers.kv_params import CacheFormat, CacheParams, KVParams, whole_layer
from var_compressor.layers.linear import QuantizedLinear, linear_specs, swap_linears
from var_compressor.models.config import InfinityConfig
from var_compressor.models.convert import model_config
from var_compressor.models.directory import meta_transformer, meta_vae
from var_compressor.models.random_init import random_tensor
from var_compressor.models.transformer import Infinity, TextFeatures
from var_compressor.pipeline import InfinityPipeline
from var_compressor.spec import QuantSpec

# tokens of a long prompt
TEXT_LENGTH = 77
# keys are unit vectors, values are what a normalised input and a gain of 1.5 give
K_LIMIT, V_LIMIT = 1.0, 4.0
# bits of a code in each cache
CACHES = {"int8": 8, "int4": 4}
# standard deviation of codes that are uniform from -7 to 7
_CODE_STD = (14 * 16 / 12) ** 0.5
_SAMPLE_ROWS = 16
_SMALL = 2**20


def random_pipeline(
    model: str,
    *,
    spec: QuantSpec | None,
    kv: str | None,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
) -> InfinityPipeline:
    """A random pipeline of a known shape ("infinity-2b"), without a text encoder.

    ``spec`` None is full precision; otherwise its linears have random signed 4-bit codes.
    Raises: ValueError for an unknown model, weights in another format, or an
    unknown cache.
    """
    config = model_config(model)
    transformer = meta_transformer(config.transformer, dtype)
    if spec is not None:
        for index, block in enumerate(transformer.blocks):
            swap_linears(block, linear_specs(spec, block, index))
    vae = meta_vae(config.vae, dtype)
    for network in (transformer, vae):
        network.to_empty(device=device).requires_grad_(False).eval()
        _fill(network, seed)
    pipeline = InfinityPipeline(transformer, vae, None)
    if kv is not None:
        pipeline.kv_params = plausible_ranges(config.transformer, kv).to(device)
    return pipeline


def random_text(config: InfinityConfig, *, batch: int, seed: int) -> TextFeatures:
    """Features of ``batch`` prompts of different lengths, the first one as long as it may be."""
    longest = min(TEXT_LENGTH, config.text_maxlen)
    lens = tuple(max(1, longest - 3 * i) for i in range(batch))
    generator = torch.Generator().manual_seed(seed)
    return TextFeatures(torch.randn(sum(lens), config.text_channels, generator=generator), lens)


def plausible_ranges(config: InfinityConfig, name: str) -> CacheParams:
    """Cache parameters without calibration: keys in [-1, 1], values in [-4, 4]."""
    nbits, shape = CACHES[name], (config.num_heads, config.head_dim)
    zero_HD = torch.zeros(shape, dtype=torch.int32)
    k_HD, v_HD = (torch.full(shape, 2 * limit / (2**nbits - 1)) for limit in (K_LIMIT, V_LIMIT))
    layer = whole_layer(
        KVParams(k_HD, zero_HD, v_HD, zero_HD), nbits=nbits, num_heads=config.num_heads
    )
    return CacheParams(CacheFormat(name, dynamic=False, plain_levels=0), (layer,) * config.depth)


def _fill(network: Infinity | nn.Module, seed: int) -> None:
    """Give every tensor its values, in place."""
    device = next(network.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    compressed: set[str] = set()
    for name, module in network.named_modules():
        if isinstance(module, QuantizedLinear):
            fill_quantized(module, name, generator, seed)
            compressed |= {f"{name}.{tensor}" for tensor in module.state_dict()}
    for name, tensor in network.state_dict().items():
        if name not in compressed:
            _fill_plain(tensor, name, generator, seed)


def _fill_plain(tensor: Tensor, name: str, generator: torch.Generator, seed: int) -> None:
    """As `random_init` has it; large matrices are drawn on the device."""
    if tensor.numel() <= _SMALL:
        tensor.copy_(random_tensor(name, tuple(tensor.shape), seed=seed))
    else:
        tensor.normal_(std=_std(name, tensor.shape[1:], seed), generator=generator)


def fill_quantized(
    linear: QuantizedLinear, name: str, generator: torch.Generator, seed: int
) -> None:
    """Codes and scales whose product has the variance of the linear at full precision."""
    if linear.weight_format.name != "sint4":
        raise ValueError(
            f"{name}: random weights in {linear.weight_format.name} are not made; use sint4"
        )
    std = _std(f"{name}.weight", linear.smooth_factor.shape, seed)
    linear.qweight.copy_(_random_nibbles(linear.qweight, generator))
    linear.qweight.bitwise_or_(_random_nibbles(linear.qweight, generator) << 4)
    linear.wscales.uniform_(0.5 * std / _CODE_STD, 1.5 * std / _CODE_STD, generator=generator)
    linear.smooth_factor.fill_(1)
    linear.proj_down.normal_(std=std, generator=generator)
    rank = max(1, linear.proj_up.shape[1])
    linear.proj_up.normal_(std=0.1 / rank**0.5, generator=generator)
    linear.bias.copy_(random_tensor(f"{name}.bias", tuple(linear.bias.shape), seed=seed))


def _random_nibbles(like: Tensor, generator: torch.Generator) -> Tensor:
    """Two's complement of -7 to 7, in the lower half of every byte."""
    drawn = torch.randint(
        0, 15, like.shape, dtype=torch.uint8, device=like.device, generator=generator
    )
    return drawn.add_(9).bitwise_and_(0xF)


def _std(name: str, fan_in: Sequence[int], seed: int) -> float:
    """The deviation that `random_init` gives a weight, from a few of its rows."""
    return float(random_tensor(name, (_SAMPLE_ROWS, *fan_in), seed=seed).std())
