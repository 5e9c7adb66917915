"""Calibration data, streamed: one generation per prompt, then one block at a time.

The generations are recorded as bits. From the bits the input of block 0 follows for all levels at
once, and from there each block's inputs are the outputs of the block before: exact, because level
s of block i depends only on levels up to s of block i - 1.

Shapes: R guidance rows, L tokens of all levels, C embed_dim, K input channels, T sampled tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from var_compressor.models.bits import teacher_inputs
from var_compressor.models.sampling import Sampling
from var_compressor.models.schedule import Schedule
from var_compressor.models.transformer import Block, KVCache, TextContext, TextFeatures
from var_compressor.pipeline import InfinityPipeline

Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class Recording:
    """One generation: the text it was drawn for and the bits of every level."""

    text: TextFeatures
    bits: tuple[Tensor, ...]


@dataclass(frozen=True)
class CalibrationTrace:
    """Generations to calibrate on, all with one schedule, guided or not."""

    recordings: tuple[Recording, ...]
    schedule: Schedule
    guided: bool


def record_trace(
    pipeline: InfinityPipeline,
    prompts: Sequence[str],
    *,
    seed: int,
    sampling: Sampling,
    aspect_ratio: float,
    pixel_budget: str | None,
    on_progress: Progress,
) -> CalibrationTrace:
    """Generate once per prompt (image i with ``seed + i``) and keep what was drawn.

    Raises: ValueError for guidance inside the blocks or an early stop, which a pass over all levels
    at once cannot repeat.
    """
    if set(sampling.cfg_layers) - {0} or sampling.num_levels is not None:
        raise ValueError(
            f"calibration guides the logits and draws every level; sampling has cfg_layers "
            f"{sampling.cfg_layers}, num_levels {sampling.num_levels}"
        )
    schedule = pipeline.schedule_for(aspect_ratio, pixel_budget)
    recordings = []
    for i, prompt in enumerate(prompts):
        text = pipeline.encode([prompt])
        drawn = pipeline.draw(text, schedule, seed=seed + i, sampling=sampling, with_trace=True)
        recordings.append(Recording(text, tuple(bits.cpu() for bits in drawn.trace.bits)))
        on_progress("recording", i + 1, len(prompts))
    guided = sampling.guidance(schedule, pipeline.transformer.config.depth).is_on
    return CalibrationTrace(tuple(recordings), schedule, guided)


class InputStats:
    """The input of one linear: per-channel absmax over every token, and a sample of tokens.

    ``sample_per_call`` tokens at most are kept of each call, drawn by ``generator``.
    """

    def __init__(self, sample_per_call: int, generator: torch.Generator) -> None:
        self.sample_per_call = sample_per_call
        self.generator = generator
        self.absmax_K: Tensor | None = None
        self.num_tokens = 0
        self._samples: list[Tensor] = []

    def add(self, x_MK: Tensor) -> None:
        absmax_K = x_MK.abs().amax(0).float()
        self.absmax_K = absmax_K if self.absmax_K is None else self.absmax_K.maximum(absmax_K)
        self.num_tokens += len(x_MK)
        if len(x_MK) > self.sample_per_call:
            picked = torch.randperm(len(x_MK), generator=self.generator)[: self.sample_per_call]
            x_MK = x_MK[picked.to(x_MK.device)]
        self._samples.append(x_MK.float())

    @property
    def x_TK(self) -> Tensor:
        return torch.cat(self._samples)


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


@dataclass
class BlockStream:
    """The hidden states of every recording on their way through the blocks.

    ``run`` sends them through one block; between two runs nothing else of the model is needed.
    """

    pipeline: InfinityPipeline
    trace: CalibrationTrace
    hidden: list[Tensor] = field(default_factory=list)
    contexts: list[TextContext] = field(default_factory=list)

    def __post_init__(self) -> None:
        model = self.pipeline.transformer
        levels = self.trace.schedule.levels
        for recording in self.trace.recordings:
            context = self.pipeline.embed_text(recording.text, None, guided=self.trace.guided)
            pyramid = self.pipeline.new_pyramid(self.trace.schedule, batch=1)
            bits = [level.to(self.pipeline.device) for level in recording.bits]
            tokens_BLQ = teacher_inputs(bits, pyramid)
            x_RLC = torch.cat(
                [model.start_token(context), model.embed_bits(tokens_BLQ, context)], dim=1
            )
            self.hidden.append(model.add_level_embedding(x_RLC, levels))
            self.contexts.append(replace(context, cross_kv=()))
        self.rope = model.rotary_table(self.trace.schedule)

    def run(
        self,
        block: Block,
        new_cache: Callable[[int], KVCache],
        *,
        observe: Callable[[str, Tensor], None] = lambda name, x: None,
        names: Sequence[str] = (),
        keep_output: bool = True,
    ) -> None:
        """Send every recording through ``block``; ``new_cache(rows)`` makes a one-layer cache.

        ``observe`` sees the input ``[M, K]`` of each named linear per level, both rows together.
        """
        levels = self.trace.schedule.levels
        sizes = [level.num_tokens for level in levels]

        def split_by_level(name: str, x: Tensor) -> None:
            is_image = name != "cross_attn.kv"
            for part in x.split(sizes, dim=1) if is_image else [x]:
                observe(name, part.flatten(0, 1))

        for i, (x_RLC, context) in enumerate(zip(self.hidden, self.contexts, strict=True)):
            with observed_inputs(block, names, split_by_level):
                kv = block.cross_attn.keys_values(context.text_RTC.to(block.dtype))
                own = replace(context, cross_kv=(kv,))
                out = block(x_RLC, own, self.rope, new_cache(len(x_RLC)), 0, levels)
            if keep_output:
                self.hidden[i] = out
