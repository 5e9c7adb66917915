"""What rounding costs: a tensor by itself in every format, and a linear's output in a recipe's.

Shapes: T sampled tokens (or rows of a weight), K channels, G groups of E channels, N output
channels, R rank. ``weight_T`` is how many tokens a sampled one stands for.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from var_compressor.ops.primitives import choose_affine, dequantize_affine, quantize_affine
from var_compressor.profiling.tensor_stats import GROUP, PartStats
from var_compressor.quant.linear import act_round_trip, nearest, ratio_db
from var_compressor.quant.lowrank import truncate
from var_compressor.quant.smooth import compressed_output, smoothing_factors
from var_compressor.spec import LinearSpec

NBITS = (4, 8)
# exponents of input and weight that smoothing is tried with, beside none
SMOOTHING = ((0.5, 0.0), (0.5, 0.5))
DEFAULT_RANK = 32
# of a sample, for percentiles
_EVEN_TOKENS = 512

Sqnr = dict[str, dict[str, dict[str, float]]]


def rounding_snr(x_TK: Tensor, weight_T: Tensor, lowest_K: Tensor, highest_K: Tensor) -> Sqnr:
    """Signal over rounding noise in dB, ``[format][granularity][kind]``.

    Formats int4 and int8; a range for each "group" of 64 channels of a token and for each "token",
    both as they come, or for each "channel" over all tokens, where ``lowest_K`` and ``highest_K``
    are those of every token. Kinds: "symmetric", without a zero point, and "asymmetric".
    """
    x_TGE = x_TK.float().unflatten(1, (-1, math.gcd(x_TK.shape[1], GROUP)))
    ranges = {
        "group": (x_TGE.amin(2, keepdim=True), x_TGE.amax(2, keepdim=True)),
        "token": (x_TGE.amin((1, 2), keepdim=True), x_TGE.amax((1, 2), keepdim=True)),
        "channel": tuple(x.view(1, *x_TGE.shape[1:]) for x in (lowest_K, highest_K)),
    }
    signal = _energy(x_TGE, weight_T)
    places = [(n, name, kind) for n in NBITS for name in ranges for kind in _KINDS]
    noise = torch.stack(
        [
            _energy(_KINDS[kind](x_TGE, *ranges[name], nbits=nbits).sub_(x_TGE), weight_T)
            for nbits, name, kind in places
        ]
    )
    found: Sqnr = {}
    for (nbits, name, kind), value in zip(places, noise.tolist(), strict=True):
        by_name = found.setdefault(f"int{nbits}", {})
        by_name.setdefault(name, {})[kind] = ratio_db(float(signal), value)
    return found


def _symmetric(x: Tensor, lowest: Tensor, highest: Tensor, *, nbits: int) -> Tensor:
    step = (torch.maximum(-lowest, highest) / (2 ** (nbits - 1) - 1)).clamp_min(1e-30)
    zero = torch.zeros_like(step)
    return dequantize_affine(quantize_affine(x, step, zero, nbits=nbits), step, zero)


def _asymmetric(x: Tensor, lowest: Tensor, highest: Tensor, *, nbits: int) -> Tensor:
    step, zero_point = choose_affine(lowest, highest, nbits=nbits)
    return dequantize_affine(quantize_affine(x, step, zero_point, nbits=nbits), step, zero_point)


_KINDS = {"symmetric": _symmetric, "asymmetric": _asymmetric}


def _energy(x: Tensor, weight_T: Tensor) -> Tensor:
    return (x.square().flatten(1).sum(1, dtype=torch.float64) * weight_T).sum()


def robust_variation(x_TK: Tensor, weight_T: Tensor) -> dict[str, float | None]:
    """``cv_channel_p98`` and ``cv_token_p98``: ranges from the 1st to the 99th percentile.

    Extremes alone decide about the variation of whole ranges; these leave 2 % out.
    """
    # tokens that stand for equally many, so that percentiles need no weights
    ends_T = weight_T.cumsum(0)
    steps = (torch.arange(_EVEN_TOKENS, device=x_TK.device) + 0.5) / _EVEN_TOKENS
    even_EK = x_TK[torch.searchsorted(ends_T, steps.double() * ends_T[-1])].float()
    return {
        "cv_channel_p98": _range_variation(even_EK.T.contiguous()),
        "cv_token_p98": _range_variation(even_EK),
    }


def _range_variation(rows: Tensor) -> float | None:
    """How unlike the rows' ranges without their outermost percents are."""
    ordered = rows.sort(dim=1).values
    outside = rows.shape[1] // 100
    ranges = (ordered[:, -1 - outside] - ordered[:, outside]).double()
    variation = float(ranges.std() / (ranges.mean() + 1e-6)) if len(ranges) > 1 else math.nan
    return variation if math.isfinite(variation) else None


# --- a linear -------------------------------------------------------------------------------------


def weight_report(weight_NK: Tensor, smooth_K: Tensor, rank: int, seed: int) -> dict[str, Any]:
    """Statistics of a weight, its rounding error, and what a low-rank branch holds of it.

    ``energy_in_rank``: share of the squared weight in its ``rank`` strongest directions, as it is
    and with columns multiplied by ``smooth_K``, as the branch sees it.
    """
    stats = PartStats()
    stats.add(weight_NK)
    summary = stats.summary()
    ones_N = torch.ones(len(weight_NK), dtype=torch.float64, device=weight_NK.device)
    rank = min(rank, *weight_NK.shape)
    shares = {}
    for name, matrix_NK in (("plain", weight_NK), ("smoothed", weight_NK * smooth_K)):
        matrix_NK = matrix_NK.float()
        generator = torch.Generator().manual_seed(seed)
        up_NR = truncate(matrix_NK, rank=rank, start_KP=None, generator=generator).up_NR
        shares[name] = up_NR.square().sum() / matrix_NK.square().sum().clamp_min(1e-30)
    keys = ("kurtosis", "max", "max_median_ratio", "mean", "std", "median", "group_ratio")
    snr_db = rounding_snr(weight_NK, ones_N, stats.lowest_K, stats.highest_K)
    return {
        "shape": list(weight_NK.shape),
        **{key: summary[key] for key in keys},
        "rank": rank,
        "energy_in_rank": {name: float(share) for name, share in shares.items()},
        # a row is an output channel
        "snr_db": {
            name: {"group": found["group"], "channel": found["token"]}
            for name, found in snr_db.items()
        },
    }


class OutputNoise:
    """Output of one linear on sampled inputs, rounded to nearest as ``spec`` says."""

    def __init__(
        self, linear: nn.Linear, x_TK: Tensor, weight_T: Tensor, absmax_K: Tensor, spec: LinearSpec
    ) -> None:
        self.weight_NK, self.x_TK, self.spec = linear.weight.float(), x_TK.float(), spec
        self.weight_T, self.absmax_K = weight_T, absmax_K
        self.wanted_TN = self.x_TK @ self.weight_NK.T
        self.signal = float(_energy(self.wanted_TN, weight_T))

    def snr_db(self, factors_K: Tensor, *, rank: int, seed: int) -> float:
        """With these smoothing factors, and a branch of the smoothed weight's first ``rank``."""
        smoothed_NK = self.weight_NK * factors_K
        generator = torch.Generator().manual_seed(seed)
        branch = truncate(smoothed_NK, rank=rank, start_KP=None, generator=generator)
        residual_NK = nearest(smoothed_NK - branch.up_NR @ branch.down_RK, spec=self.spec)
        y_1TN = compressed_output(
            ((self.x_TK + self.spec.shift) / factors_K).unsqueeze(0),
            factors_K.unsqueeze(0),
            (branch.up_NR.unsqueeze(0), branch.down_RK.unsqueeze(0)),
            residual_NK.unsqueeze(0),
            quantize_act=partial(act_round_trip, spec=self.spec),
            shift=self.spec.shift,
        )
        return ratio_db(self.signal, float(_energy(y_1TN[0] - self.wanted_TN, self.weight_T)))

    def candidates(self) -> list[Tensor]:
        """Smoothing factors: none, and those of `SMOOTHING`."""
        w_absmax_K = self.weight_NK.abs().amax(0)
        return [
            torch.ones_like(self.absmax_K),
            *(smoothing_factors(self.absmax_K, w_absmax_K, alpha=a, beta=b) for a, b in SMOOTHING),
        ]


def output_report(noise: OutputNoise, seed: int) -> tuple[dict[str, Any], Tensor]:
    """SNR of the output in dB: "plain" rounding, "smoothed" with the better factors of a few or
    none, "branch" with a low-rank branch too; and those factors ``[K]``.

    Without the searches and refinements of `varc quantize`, which find better ones.
    """
    candidates = noise.candidates()
    tried = [noise.snr_db(factors_K, rank=0, seed=seed) for factors_K in candidates]
    best = max(range(len(tried)), key=tried.__getitem__)
    rank = min(noise.spec.low_rank.rank or DEFAULT_RANK, *noise.weight_NK.shape)
    branch = noise.snr_db(candidates[best], rank=rank, seed=seed)
    exponents = ((0.0, 0.0), *SMOOTHING)[best]
    report = {
        "format": noise.spec.summary(),
        "plain": tried[0],
        "smoothed": tried[best],
        "branch": branch,
        "exponents": list(exponents),
    }
    return report, candidates[best]
