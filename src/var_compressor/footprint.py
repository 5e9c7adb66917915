"""What a model takes of a GPU, part by part and stage by stage, before anything is loaded.

Tensors that stay are counted exactly, on modules without storage. What a stage allocates on top is
found by running the real code on the meta device where that code is what runs (16-bit levels, VAE),
and by the formulas of `FastLevel` where fused kernels run.

Shapes: M tokens of a level in all rows, C embed_dim, F feed-forward width, Q bits per token, N
output and K input channels, T text tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from var_compressor.layers.kv_cache import PlainCache, num_cache_bytes
from var_compressor.layers.kv_params import CacheFormat, CacheParams, whole_layer
from var_compressor.layers.linear import swap_linears
from var_compressor.live_bytes import peak_live_bytes
from var_compressor.models.bits import vae_grid
from var_compressor.models.config import InfinityConfig, VAEConfig
from var_compressor.models.directory import meta_transformer, meta_vae
from var_compressor.models.schedule import Level, Schedule
from var_compressor.models.text_encoder import T5Shape
from var_compressor.models.transformer import TextContext, combine
from var_compressor.quant.ptq import specs_by_block
from var_compressor.spec import PRESETS, QuantSpec

BLOCK_DTYPE = torch.bfloat16

# keys and values of some heads of one layer, expanded for the attention kernel: at most
ATTENTION_SCRATCH = 96 * 2**20
# cuDNN turns a convolution's input and output into its own layout
CONV_WORKSPACE = 1.0

WEIGHTS: dict[str, QuantSpec | None] = {
    "bf16": None,
    "w4a4": PRESETS["svdquant"],
}
KV_BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class ModelShape:
    """All that a model's bytes depend on.

    ``vae`` and ``text`` None where it has none. An artifact has its ``spec``, and ``kv`` if its
    cache was calibrated; of a full-precision model both are None, and still to be chosen.
    """

    name: str
    transformer: InfinityConfig
    vae: VAEConfig | None
    text: T5Shape | None
    spec: QuantSpec | None = None
    kv: CacheParams | None = None


@dataclass(frozen=True)
class Request:
    """What is to be drawn: ``batch`` guided images, of prompts of ``prompt_tokens`` each."""

    schedule: Schedule
    batch: int
    prompt_tokens: int

    @property
    def rows(self) -> int:
        """With the unconditional ones."""
        return 2 * self.batch

    @property
    def last(self) -> Level:
        """The largest level."""
        return self.schedule.levels[-1]

    @property
    def before(self) -> Level:
        return self.schedule.levels[-2]


@dataclass(frozen=True)
class Setup:
    """How a model is held and run.

    ``weights`` a key of `WEIGHTS` or "stored"; ``kv`` "bf16", "int8", "int4" or "stored", int4
    within ``kv_budget`` bytes of one image if that is set; ``text_bits`` None for features that
    were cached elsewhere; ``releases_text`` before drawing. ``chunk_tokens`` of the feed-forward
    and ``strip_rows`` of the VAE at a time, None for all; where compressed linears run in chunks,
    the weights of the text's keys and values are on the host while levels are drawn. ``unpacks``
    compressed weights to 8 bits for good (compute path w8a8). ``keeps_cache`` from image to image,
    with the text's keys and values and every level's input, as CUDA graphs do.
    """

    weights: str
    kv: str
    text_bits: int | None
    releases_text: bool
    chunk_tokens: int | None
    strip_rows: int | None
    kv_budget: int | None = None
    unpacks: bool = False
    keeps_cache: bool = False


@dataclass(frozen=True)
class Footprint:
    """Bytes of every part in each of the stages "text", "draw" and "VAE"."""

    stages: dict[str, dict[str, int]]

    @property
    def stage_bytes(self) -> dict[str, int]:
        return {name: sum(parts.values()) for name, parts in self.stages.items()}

    @property
    def peak_stage(self) -> str:
        return max(self.stage_bytes, key=lambda name: self.stage_bytes[name])

    @property
    def peak_bytes(self) -> int:
        return max(self.stage_bytes.values())


def footprint(model: ModelShape, request: Request, setup: Setup) -> Footprint:
    """The bytes of every stage; what a model lacks (a VAE, a text encoder) takes none."""
    spec = model.spec if setup.weights == "stored" else WEIGHTS[setup.weights]
    held = dict(transformer_bytes(model.transformer, spec, unpacks=setup.unpacks))
    text_stage, draw, vae_stage = {}, {}, {}
    if model.text is not None and setup.text_bits is not None:
        weights = {"text encoder": text_bytes(model.text, setup.text_bits)}
        scratch = text_scratch_bytes(model.text, setup.text_bits, request.prompt_tokens)
        text_stage = weights | {"text activations": scratch}
        draw = vae_stage = {} if setup.releases_text else weights
    if model.vae is not None:
        held["VAE weights"] = vae_bytes(model.vae)
        vae_stage = vae_stage | {
            "VAE activations": vae_scratch_bytes(model.vae, request, setup.strip_rows)
        }
    cached = {
        "text keys and values": cross_kv_bytes(model.transformer, request),
        "KV cache": kv_bytes(model, request, setup),
    }
    activations = level_bytes(model.transformer, request, setup, spec)
    draw = draw | cached | {"level activations": activations}
    if setup.keeps_cache:
        inputs = 4 * request.rows * request.schedule.num_tokens * model.transformer.embed_dim
        kept = cached | {"inputs of CUDA graphs": inputs}
        text_stage, vae_stage = text_stage | kept, vae_stage | kept
    drawing = dict(held)
    if setup.chunk_tokens is not None and spec is not None:
        drawing.pop(TEXT_WEIGHTS)
    return Footprint({"text": held | text_stage, "draw": drawing | draw, "VAE": held | vae_stage})


# --- what stays -----------------------------------------------------------------------------------


@cache
def transformer_bytes(
    config: InfinityConfig, spec: QuantSpec | None, *, unpacks: bool = False
) -> Mapping[str, int]:
    """Every tensor of a transformer, blocks in bf16 or as ``spec`` stores them, in one part each.

    ``unpacks``: with quantized weights unpacked to 8 bits, as `kernel_linear.UnpackedLinear` does.

    Raises: ValueError naming the linear whose formats, groups or rank cannot be had.
    """
    # blocks are alike, so one stands for all
    model = meta_transformer(replace(config, depth=1, num_chunks=1), BLOCK_DTYPE)
    by_block = [{}] * config.depth if spec is None else specs_by_block(spec, config)
    names = ("weights", TEXT_WEIGHTS, *_BLOCK_PARTS.values(), "biases and norms")
    parts = dict.fromkeys(names, 0)
    for items, num_blocks in Counter(tuple(sorted(one.items())) for one in by_block).items():
        block = deepcopy(model.blocks[0])
        swap_linears(block, dict(items))
        for name, tensor in block.state_dict().items():
            parts[_block_part(name, tensor)] += num_blocks * _held_bytes(name, tensor, unpacks)
    outside = [t for name, t in model.state_dict().items() if not name.startswith("blocks.")]
    parts["outside the blocks"] = sum(tensor.nbytes for tensor in outside)
    return {name: num_bytes for name, num_bytes in parts.items() if num_bytes}


@cache
def unpacked_bytes(config: InfinityConfig, spec: QuantSpec) -> int:
    """Of the weights that kernels can unpack, those of 4-bit integers, a byte each."""
    block = meta_transformer(replace(config, depth=1, num_chunks=1), BLOCK_DTYPE).blocks[0]
    weights = dict(block.named_parameters())
    return sum(
        weights[f"{name}.weight"].numel()
        for specs in specs_by_block(spec, config)
        for name, one in specs.items()
        if one.weight.format == "sint4"
    )


# of cross-attention, which read the text once
TEXT_WEIGHTS = "weights for the text"
_BLOCK_PARTS = {
    "wscales": "scales and smoothing",
    "wtscale": "scales and smoothing",
    "smooth_factor": "scales and smoothing",
    "proj_down": "low-rank branch",
    "proj_up": "low-rank branch",
}


def _block_part(name: str, tensor: Tensor) -> str:
    if name.startswith("cross_attn.kv."):
        return TEXT_WEIGHTS
    leaf = name.rpartition(".")[2]
    is_matrix = leaf == "qweight" or (leaf == "weight" and tensor.ndim == 2)
    return "weights" if is_matrix else _BLOCK_PARTS.get(leaf, "biases and norms")


def _held_bytes(name: str, tensor: Tensor, unpacks: bool) -> int:
    """Of a stored tensor, as it is held: as stored, or with the branch in a weight of bytes."""
    leaf = name.rpartition(".")[2]
    if not unpacks or leaf not in ("qweight", *_BLOCK_PARTS):
        return tensor.nbytes
    # a byte for each nibble; a float32 scale per row; smooth factors and their reciprocals
    held = {"qweight": 2 * tensor.nbytes, "wscales": 4 * len(tensor) if tensor.ndim else 0}
    return held.get(leaf, 2 * tensor.nbytes if leaf == "smooth_factor" else 0)


@cache
def vae_bytes(config: VAEConfig) -> int:
    """Encoder and decoder in bf16."""
    return sum(tensor.nbytes for tensor in meta_vae(config, BLOCK_DTYPE).state_dict().values())


@cache
def text_bytes(shape: T5Shape, nbits: int) -> int:
    """A text encoder in bf16, its linears in so many bits."""
    return shape.num_bytes(nbits)


def kv_bytes(model: ModelShape, request: Request, setup: Setup) -> int:
    """The cache of all rows, with the ranges of its codes."""
    if setup.kv_budget is not None:
        return setup.kv_budget * request.batch
    if setup.kv != "stored":
        return _whole_cache_bytes(model.transformer, request, setup.kv)
    assert model.kv is not None
    return _coded_cache_bytes(model.transformer, request, model.kv)


@cache
def _whole_cache_bytes(config: InfinityConfig, request: Request, kv: str) -> int:
    """All heads and levels in bf16, or in calibrated codes of as many bits."""
    if kv == "bf16":
        plain = PlainCache(
            config, request.schedule, rows=request.rows, dtype=BLOCK_DTYPE, device="meta"
        )
        return plain.num_bytes
    layer = whole_layer(None, nbits=KV_BITS[kv], num_heads=config.num_heads)
    format = CacheFormat(kv, dynamic=False, plain_levels=0)
    return _coded_cache_bytes(config, request, CacheParams(format, (layer,) * config.depth))


def _coded_cache_bytes(config: InfinityConfig, request: Request, params: CacheParams) -> int:
    # scale, zero point and offset of keys and of values
    ranges = 0 if params.format.dynamic else config.depth * 6 * config.embed_dim * 4
    return num_cache_bytes(params, config, request.schedule, rows=request.rows) + ranges


def cross_kv_bytes(config: InfinityConfig, request: Request) -> int:
    """Keys and values of the text in every block, bf16."""
    return config.depth * request.rows * request.prompt_tokens * 2 * config.embed_dim * 2


# --- what a stage allocates -----------------------------------------------------------------------


def text_scratch_bytes(shape: T5Shape, nbits: int, num_tokens: int) -> int:
    """Of one prompt: activations of a layer, and its largest weight where that is expanded."""
    per_token = 6 * shape.d_model + 3 * shape.d_ff
    scores = 4 * shape.num_heads * num_tokens**2
    largest = max(math.prod(size) for size in shape.linears().values())
    # to bf16, from codes of a byte
    expanded = {16: 0, 8: 2, 4: 3}[nbits] * largest
    return 4 * (num_tokens * per_token + scores) + expanded


def level_bytes(
    config: InfinityConfig, request: Request, setup: Setup, spec: QuantSpec | None
) -> int:
    """Of the largest level, from the embedding of its tokens to their bits."""
    if spec is None:
        return plain_level_bytes(config, request, has_codes=setup.kv != "bf16")
    level = FastLevel(config, request, setup.chunk_tokens, spec.low_rank.rank, setup.unpacks)
    return level.peak_bytes


@dataclass(frozen=True)
class FastLevel:
    """Buffers of a level that quantized linears with fused kernels compute.

    ``steps`` names the moments of a block at which most is alive, and sums what lives then.
    """

    config: InfinityConfig
    request: Request
    chunk_tokens: int | None
    rank: int
    unpacks: bool

    @property
    def peak_bytes(self) -> int:
        return self.around_bytes() + max(self.steps().values())

    def around_bytes(self) -> int:
        """Alive during all steps: the residual stream, two fp8 weights, and what `draw` holds.

        That is what it embedded, and what came out of the level before.
        """
        M, C, F = self._num_tokens(), self.config.embed_dim, self.config.ffn_dim
        residual, embedded = 4 * M * C, 4 * M * C
        expanded = 0 if self.unpacks else 2 * F * C
        before = 4 * self.request.rows * self.request.before.num_tokens * C
        return residual + expanded + embedded + before + self._small_bytes()

    def steps(self) -> dict[str, int]:
        M, C, F = self._num_tokens(), self.config.embed_dim, self.config.ffn_dim
        chunk = min(M, self.chunk_tokens or M)
        qkv, q, attended, update = 6 * M * C, 2 * M * C, 2 * M * C, 2 * M * C
        hidden = 2 * chunk * F
        logits = 4 * M * 2 * self.config.bits_per_token
        return {
            "qkv": self._input(M, C) + qkv,
            "attention": qkv + q + attended + ATTENTION_SCRATCH,
            "projection": attended + self._input(M, C) + update,
            "cross-attention": self._input(M, C) + q + attended + update,
            "feed-forward, widening": update + self._input(chunk, C) + hidden,
            "feed-forward, narrowing": update + hidden + self._input(chunk, F),
            # a norm in float32, twice; logits of both rows, guided, as probabilities
            "head": 8 * M * C + 4 * logits,
        }

    def _input(self, num_tokens: int, channels: int) -> int:
        """Codes of a byte, a float32 scale per group of 64, and the branch's low projection."""
        return num_tokens * (channels + 4 * channels // 64 + 2 * self.rank)

    def _num_tokens(self) -> int:
        return self.request.rows * self.request.last.num_tokens

    def _small_bytes(self) -> int:
        """The rotary table, modulation, and the latent thrice: as summed, resized, as tokens."""
        config, request = self.config, self.request
        rotary = 4 * request.schedule.num_tokens * config.head_dim
        height, width = vae_grid(request.last, patchify=config.patchify)
        latent = 4 * request.batch * config.code_dim * height * width
        return rotary + 4 * request.rows * 14 * config.embed_dim + 3 * latent


@cache
def plain_level_bytes(config: InfinityConfig, request: Request, *, has_codes: bool) -> int:
    """Of a level that 16-bit linears compute: the code of `draw` on one block without storage."""
    model = meta_transformer(replace(config, depth=1, num_chunks=1), BLOCK_DTYPE)
    rows, width, level = request.rows, config.embed_dim, request.last

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    text_kv = empty(rows, config.num_heads, 1, config.head_dim, dtype=BLOCK_DTYPE)
    context = TextContext(
        empty(rows, width), empty(rows, 1, 6, width), empty(0), ((text_kv,) * 2,), None, rows // 2
    )
    kv: Any = _ScratchCache()
    if not has_codes:
        kv = PlainCache(model.config, request.schedule, rows=rows, dtype=BLOCK_DTYPE, device="meta")
    bits = config.bits_per_token

    def compute() -> object:
        rope_2LD = empty(2, request.schedule.num_tokens, config.head_dim // 2)
        latent_BLQ, tokens_BLQ = (empty(request.batch, level.num_tokens, bits) for _ in range(2))
        before = request.before.num_tokens
        of_before = empty(request.batch, before, bits, 2)
        x_RLC = model.embed_bits(tokens_BLQ, context)
        h_RLC = model(x_RLC, (level,), context, kv, rope_2LD)
        logits_BLQ2 = combine(model.head(h_RLC, context.cond_RC), 3.0).softmax(-1)
        return latent_BLQ, of_before, logits_BLQ2

    return peak_live_bytes(compute, conv_workspace=0)


class _ScratchCache:
    """Attention of a kernel over codes: its scratch, and its output."""

    def attend(
        self, layer: int, levels: Sequence[Level], q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        scratch = q.new_empty(ATTENTION_SCRATCH, dtype=torch.uint8)
        output = torch.empty_like(v)
        del scratch
        return output


@cache
def vae_scratch_bytes(config: VAEConfig, request: Request, strip_rows: int | None) -> int:
    """Of decoding, as `VAE.decode` does on a latent without storage."""
    if strip_rows is not None and request.batch > 1:
        # one image after the other, in bf16
        one = vae_scratch_bytes(config, replace(request, batch=1), strip_rows)
        return one + (request.batch - 1) * 2 * 3 * math.prod(request.schedule.image_size)
    vae = meta_vae(config, BLOCK_DTYPE)
    size = [pixels // config.stride for pixels in request.schedule.image_size]
    latent = torch.empty(request.batch, config.code_dim, *size, device="meta")
    return latent.nbytes + peak_live_bytes(
        lambda: vae.decode(latent, strip_rows=strip_rows), conv_workspace=CONV_WORKSPACE
    )
