"""Infinity-Tiny with the outliers of a large model: the same function in other channel ranges.

In the large models an input of the feed-forward's second linear reaches hundreds of times its
median. Here its channels are multiplied by heavy-tailed gains, which the weight's columns divide
out again; what quantizing loses on top is due to the ranges alone.

Shapes: T tokens, K channels of the feed-forward's hidden layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_compressor.models.config import InfinityConfig
from var_compressor.models.transformer import FeedForward
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.calibration import Progress, observed_inputs
from var_compressor.quant.ptq import quantize_model
from var_compressor.quant.recording import Collection
from var_compressor.quant.report import read_report
from var_compressor.spec import QuantSpec

FC2 = "ffn.fc2"
MAX_EXPONENT = 10


@dataclass(frozen=True)
class Fc2Result:
    """Output SNR of a block's quantized fc2, and the exponents of its smoothing factors."""

    snr_db: float
    alpha: float
    beta: float


class ScaledFeedForward(FeedForward):
    """A feed-forward whose hidden channels are multiplied by ``gain_K`` > 0: the same function.

    Exactly so when the gains are powers of two, which no floating-point format rounds. Its fc2
    takes no unsigned inputs, whose shift lifts what GELU alone puts out.
    """

    gain_K: Tensor

    def __init__(self, config: InfinityConfig, ffn: FeedForward, gain_K: Tensor) -> None:
        super().__init__(config)
        self.fc1 = ffn.fc1
        gain_K = gain_K.to(ffn.fc2.weight)
        self.fc2.weight = nn.Parameter(ffn.fc2.weight / gain_K, requires_grad=False)
        self.fc2.bias = ffn.fc2.bias
        self.register_buffer("gain_K", gain_K)

    def forward(self, x_RLC: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_RLC), approximate="tanh") * self.gain_K)


def max_to_median(x: Tensor) -> float:
    """Largest over median magnitude of all elements."""
    magnitude = x.abs().flatten()
    return float(magnitude.max() / (magnitude.median() + 1e-6))


@torch.inference_mode()
def fc2_inputs(pipeline: InfinityPipeline, collection: Collection) -> list[Tensor]:
    """``[T, K]`` per block: what fc2 reads while the collection's images are drawn."""
    seen: list[list[Tensor]] = [[] for _ in pipeline.transformer.blocks]
    with ExitStack() as hooks:
        for block, parts in zip(pipeline.transformer.blocks, seen, strict=True):

            def keep(name: str, x_RLK: Tensor, parts: list[Tensor] = parts) -> None:
                parts.append(x_RLK.flatten(0, 1))

            hooks.enter_context(observed_inputs(block, [FC2], keep))  # type: ignore[arg-type]
        pipeline.draw(
            pipeline.encode(list(collection.prompts.values())),
            pipeline.schedule_for(collection.aspect_ratio, collection.pixel_budget),
            seed=collection.seed,
            sampling=collection.sampling,
        )
    return [torch.cat(parts) for parts in seen]


def heavy_tailed_gains(x_TK: Tensor, *, min_ratio: float, seed: int) -> Tensor:
    """A power of two per channel, every one from 2^-n to 2^n as likely, with the smallest n that
    makes the largest value of ``x_TK`` at least ``min_ratio`` times the median.

    Raises: ValueError when no n up to MAX_EXPONENT is enough.
    """
    num_channels = x_TK.shape[1]
    for largest in range(1, MAX_EXPONENT + 1):
        generator = torch.Generator().manual_seed(seed)
        exponent_K = torch.randint(-largest, largest + 1, (num_channels,), generator=generator)
        gain_K = torch.exp2(exponent_K.float()).to(x_TK.device)
        if (ratio := max_to_median(x_TK * gain_K)) >= min_ratio:
            return gain_K
    raise ValueError(
        f"gains up to {2**MAX_EXPONENT} give max/median {ratio:.0f}, wanted {min_ratio:.0f}"
    )


def with_outliers(
    pipeline: InfinityPipeline, inputs: Sequence[Tensor], *, min_ratio: float, seed: int
) -> InfinityPipeline:
    """The same model with outliers in the ``inputs`` of fc2, given per block (``fc2_inputs``)."""
    transformer = copy.deepcopy(pipeline.transformer)
    for i, (block, x_TK) in enumerate(zip(transformer.blocks, inputs, strict=True)):
        gain_K = heavy_tailed_gains(x_TK, min_ratio=min_ratio, seed=seed + i)
        block.ffn = ScaledFeedForward(transformer.config, block.ffn, gain_K)  # type: ignore[arg-type]
    return InfinityPipeline(transformer, pipeline.vae, pipeline.text_encoder)


def quantize_fc2(
    pipeline: InfinityPipeline,
    collection: Collection,
    spec: QuantSpec,
    out: Path,
    *,
    on_progress: Progress,
) -> list[Fc2Result]:
    """Quantize Infinity-Tiny, maybe with outliers, into ``out``; what became of fc2 per block."""
    quantize_model(
        pipeline, collection, spec, base="infinity-tiny", out=out, on_progress=on_progress
    )
    report, _ = read_report(out)
    linears = [
        next(linear for linear in block["linears"] if linear["name"] == FC2)
        for block in report["blocks"]
    ]
    return [Fc2Result(one["snr_db"]["final"], one["alpha"], one["beta"]) for one in linears]


def mean_snr_db(results: Sequence[Fc2Result]) -> float:
    return sum(result.snr_db for result in results) / len(results)
