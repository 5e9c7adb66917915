"""Calibration data, streamed: one generation per prompt, then one block at a time.

Nothing here needs the whole model. A level's input of block i is the output of block i - 1 for that
level, which depends only on levels up to it. So all recordings go through a block together, and
then through the next one, also while they are being drawn: one pass over the blocks per level,
with every level so far at once. The result is exact, and no key or value is kept for longer than a
block.

Shapes: R guidance rows of a recording, L tokens of all levels, S sampled tokens of a row, C
embed_dim, K input channels, N output channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from var_compressor.layers.kv_cache import PlainCache
from var_compressor.models.bits import teacher_inputs
from var_compressor.models.schedule import Level, Schedule
from var_compressor.models.transformer import Block, KVCache, TextContext, TextFeatures
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.activations import ActivationStore

Progress = Callable[[str, int, int], None]  # stage, done, total
NewCache = Callable[[int], KVCache]  # rows -> a cache for one layer
Observe = Callable[[int, str, Tensor], None]  # recording, linear, its input [R, L, K]
ObserveLevel = Callable[[Level, Tensor, Tensor, Tensor], None]  # q, k, v [R, H, L, D]


@dataclass(frozen=True)
class Recording:
    """One generation: the text it was drawn for, and the bits of every level that another reads.

    The last level's bits may be there or not.
    """

    text: TextFeatures
    bits: tuple[Tensor, ...]


@dataclass(frozen=True)
class CalibrationTrace:
    """Generations to calibrate on, all with one schedule, guided or not."""

    recordings: tuple[Recording, ...]
    schedule: Schedule
    guided: bool


class BlockStream:
    """The hidden states of recordings on their way through the blocks.

    Between two blocks nothing of the model is needed but what lies outside the blocks.
    ``contexts`` belong to the recordings by their number; hidden states are in ``store``.
    """

    def __init__(
        self,
        pipeline: InfinityPipeline,
        schedule: Schedule,
        contexts: dict[int, TextContext],
        store: ActivationStore,
    ) -> None:
        self.model = pipeline.transformer
        self.contexts, self.store = contexts, store
        self.rope_2LD = self.model.rotary_table(schedule)

    @classmethod
    def of_trace(
        cls,
        pipeline: InfinityPipeline,
        trace: CalibrationTrace,
        store: ActivationStore,
        mine: Sequence[int],
    ) -> BlockStream:
        """All levels of the recordings ``mine``, before the first block."""
        texts = {i: trace.recordings[i].text for i in mine}
        contexts = contexts_of(pipeline, texts, guided=trace.guided)
        stream = cls(pipeline, trace.schedule, contexts, store)
        for i in mine:
            pyramid = pipeline.new_pyramid(trace.schedule, batch=1)
            bits = [level.to(pipeline.device) for level in trace.recordings[i].bits]
            stream.start(i, teacher_inputs(bits, pyramid), trace.schedule.levels)
        return stream

    def start(self, i: int, tokens_BLQ: Tensor | None, levels: Sequence[Level]) -> None:
        """Put a recording before the first block; tokens of all levels but the first."""
        context = self.contexts[i]
        x_RLC = self.model.start_token(context)
        if tokens_BLQ is not None:
            x_RLC = torch.cat([x_RLC, self.model.embed_bits(tokens_BLQ, context)], dim=1)
        self.store.put(i, self.model.add_level_embedding(x_RLC, levels))

    def run(
        self,
        block: Block,
        new_cache: NewCache,
        levels: Sequence[Level],
        *,
        observe: Observe | None = None,
        names: Sequence[str] = (),
        keep_output: bool = True,
    ) -> None:
        """Send every recording through ``block``; ``observe`` sees the named linears' inputs.

        The input of ``cross_attn.kv`` is the text ``[R, T, C]``.
        """
        rope_2LD = self.rope_2LD[:, : levels[-1].end]
        for i, context in self.contexts.items():
            x_RLC = self.store.get(i)
            watched = names if observe is not None else ()
            with observed_inputs(block, watched, lambda name, x, i=i: observe(i, name, x)):  # type: ignore[misc]
                kv = block.cross_attn.keys_values(context.text_RTC.to(block.dtype))
                own = replace(context, cross_kv=(kv,))
                out_RLC = block(x_RLC, own, rope_2LD, new_cache(len(x_RLC)), 0, levels)
            if keep_output:
                self.store.put(i, out_RLC)


def contexts_of(
    pipeline: InfinityPipeline, texts: dict[int, TextFeatures], *, guided: bool
) -> dict[int, TextContext]:
    on_device = {i: TextFeatures(t.packed_TE.to(pipeline.device), t.lens) for i, t in texts.items()}
    return {i: pipeline.condition(t, None, guided=guided) for i, t in on_device.items()}


class ObservedCache(PlainCache):
    """A one-layer cache that shows every level's queries, keys and values to ``observe``."""

    observe: ObserveLevel

    def attend_level(self, layer: int, level: Level, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.observe(level, q, k, v)
        return super().attend_level(layer, level, q, k, v)


def one_layer_cache(
    pipeline: InfinityPipeline,
    schedule: Schedule,
    *,
    observe: ObserveLevel = lambda level, q, k, v: None,
) -> Callable[[int], ObservedCache]:
    """Makes caches for a single block, in the dtype that the pipeline computes in."""
    model = pipeline.transformer
    config = replace(model.config, depth=1, num_chunks=1)

    def new_cache(rows: int) -> ObservedCache:
        cache = ObservedCache(
            config, schedule, rows=rows, dtype=model.block_dtype, device=pipeline.device
        )
        cache.observe = observe
        return cache

    return new_cache


@contextmanager
def observed_inputs(
    block: Block, names: Sequence[str], observe: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call ``observe(name, input)`` whenever a named linear of the block runs."""

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: observe(name, inputs[0])

    handles = [
        block.get_submodule(name).register_forward_pre_hook(hook_for(name)) for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- what is kept of a block's inputs -------------------------------------------------------------


@dataclass
class RecordedInputs:
    """What one recording put into the linears of a block.

    ``lowest``, ``highest`` float32 ``[K]`` over every token of every level; ``samples`` the input
    at the sampled tokens ``[R * S, K]``, row after row, or the whole text for ``cross_attn.kv``;
    ``rows`` the whole input ``[L, C]`` of ``self_attn.qkv`` for chosen guidance rows.
    """

    lowest: dict[str, Tensor] = field(default_factory=dict)
    highest: dict[str, Tensor] = field(default_factory=dict)
    samples: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[int, Tensor] = field(default_factory=dict)

    def add(self, name: str, x_RLK: Tensor, tokens_S: Tensor | None, rows: Sequence[int]) -> None:
        x_MK = x_RLK.flatten(0, 1)
        self.lowest[name], self.highest[name] = (x.float() for x in x_MK.aminmax(dim=0))
        picked = x_RLK if tokens_S is None else x_RLK[:, tokens_S]
        self.samples[name] = picked.flatten(0, 1).clone()
        if name == "self_attn.qkv":
            self.rows = {row: x_RLK[row].clone() for row in rows}

    def to(self, device: torch.device | str) -> RecordedInputs:
        moved = {
            name: {key: tensor.to(device) for key, tensor in tensors.items()}
            for name, tensors in vars(self).items()
        }
        return RecordedInputs(**moved)


@dataclass(frozen=True)
class TokenSample:
    """Which tokens are kept: the same number of every row, levels as even as their sizes allow.

    ``tokens[i]`` int64 ``[S]``, ascending, of recording i; ``num_rows`` guidance rows of each.
    """

    tokens: tuple[Tensor, ...]
    num_rows: int

    @staticmethod
    def of(trace: CalibrationTrace, *, max_tokens_per_level: int, seed: int) -> TokenSample:
        num_rows = 2 if trace.guided else 1
        share = max(1, max_tokens_per_level // (num_rows * len(trace.recordings)))
        tokens = tuple(
            sampled_tokens(trace.schedule, share, torch.Generator().manual_seed(seed + i))
            for i in range(len(trace.recordings))
        )
        return TokenSample(tokens, num_rows)


def sampled_tokens(schedule: Schedule, share: int, generator: torch.Generator) -> Tensor:
    """At most ``share`` positions of every level, ascending."""
    parts = [
        level.offset + torch.randperm(level.num_tokens, generator=generator)[:share].sort().values
        for level in schedule.levels
    ]
    return torch.cat(parts)


def collect_inputs(
    stream: BlockStream,
    block: Block,
    new_cache: NewCache,
    levels: Sequence[Level],
    *,
    names: Sequence[str],
    sample: TokenSample,
    whole_rows: dict[int, list[int]],
    keep_output: bool,
) -> dict[int, RecordedInputs]:
    """Send the stream through a block and keep what its linears read, by recording.

    ``whole_rows[i]``: guidance rows of recording i whose self-attention input is kept whole.
    """
    found = {i: RecordedInputs() for i in stream.contexts}
    tokens = {i: sample.tokens[i].to(stream.rope_2LD.device) for i in stream.contexts}

    def observe(i: int, name: str, x_RLK: Tensor) -> None:
        is_text = name == "cross_attn.kv"
        found[i].add(name, x_RLK, None if is_text else tokens[i], whole_rows.get(i, []))

    stream.run(block, new_cache, levels, observe=observe, names=names, keep_output=keep_output)
    return found
