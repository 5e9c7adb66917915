"""Two bitwise models, bit by bit: image by image, and with a part of the linears quantized.

Both models draw the same prompts with the same seeds. What they would draw next, given the bits of
full precision, is compared exactly, without the chance of sampling. The same comparison with a part
of the linears quantized tells which part costs what.

Shapes: B images, S levels, L tokens of a level, Q bits per token.
"""

from __future__ import annotations

import copy
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from var_compressor.evaluation.agreement import (
    first_divergence,
    latent_errors,
)
from var_compressor.layers.linear import QuantizedLinear
from var_compressor.models.agreement import ForcedRows, compare_logits, joined
from var_compressor.models.sampling import Sampling
from var_compressor.models.schedule import Schedule
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.calibration import Progress


@dataclass(frozen=True)
class DrawRequest:
    """What is drawn and how: a prompt and a seed per image, the same for all models.

    Raises: ValueError for a cfg per level, which teacher forcing cannot repeat.
    """

    prompts: Sequence[str]
    seeds: Sequence[int]
    sampling: Sampling
    aspect_ratio: float = 1.0
    pixel_budget: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.sampling.cfg, float | int):
            raise ValueError(
                "bits are compared with one cfg for all levels; set collect.cfg to a number"
            )

    @torch.inference_mode()
    def bits(self, pipeline: InfinityPipeline) -> list[Tensor]:
        """Drawn freely: uint8 ``[B, L, Q]`` per level."""
        schedule = pipeline.schedule_for(self.aspect_ratio, self.pixel_budget)
        text = pipeline.encode(self.prompts)
        drawn = pipeline.draw(
            text, schedule, seed=self.seeds, sampling=self.sampling, with_trace=True
        )
        return drawn.trace.bits

    def logits(self, pipeline: InfinityPipeline, bits: Sequence[Tensor]) -> list[Tensor]:
        """Teacher-forced on ``bits``: ``[B, L, Q, 2]`` per level."""
        assert isinstance(self.sampling.cfg, float | int)
        return pipeline.teacher_logits(
            self.prompts,
            bits,
            cfg=self.sampling.cfg,
            aspect_ratio=self.aspect_ratio,
            pixel_budget=self.pixel_budget,
        )


def bitwise_rows(
    full: InfinityPipeline,
    other: InfinityPipeline,
    request: DrawRequest,
    *,
    full_bits: Sequence[Tensor] | None = None,
    other_bits: Sequence[Tensor] | None = None,
) -> dict[str, Tensor]:
    """The metrics of `metrics.bits` for each image, float64 ``[B]`` on the CPU.

    Those per level stand beside, ``[B, S]``, as ``bit_agreement_level``, ``bit_kl_level`` and
    ``latent_error_level``. Bits that were drawn before (`Trace.bits`) need not be drawn again.
    """
    wanted = full_bits if full_bits is not None else request.bits(full)
    found = other_bits if other_bits is not None else request.bits(other)
    forced = compare_logits(request.logits(full, wanted), request.logits(other, wanted))
    return forced_columns(forced) | drawn_columns(full, wanted, found, request)


def forced_columns(forced: ForcedRows) -> dict[str, Tensor]:
    """The teacher-forced part of `bitwise_rows`."""
    return {
        "bit_agreement": forced.same_bit_B,
        "bit_kl": forced.kl_nats_B,
        "bit_agreement_level": forced.same_bit_BS,
        "bit_kl_level": forced.kl_nats_BS,
    }


def drawn_columns(
    pipeline: InfinityPipeline,
    wanted: Sequence[Tensor],
    found: Sequence[Tensor],
    request: DrawRequest,
) -> dict[str, Tensor]:
    """The part of `bitwise_rows` that the bits of both drawings tell, without a network."""
    schedule = pipeline.schedule_for(request.aspect_ratio, request.pixel_budget)
    wanted, found = ([one.to(pipeline.device) for one in bits] for bits in (wanted, found))
    pyramids = [pipeline.new_pyramid(schedule, batch=len(request.prompts)) for _ in range(2)]
    errors_BS = latent_errors(wanted, found, (pyramids[0], pyramids[1]))
    return {
        "first_divergence": first_divergence(wanted, found).double().cpu(),
        "latent_error": errors_BS[:, -1],
        "latent_error_level": errors_BS,
    }


# --- bits that an image carries -------------------------------------------------------------------


def packed_bits(bits: Sequence[Tensor]) -> list[str]:
    """Of `Trace.bits`, ``[B, L, Q]`` per level: each image's bits, eight to a byte, as text."""
    bits_BN = torch.cat([level.flatten(1) for level in bits], dim=1).cpu().numpy()
    return [b64encode(row.tobytes()).decode() for row in np.packbits(bits_BN, axis=1)]


def unpacked_bits(texts: Sequence[str], schedule: Schedule, bits_per_token: int) -> list[Tensor]:
    """`packed_bits` undone: uint8 ``[B, L, Q]`` per level.

    Raises: ValueError for bits of another schedule or model.
    """
    packed = [np.frombuffer(b64decode(text, validate=True), dtype=np.uint8) for text in texts]
    count = schedule.num_tokens * bits_per_token
    if any(len(row) != (count + 7) // 8 for row in packed):
        raise ValueError(f"{8 * len(packed[0])} bits of an image, expected {count}")
    bits_BN = torch.from_numpy(np.unpackbits(np.stack(packed), axis=1, count=count))
    sizes = [level.num_tokens * bits_per_token for level in schedule.levels]
    return [level.unflatten(1, (-1, bits_per_token)) for level in bits_BN.split(sizes, dim=1)]


# --- a part of the model --------------------------------------------------------------------------

# name -> globs of the linears of a block
LINEAR_GROUPS = {
    "self-attention qkv": ("self_attn.qkv",),
    "self-attention proj": ("self_attn.proj",),
    "cross-attention": ("cross_attn.*",),
    "FFN up": ("ffn.fc1",),
    "FFN down": ("ffn.fc2",),
}
NUM_BLOCK_GROUPS = 4


@dataclass(frozen=True)
class LayerGroup:
    """A part of a model that is quantized alone: globs of linears' full names, and the cache."""

    name: str
    patterns: tuple[str, ...]
    cache: bool = False


def layer_groups(compressed: InfinityPipeline) -> list[LayerGroup]:
    """Kinds of linears, then ranges of blocks, then the cache if it is quantized."""
    groups = [
        LayerGroup(name, tuple(f"blocks.*.{pattern}" for pattern in patterns))
        for name, patterns in LINEAR_GROUPS.items()
    ]
    depth = len(compressed.transformer.blocks)
    for part in torch.arange(depth).tensor_split(min(NUM_BLOCK_GROUPS, depth)):
        first, last = int(part[0]), int(part[-1])
        name = f"blocks {first}–{last}" if last > first else f"block {first}"
        groups.append(LayerGroup(name, tuple(f"blocks.{i}.*" for i in part.tolist())))
    if compressed.kv_params is not None:
        groups.append(LayerGroup("KV cache", (), cache=True))
    return groups


def only_quantized(
    full: InfinityPipeline, compressed: InfinityPipeline, group: LayerGroup
) -> InfinityPipeline:
    """Full precision but for one group; all tensors are shared with the two models.

    Raises: ValueError when none of the group's linears is quantized, or kernels run the blocks.
    """
    quantized = {
        name: module
        for name, module in compressed.transformer.named_modules()
        if isinstance(module, QuantizedLinear)
        and any(fnmatchcase(name, pattern) for pattern in group.patterns)
    }
    if group.patterns and not quantized:
        raise ValueError(
            f"{group.name}: none of these linears is quantized; give a compressed model, opened "
            'with compute="reference"'
        )
    # a copy of the modules that keeps their tensors
    tensors = chain(full.transformer.parameters(), full.transformer.buffers())
    transformer = copy.deepcopy(full.transformer, {id(tensor): tensor for tensor in tensors})
    for name, module in quantized.items():
        parent, attribute = name.rsplit(".", 1)
        setattr(transformer.get_submodule(parent), attribute, module)
    part = InfinityPipeline(transformer, full.vae, full.text_encoder)
    part.kv_params = compressed.kv_params if group.cache else None
    return part


def group_agreement(
    full: InfinityPipeline,
    compressed: InfinityPipeline,
    requests: Sequence[DrawRequest],
    *,
    on_progress: Progress,
) -> dict[str, ForcedRows]:
    """Teacher-forced agreement with full precision of the whole model and of each group alone.

    ``requests`` are batches of one schedule; the bits are those that full precision draws.
    """
    parts = {"all": compressed}
    parts |= {one.name: only_quantized(full, compressed, one) for one in layer_groups(compressed)}
    found: dict[str, list[ForcedRows]] = {name: [] for name in parts}
    for done, request in enumerate(requests):
        bits = request.bits(full)
        wanted = request.logits(full, bits)
        for name, pipeline in parts.items():
            found[name].append(compare_logits(wanted, request.logits(pipeline, bits)))
        on_progress("layer groups", done + 1, len(requests))
    return {name: joined(rows) for name, rows in found.items()}
