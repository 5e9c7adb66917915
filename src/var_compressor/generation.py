"""From text features to an image: levels → bits → latent → VAE.

Shapes: B images, R rows (images, then their unconditional twins), L tokens of a level, Q bits of a
token, C channels; D code channels on a grid (Y, X) of latents or pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from var_compressor.layers.compute import Policy, has_room, read_table, table_versions
from var_compressor.layers.kernel_block import (
    KernelBlock,
    kernels_run,
    linears_of,
    packed_numel,
    use_kernels,
)
from var_compressor.layers.kernel_linear import LowBitLinear, UnpackedLinear
from var_compressor.layers.kv_cache import CodedCache, LevelCache, PlainCache
from var_compressor.layers.kv_params import CacheParams
from var_compressor.layers.level_graphs import LevelGraphs, padded
from var_compressor.layers.level_logits import LevelLogits
from var_compressor.layers.linear import QuantizedLinear
from var_compressor.layers.nunchaku_linear import (
    NunchakuFeedForward,
    NunchakuLinear,
    use_nunchaku,
)
from var_compressor.models.bits import Pyramid
from var_compressor.models.sampling import Sampling, draw_noise, sample_bits, seeded_generators
from var_compressor.models.schedule import Level, Schedule
from var_compressor.models.transformer import (
    CrossAttention,
    Guidance,
    Infinity,
    TextContext,
    TextFeatures,
)
from var_compressor.models.vae import VAE

P = ParamSpec("P")
T = TypeVar("T")
# of a latent: two thirds of the memory of 256 rows, at 5 % more time
SAVING_STRIP_ROWS = 64

OnLevel = Callable[[Level, Tensor], None]


@dataclass
class Trace:
    """What one generation went through.

    ``logits[s]`` float32 ``[B, L, Q, 2]`` after guidance and temperature, before top-k/top-p;
    ``bits[s]`` uint8 ``[B, L, Q]``.
    """

    logits: list[Tensor] = field(default_factory=list)
    bits: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Drawn:
    """What the transformer drew: ``latent_BDYX`` float32, and the bytes its KV cache took."""

    latent_BDYX: Tensor
    kv_bytes: int
    trace: Trace


@dataclass(frozen=True)
class Generation:
    """Images, ``image_B3YX`` float32 in [-1, 1], and what they were decoded from."""

    image_B3YX: Tensor
    drawn: Drawn

    @property
    def latent_BDYX(self) -> Tensor:
        return self.drawn.latent_BDYX

    @property
    def kv_bytes(self) -> int:
        return self.drawn.kv_bytes

    @property
    def trace(self) -> Trace:
        return self.drawn.trace

    @property
    def uint8_BYX3(self) -> Tensor:
        """RGB, truncated to uint8 as the original does."""
        return ((self.image_B3YX + 1) / 2 * 255).to(torch.uint8).permute(0, 2, 3, 1)

    @property
    def pil(self) -> list:
        from PIL import Image

        return [Image.fromarray(image.cpu().numpy()) for image in self.uint8_BYX3]


def on_its_device(method: Callable[P, T]) -> Callable[P, T]:
    """A method of a model, with the model's GPU the current one, which kernels go to."""

    @wraps(method)
    def with_device(*args: P.args, **kwargs: P.kwargs) -> T:
        model: InfinityModel = args[0]  # type: ignore[assignment]
        if model.device.type != "cuda":
            return method(*args, **kwargs)
        with torch.cuda.device(model.device):
            return method(*args, **kwargs)

    return with_device


@dataclass(frozen=True)
class _Kept:
    """What the next image uses again, if it has the same ``key`` and parameters of the cache."""

    key: object
    kv: CacheParams | None
    logits: LevelLogits


class InfinityModel:
    """An Infinity transformer, full precision or compressed, with its VAE."""

    def __init__(self, transformer: Infinity, vae: VAE) -> None:
        if transformer.config.code_dim != vae.config.code_dim:
            raise ValueError(
                f"the transformer's codes have {transformer.config.code_dim} channels, "
                f"the VAE's {vae.config.code_dim}; they do not belong together"
            )
        self.transformer = transformer
        self.vae = vae
        self.kv_params: CacheParams | None = None
        self.saves_memory = False
        # off for who draws once: nothing would be replayed, and the cache be kept for nothing
        self.records_graphs = True
        self._kept: _Kept | None = None

    @property
    def device(self) -> torch.device:
        return self.transformer.start_position.device

    @property
    def is_compressed(self) -> bool:
        """Whether any linear is quantized."""
        kinds = (
            QuantizedLinear, LowBitLinear, UnpackedLinear, NunchakuLinear, NunchakuFeedForward
        )  # fmt: skip
        return any(isinstance(module, kinds) for module in self.transformer.modules())

    @property
    def keeps_cache(self) -> bool:
        """Whether the KV cache stays for the next image, with CUDA graphs that use it."""
        has_kernels = isinstance(self.transformer.blocks[0], KernelBlock)
        return has_kernels and self.records_graphs and not self.saves_memory

    def schedule_for(self, aspect_ratio: float, pixel_budget: str | None) -> Schedule:
        """The schedule nearest to ``aspect_ratio``; the model's own pixel budget for None."""
        return Schedule.of(aspect_ratio, pixel_budget or self.transformer.config.pixel_budget)

    @on_its_device
    def use_kernels(self, compute: str) -> str | None:
        """Let kernels run the blocks from now on; ``compute`` is one of `compute.COMPUTE`, for ours
        in Triton, or "nunchaku" for its linears.

        Calibration needs the plain blocks. Returns why kernels cannot run here, and then leaves
        everything as it is. Raises: ValueError for an unknown path, and where nunchaku is missing
        or has no kernels for this GPU.
        """
        if compute == "nunchaku":
            on_gpu = self.device.type == "cuda"
            capability = torch.cuda.get_device_capability(self.device) if on_gpu else None
            use_nunchaku(self.transformer, capability=capability)
            return None
        policy = Policy(compute, (0, 0), 1)
        obstacle = kernels_run(self.transformer)
        if obstacle is None:
            gpu = torch.cuda.get_device_properties(self.device)
            policy = replace(
                policy,
                capability=(gpu.major, gpu.minor),
                num_processors=gpu.multi_processor_count,
                table=read_table(gpu.name, table_versions()),
                has_room=has_room(packed_numel(self.transformer), gpu.total_memory),
            )
            use_kernels(self.transformer, policy)
        return obstacle

    def compute_report(
        self, schedule: Schedule, *, num_images: int, rows: int
    ) -> list[dict[str, Any]]:
        """Which path multiplies each linear at each level, and why; empty without kernels."""
        report: list[dict[str, Any]] = []
        if not isinstance(self.transformer.blocks[0], KernelBlock):
            return []
        for level in schedule.levels:
            for name, linear in linears_of(self.transformer).items():
                M = rows * level.num_tokens
                choice = linear.choice(M // num_images)
                shape = {"M": M, "N": linear.out_features, "K": linear.in_features}
                report.append({"level": level.index, "linear": name, **shape, **vars(choice)})
        return report

    def save_memory(self) -> None:
        """From now on take the least memory, at some cost of time.

        No CUDA graphs, the KV cache is freed before decoding, which goes by strips; the weights of
        cross-attention's keys and values are on the host while levels are drawn; the feed-forward
        runs for one row at a time.
        """
        self.saves_memory = True
        self.free_cache()
        for block in self.transformer.blocks:
            if isinstance(block, KernelBlock):
                block.saves_memory = True

    def free_cache(self) -> None:
        """Give back the KV cache and the graphs that the next image would have used again."""
        self._kept = None

    @on_its_device
    @torch.inference_mode()
    def draw(
        self,
        text: TextFeatures,
        schedule: Schedule,
        *,
        seed: int | Sequence[int],
        sampling: Sampling,
        negative: TextFeatures | None = None,
        forced_bits: Sequence[Tensor] = (),
        with_trace: bool = False,
        on_level: OnLevel | None = None,
    ) -> Drawn:
        """The bits of one image per row of ``text``, level by level; see ``generate``."""
        config = self.transformer.config
        guidance = sampling.guidance(schedule, config.depth)
        taus, levels = sampling.temperatures(schedule), sampling.levels(schedule)
        generators = seeded_generators(seed, len(text.lens))
        context = self.condition(text, negative, guided=guidance.is_on)
        level_logits, context = self._level_logits(schedule, context, guidance, taus)
        pyramid = self.new_pyramid(schedule, batch=context.num_images)
        trace = Trace()
        x_RLC = self.transformer.start_token(context)
        for level in levels:
            logits_BLQ2 = level_logits(level, x_RLC, context)
            noise_BLQ2 = draw_noise(generators, level, config.bits_per_token, self.device)
            bits_BLQ = sample_bits(logits_BLQ2, noise_BLQ2, sampling)
            if level.index < len(forced_bits):
                bits_BLQ = forced_bits[level.index].to(bits_BLQ)
            pyramid.add(bits_BLQ, level)
            if with_trace:
                trace.logits.append(logits_BLQ2.clone())
                trace.bits.append(bits_BLQ)
            if on_level is not None:
                on_level(level, pyramid.latent_BDYX)
            if level is not levels[-1]:
                tokens_BLQ = pyramid.tokens_for(schedule.after(level))
                x_RLC = self.transformer.embed_bits(tokens_BLQ, context)
        return Drawn(pyramid.latent_BDYX, level_logits.cache.num_bytes, trace)

    def condition(
        self, text: TextFeatures, negative: TextFeatures | None, *, guided: bool
    ) -> TextContext:
        """``embed_text`` without the blocks' own keys and values."""
        if not guided:
            return self.transformer.embed_text(text, None)
        if negative is None:
            negative = self.transformer.unconditional_text(text)
        if len(negative.lens) != len(text.lens):
            raise ValueError(f"{len(negative.lens)} negative prompts for {len(text.lens)} prompts")
        return self.transformer.embed_text(text, negative)

    def embed_text(
        self, text: TextFeatures, negative: TextFeatures | None, *, guided: bool
    ) -> TextContext:
        """Conditional rows, then unconditional ones if ``guided``, as all blocks read them."""
        return self.transformer.with_cross_kv(self.condition(text, negative, guided=guided))

    def _level_logits(
        self,
        schedule: Schedule,
        context: TextContext,
        guidance: Guidance,
        taus: tuple[float, ...],
    ) -> tuple[LevelLogits, TextContext]:
        """What makes logits of this text, and the text as it reads it.

        Blocks of kernels keep theirs, with its cache and its graphs, for the next image alike.
        """
        if not self.keeps_cache:
            context = self._read_text(context)
            cache = self.new_cache(schedule, rows=len(context.cond_RC))
            return LevelLogits(self.transformer, schedule, cache, guidance, taus), context
        context = padded(context)
        key = (schedule, tuple(context.text_RTC.shape), context.num_images, guidance, taus)
        if self._kept is None or self._kept.key != key or self._kept.kv is not self.kv_params:
            self.free_cache()
            cache = self.new_cache(schedule, rows=len(context.cond_RC))
            graphs = LevelGraphs()
            logits = LevelLogits(self.transformer, schedule, cache, guidance, taus, graphs)
            self._kept = _Kept(key, self.kv_params, logits)
        return self._kept.logits, self._kept.logits.read(context)

    def _read_text(self, context: TextContext) -> TextContext:
        if not self.saves_memory or self.device.type == "cpu":
            return self.transformer.with_cross_kv(context)
        text_RTC = context.text_RTC.to(self.transformer.block_dtype)
        cross_kv = []
        for block in self.transformer.blocks:
            cross: CrossAttention = block.cross_attn  # type: ignore[assignment]
            cross.kv.to(self.device)
            cross_kv.append(cross.keys_values(text_RTC))
            cross.kv.to("cpu")
        return replace(context, cross_kv=tuple(cross_kv))

    def decode(self, latent_BDYX: Tensor, *, strip_rows: int | None) -> Tensor:
        """The image ``[B, 3, Y, X]`` in [-1, 1]; None decodes at once, or saves memory if asked."""
        if strip_rows is None and self.saves_memory:
            strip_rows = SAVING_STRIP_ROWS
        return self._with_room(lambda: self.vae.decode(latent_BDYX, strip_rows=strip_rows))

    def _with_room(self, use: Callable[[], T]) -> T:
        """What ``use`` returns; where memory is short, without what was kept for the next image.

        Nothing is kept from then on.
        """
        try:
            return use()
        except torch.OutOfMemoryError:
            if self._kept is None:
                raise
        # outside of the except clause, whose traceback holds the tensors that were made
        self.free_cache()
        self.records_graphs = False
        torch.cuda.empty_cache()
        return use()

    def new_cache(self, schedule: Schedule, *, rows: int) -> LevelCache:
        """A KV cache of the pipeline's format: codes where parameters are there, else 16/32 bit."""
        config = self.transformer.config
        if self.kv_params is not None:
            return CodedCache(config, schedule, self.kv_params, rows=rows, device=self.device)
        dtype = self.transformer.block_dtype
        return PlainCache(config, schedule, rows=rows, dtype=dtype, device=self.device)

    def new_pyramid(self, schedule: Schedule, *, batch: int) -> Pyramid:
        return Pyramid(
            schedule,
            code_dim=self.transformer.config.code_dim,
            patchify=self.transformer.config.patchify,
            batch=batch,
            device=self.device,
        )
