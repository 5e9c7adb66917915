"""What happens to the bits when one layer alone is rounded: teacher-forced, on one recording.

Every probed layer leaves the stream of the full-precision model at its block, as a recording of its
own. How far it is from the stream behind that block is known at once; the bits are known at the
end, of all layers or of those that were furthest. Each block is read once for all of them. Kept at
a time: one hidden state per layer on its way, in the store (device, RAM, disk).

Shapes: R guidance rows, L tokens of all levels, C embed_dim, K input channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_compressor.layers.kv_cache import CodedCache
from var_compressor.layers.kv_params import CacheParams, whole_layer
from var_compressor.layers.linear import linear_specs
from var_compressor.models.agreement import BitAgreement, compare_logits
from var_compressor.models.config import InfinityConfig
from var_compressor.models.sampling import Sampling
from var_compressor.models.transformer import Block
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.activations import ActivationStore
from var_compressor.quant.calibration import (
    BlockStream,
    CalibrationTrace,
    NewCache,
    Progress,
    one_layer_cache,
)
from var_compressor.quant.kv_calibration import candidate_bits, format_of
from var_compressor.quant.linear import act_round_trip, nearest, ratio_db
from var_compressor.spec import MODULES, KVSpec, LinearSpec, QuantSpec

# the layer's keys and values, in the recipe's format
KV = "self_attn.kv"
Layer = tuple[int, str]
# rounded at a time, in float32
_TOKENS = 2048


class RoundedLinear(nn.Module):
    """A linear whose weight and input are rounded to nearest, without smoothing or branch."""

    def __init__(self, linear: nn.Linear, spec: LinearSpec) -> None:
        super().__init__()
        self.spec, self.bias = spec, linear.bias
        self.weight_NK = nearest(linear.weight, spec=spec).to(linear.weight.dtype)

    def forward(self, x_RLK: Tensor) -> Tensor:
        parts = [self._rounded(part_RLK) for part_RLK in x_RLK.split(_TOKENS, dim=1)]
        return F.linear(torch.cat(parts, dim=1), self.weight_NK, self.bias)

    def _rounded(self, x_RLK: Tensor) -> Tensor:
        shift = self.spec.shift
        return (act_round_trip(x_RLK.float() + shift, spec=self.spec) - shift).to(x_RLK.dtype)


def layers_of(spec: QuantSpec, config: InfinityConfig) -> list[Layer]:
    """Everything that the recipe rounds: (block, linear), and (block, `KV`)."""
    with torch.device("meta"):
        block = Block(config)
    found = []
    for index in range(config.depth):
        specs = linear_specs(spec, block, index)
        found += [(index, name) for name in MODULES if name in specs]
        found += [] if spec.kv.format == "bf16" else [(index, KV)]
    return found


@dataclass(frozen=True)
class Effect:
    """Of rounding one layer: ``stream_snr_db``, hidden state over its error behind the layer's
    block; and the bits against full precision, where the layer was followed to the end.
    """

    stream_snr_db: float
    agreement: BitAgreement | None


def measure(
    pipeline: InfinityPipeline,
    trace: CalibrationTrace,
    store: ActivationStore,
    spec: QuantSpec,
    *,
    num_followed: int | None,
    sampling: Sampling,
    on_progress: Progress,
) -> dict[Layer, Effect]:
    """Of rounding each layer of `layers_of`, on the first recording.

    Only the ``num_followed`` layers that disturb the hidden state most are followed to the bits;
    None follows all.
    """
    probes = _Probes(pipeline, trace, store, spec)
    for index, block in enumerate(pipeline.transformer.blocks):
        assert isinstance(block, Block)
        probes.advance(index, block)
        probes.drop_all_but(num_followed)
        on_progress("sensitivity", index + 1, len(pipeline.transformer.blocks))
    agreements = probes.compared(sampling)
    return {
        layer: Effect(snr_db, agreements.get(layer))
        for layer, snr_db in probes.stream_snr_db.items()
    }


class _Probes:
    """The full-precision stream of one recording, number 0, and those that left it."""

    def __init__(
        self,
        pipeline: InfinityPipeline,
        trace: CalibrationTrace,
        store: ActivationStore,
        spec: QuantSpec,
    ) -> None:
        self.pipeline, self.schedule, self.store, self.spec = pipeline, trace.schedule, store, spec
        self.full = BlockStream.of_trace(pipeline, trace, store, [0])
        self.left = BlockStream(pipeline, trace.schedule, {}, store)
        self.new_cache = one_layer_cache(pipeline, trace.schedule)
        self.layers = layers_of(spec, pipeline.transformer.config)
        self.numbers: dict[Layer, int] = {}
        self.stream_snr_db: dict[Layer, float] = {}

    def advance(self, index: int, block: Block) -> None:
        """Everybody through the block; its own layers leave."""
        self.left.run(block, self.new_cache, self.schedule.levels)
        here = [layer for layer in self.layers if layer[0] == index]
        for layer in here:
            # numbers of layers that were dropped, and the places of their states, serve again
            number = next(n for n in count(1) if n not in self.left.contexts)
            self.numbers[layer] = number
            self._leave(layer[1], number, block, linear_specs(self.spec, block, index))
        self.full.run(block, self.new_cache, self.schedule.levels)
        wanted_RLC = self.store.get(0)
        signal = wanted_RLC.square().sum(dtype=torch.float64)
        for layer in here:
            error_RLC = self.store.get(self.numbers[layer]) - wanted_RLC
            noise = error_RLC.square_().sum(dtype=torch.float64)
            self.stream_snr_db[layer] = ratio_db(float(signal), float(noise))

    def _leave(self, name: str, number: int, block: Block, specs: Mapping[str, LinearSpec]) -> None:
        own = {number: self.full.contexts[0]}
        stream = BlockStream(self.pipeline, self.schedule, own, self.store)
        self.store.put(number, self.store.get(0))
        if name == KV:
            stream.run(block, self._rounded_cache(), self.schedule.levels)
        else:
            with replaced(block, name, specs[name]):
                stream.run(block, self.new_cache, self.schedule.levels)
        self.left.contexts |= own

    def drop_all_but(self, num_followed: int | None) -> None:
        """Follow only those that are furthest from the stream they left."""
        followed = sorted(self.numbers, key=lambda layer: self.stream_snr_db[layer])
        for layer in followed[num_followed:] if num_followed is not None else ():
            del self.left.contexts[self.numbers.pop(layer)]

    def compared(self, sampling: Sampling) -> dict[Layer, BitAgreement]:
        wanted = self._logits(0, sampling)
        return {
            layer: compare_logits(wanted, self._logits(number, sampling)).pooled()
            for layer, number in self.numbers.items()
        }

    def _logits(self, number: int, sampling: Sampling) -> list[Tensor]:
        guidance = sampling.guidance(self.schedule, self.pipeline.transformer.config.depth)
        h_RLC, context = self.store.get(number), self.full.contexts[0]
        return [
            self.pipeline.transformer.guided_logits(
                h_RLC[:, level.offset : level.end], context, cfg
            )
            for level, cfg in zip(self.schedule.levels, guidance.scales, strict=True)
        ]

    def _rounded_cache(self) -> NewCache:
        model, device = self.pipeline.transformer, self.pipeline.device
        config = replace(model.config, depth=1, num_chunks=1)
        params = rounded_cache_params(self.spec.kv, config)
        return lambda rows: CodedCache(config, self.schedule, params, rows=rows, device=device)


def rounded_cache_params(spec: KVSpec, config: InfinityConfig) -> CacheParams:
    """All layers in the recipe's format, with scales found on the fly: no calibration."""
    format = replace(format_of(spec), dynamic=True)
    layer = whole_layer(None, nbits=min(candidate_bits(spec)), num_heads=config.num_heads)
    return CacheParams(format, (layer,) * config.depth)


@contextmanager
def replaced(block: Block, name: str, spec: LinearSpec) -> Iterator[None]:
    """The block with one linear rounded."""
    linear = block.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    block.set_submodule(name, RoundedLinear(linear, spec))
    try:
        yield
    finally:
        block.set_submodule(name, linear)


def to_json(found: Mapping[Layer, Effect]) -> dict[str, Any]:
    """By full name; the bits are null where a layer was not followed to them."""
    return {
        f"blocks.{index}.{name}": {
            "stream_snr_db": effect.stream_snr_db,
            **_bits_to_json(effect.agreement),
        }
        for (index, name), effect in found.items()
    }


def _bits_to_json(agreement: BitAgreement | None) -> dict[str, Any]:
    if agreement is None:
        keys = ("same_bit", "kl_nats", "same_bit_by_level", "kl_nats_by_level")
        return dict.fromkeys(keys)
    return {
        "same_bit": agreement.mean_same_bit,
        "kl_nats": agreement.mean_kl_nats,
        "same_bit_by_level": list(agreement.same_bit),
        "kl_nats_by_level": list(agreement.kl_nats),
    }
