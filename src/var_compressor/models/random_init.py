"""Random weights of an exact architecture, tensor by tensor, for memory and speed work.

A tensor depends on the seed and its name alone. Activations stay finite and logits spread out, so
that sampling, attention and the VAE do what they do with trained weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from var_compressor.models.text_encoder import T5Shape

# standard deviation times sqrt(fan_in), by the end of the name; 1 for every other weight
_GAINS = {
    "ada_proj.weight": 0.3,
    "head_proj.weight": 0.7,
    "self_attn.qkv.weight": 1.5,
    "decoder.conv_out.weight": 0.5,
    # T5 does not divide by sqrt(d_kv), which is 64
    "SelfAttention.q.weight": 0.125,
}
_BIAS_STD = 0.02
# fused biases of which the keys' part is zero: (parts, index of the keys)
_ZERO_KEYS = {
    "self_attn.qkv.bias": (3, 1),
    "cross_attn.kv.bias": (2, 0),
    "text_pool.kv.bias": (2, 0),
}


def random_tensors(model: nn.Module, *, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of ``model`` (on the meta device), in its dtype, on the CPU."""
    for name, like in model.state_dict().items():
        yield name, random_tensor(name, tuple(like.shape), seed=seed).to(like.dtype)


def random_t5_tensors(
    shape: T5Shape, *, dtype: torch.dtype, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a T5 encoder, in ``dtype``, on the CPU."""
    for name, size in (shape.others() | shape.linears()).items():
        yield name, random_tensor(name, size, seed=seed).to(dtype)


def random_tensor(name: str, shape: tuple[int, ...], *, seed: int) -> Tensor:
    """float32; the same for the same name, shape and seed."""
    if name.endswith("q_log_scale"):
        return torch.full(shape, math.log(4.0))
    if ".norm" in name or "_norm." in name:
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    value = torch.empty(shape).normal_(std=_std(name, shape), generator=generator)
    for ending, (num_parts, keys) in _ZERO_KEYS.items():
        if name.endswith(ending):
            value.chunk(num_parts)[keys].zero_()
    return value


def _std(name: str, shape: tuple[int, ...]) -> float:
    if name.endswith("bias"):
        return _BIAS_STD
    fan_in = math.prod(shape[1:]) if name.endswith(".weight") else shape[-1]
    gain = next((gain for ending, gain in _GAINS.items() if name.endswith(ending)), 1.0)
    if name.endswith("ada_offset"):
        gain = 0.1 * math.sqrt(fan_in)
    if name == "shared.weight":
        # as large as what the layers of T5 add to it
        gain = math.sqrt(fan_in)
    return gain / math.sqrt(fan_in)
