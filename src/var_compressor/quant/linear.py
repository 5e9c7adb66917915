"""One linear: smooth, split off the low-rank branch, round, refit; and what each step gave.

Shapes: N output and K input channels, R rank, T sampled tokens; leading C for candidates.
Source: SVDQuant, Li et al. 2024 (arXiv 2411.05007).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from var_compressor.layers.linear import QuantizedLinear, resolved_group
from var_compressor.ops.primitives import (
    FORMATS,
    QuantizedWeight,
    choose_tensor_scale,
    round_trip,
)
from var_compressor.quant.gptq import RoundingOptions, gptq, hessian, rtn
from var_compressor.quant.lowrank import LowRankSplit, refit_branch, split_low_rank, truncate
from var_compressor.quant.objectives import Objective
from var_compressor.quant.report import LinearReport, warnings_for
from var_compressor.quant.smooth import (
    SmoothSearch,
    compressed_output,
    search_smoothing,
    smooth_candidates,
)
from var_compressor.spec import LinearSpec

CLIP_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
WSCALE_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class LinearInputs:
    """What a linear read during calibration.

    ``x_TK`` a sample of tokens; ``lowest_K``, ``highest_K`` over every token.
    """

    x_TK: Tensor
    lowest_K: Tensor
    highest_K: Tensor

    def absmax(self, shift: float) -> Tensor:
        """Largest magnitude of each channel after ``shift`` is added."""
        return torch.maximum((self.lowest_K + shift).abs(), (self.highest_K + shift).abs())


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """A generator for the linear ``name`` (as in ``blocks.0.ffn.fc2``), whoever works on it."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def quantize_linear(
    name: str,
    linear: nn.Linear,
    spec: LinearSpec,
    inputs: LinearInputs,
    objective: Objective,
    *,
    generator: torch.Generator,
) -> tuple[QuantizedLinear, LinearReport]:
    """The quantized linear that ``objective`` likes best, and a report on ``inputs.x_TK``.

    The searches judge by ``objective``; the report's signal-to-noise ratios are of the linear's own
    output.
    """
    smoothing = _search_factors(linear, spec, inputs, objective, generator)
    smoothed_NK = linear.weight.float() * smoothing.factors_K
    judge = _Judge(objective, smoothing.factors_K.unsqueeze(0), spec)
    split = split_low_rank(
        smoothed_NK,
        rank=spec.low_rank.rank,
        quantize_residual=partial(nearest, spec=spec),
        evaluate_error=judge.error,
        max_iters=spec.low_rank.max_iters,
        patience=spec.low_rank.patience,
        generator=generator,
    )
    x_hat_TK = (inputs.x_TK.float() + spec.shift) / smoothing.factors_K
    # the codes absorb what rounding the branch to bf16 left over
    branch = _in_bf16(split.up_NR, split.down_RK)
    residual_NK = smoothed_NK - branch[0] @ branch[1]
    codes = rounded(residual_NK, act_round_trip(x_hat_TK, spec=spec), spec=spec)
    if spec.low_rank.rank:
        branch = _better_branch(judge, codes.dequantize(), smoothed_NK, x_hat_TK, branch, generator)
    quantized = QuantizedLinear.of(
        spec,
        codes,
        smooth_factor_K=smoothing.factors_K,
        down_RK=branch[1].bfloat16(),
        up_NR=branch[0].bfloat16(),
        bias_N=linear.bias,
    )
    measure = _Measure(linear, inputs.x_TK, smoothing.factors_K, spec)
    snr = measure.steps(split, generator) | {"final": measure.snr_db(branch, codes.dequantize())}
    report = _report(name, snr, objective, smoothing, split, inputs)
    return quantized, replace(report, warnings=warnings_for(report, spec))


def _search_factors(
    linear: nn.Linear,
    spec: LinearSpec,
    inputs: LinearInputs,
    objective: Objective,
    generator: torch.Generator,
) -> SmoothSearch:
    num_grids = spec.smooth.num_grids
    return search_smoothing(
        linear.weight,
        objective,
        inputs.absmax(spec.shift),
        candidates=smooth_candidates(num_grids) if spec.smooth.enabled else [(0.0, 0.0)],
        rank=spec.low_rank.rank,
        quantize_weight=partial(nearest, spec=spec),
        quantize_act=partial(act_round_trip, spec=spec),
        shift=spec.shift,
        generator=generator,
    )


def _report(
    name: str,
    snr: dict[str, float],
    objective: Objective,
    smoothing: SmoothSearch,
    split: LowRankSplit,
    inputs: LinearInputs,
) -> LinearReport:
    absmax_K = inputs.absmax(0.0)
    return LinearReport(
        name=name,
        snr_db=snr,
        objective=objective.name,
        alpha=smoothing.alpha,
        beta=smoothing.beta,
        smooth_gain_db=ratio_db(smoothing.errors[0], min(smoothing.errors)),
        low_rank_steps=len(split.errors),
        low_rank_best=split.best_iter,
        outlier_ratio=float(absmax_K.max() / absmax_K.median().clamp_min(1e-12)),
    )


class _Judge:
    """The objective's error of one smoothed linear, its input quantized once."""

    def __init__(self, objective: Objective, factors_1K: Tensor, spec: LinearSpec) -> None:
        self.objective, self.factors_1K, self.spec = objective, factors_1K, spec
        self.x_hat_1TK = (objective.x_TK + spec.shift).div_(factors_1K).unsqueeze(0)
        self.qx_1TK = act_round_trip(self.x_hat_1TK, spec=spec)

    def error(self, up_NR: Tensor, down_RK: Tensor, qresidual_NK: Tensor) -> float:
        y_1TN = compressed_output(
            self.x_hat_1TK,
            self.factors_1K,
            (up_NR.unsqueeze(0), down_RK.unsqueeze(0)),
            qresidual_NK.unsqueeze(0),
            quantize_act=lambda _: self.qx_1TK,
            shift=self.spec.shift,
        )
        return float(self.objective.errors(y_1TN))


def _better_branch(
    judge: _Judge,
    qresidual_NK: Tensor,
    smoothed_NK: Tensor,
    x_hat_TK: Tensor,
    branch: tuple[Tensor, Tensor],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """The branch as it is, or fitted once more to what the final codes lost, if that is better."""
    refitted = refit_branch(
        smoothed_NK - qresidual_NK, x_hat_TK, rank=branch[0].shape[1], generator=generator
    )
    refitted = _in_bf16(*refitted)
    before, after = judge.error(*branch, qresidual_NK), judge.error(*refitted, qresidual_NK)
    return refitted if after < before else branch


def _in_bf16(up_NR: Tensor, down_RK: Tensor) -> tuple[Tensor, Tensor]:
    return up_NR.bfloat16().float(), down_RK.bfloat16().float()


class _Measure:
    """Signal-to-noise ratio of the linear's own output, at several stages of its compression."""

    def __init__(
        self, linear: nn.Linear, x_TK: Tensor, factors_K: Tensor, spec: LinearSpec
    ) -> None:
        self.weight_NK, self.x_TK = linear.weight.float(), x_TK.float()
        self.factors_K, self.spec = factors_K, spec
        self.wanted_TN = self.x_TK @ self.weight_NK.T

    def steps(self, split: LowRankSplit, generator: torch.Generator) -> dict[str, float]:
        """Plain rounding; with smoothing; with a branch; with the refined one."""
        spec, smoothed_NK = self.spec, self.weight_NK * self.factors_K
        one_shot = truncate(
            smoothed_NK, rank=spec.low_rank.rank, start_KP=None, generator=generator
        )
        up_NR, down_RK = one_shot.up_NR, one_shot.down_RK
        none = (up_NR[:, :0], down_RK[:0])
        return {
            "nearest": self.snr_db(none, nearest(self.weight_NK, spec=spec), smooth=False),
            "smoothed": self.snr_db(none, nearest(smoothed_NK, spec=spec)),
            "branch": self.snr_db(
                (up_NR, down_RK), nearest(smoothed_NK - up_NR @ down_RK, spec=spec)
            ),
            "refined": self.snr_db(
                (split.up_NR, split.down_RK), nearest(split.residual_NK, spec=spec)
            ),
        }

    def snr_db(
        self, branch: tuple[Tensor, Tensor], qresidual_NK: Tensor, *, smooth: bool = True
    ) -> float:
        factors_1K = (self.factors_K if smooth else torch.ones_like(self.factors_K)).unsqueeze(0)
        up_NR, down_RK = branch
        y_1TN = compressed_output(
            ((self.x_TK + self.spec.shift) / factors_1K).unsqueeze(0),
            factors_1K,
            (up_NR.unsqueeze(0), down_RK.unsqueeze(0)),
            qresidual_NK.unsqueeze(0),
            quantize_act=partial(act_round_trip, spec=self.spec),
            shift=self.spec.shift,
        )
        return snr_db(self.wanted_TN, y_1TN[0])


# --- formats of a spec ----------------------------------------------------------------------------


def rounded(weight_NK: Tensor, qx_TK: Tensor, *, spec: LinearSpec) -> QuantizedWeight:
    """The final codes of a weight that multiplies the (quantized) inputs qx_TK.

    A row keeps its groups' whole ranges where the search for others does not lower its output
    error.
    """
    options = RoundingOptions(
        format=FORMATS[spec.weight.format],
        group_size=resolved_group(spec.weight.group_size, weight_NK.shape[-1]),
        scale_dtype=WSCALE_DTYPE,
        clip_ratios=CLIP_RATIOS if spec.weight.range_search else (1.0,),
    )
    if spec.weight.rounding == "gptq":
        found = gptq(weight_NK, hessian(qx_TK), options)
    else:
        found = rtn(weight_NK, qx_TK.square().mean(0), options)
    if not spec.weight.range_search:
        return found
    whole = rtn(weight_NK, None, replace(options, clip_ratios=(1.0,)))
    lost = [(qx_TK @ (w.dequantize() - weight_NK).T).square().sum(0) for w in (found, whole)]
    better_N1 = (lost[0] < lost[1]).unsqueeze(-1)
    return replace(
        found,
        # selected as bytes, because 8-bit floats have no where()
        codes_NK=torch.where(
            better_N1, found.codes_NK.view(torch.uint8), whole.codes_NK.view(torch.uint8)
        ).view(found.codes_NK.dtype),
        scales_NG=torch.where(better_N1, found.scales_NG, whole.scales_NG),
    )


def nearest(weight_NK: Tensor, *, spec: LinearSpec) -> Tensor:
    """A weight rounded to nearest in its groups' whole ranges, dequantized; what searches round.

    Leading dimensions are candidates.
    """
    format = FORMATS[spec.weight.format]
    return round_trip(
        weight_NK,
        format=format,
        group_size=resolved_group(spec.weight.group_size, weight_NK.shape[-1]),
        scale_dtype=WSCALE_DTYPE,
        tensor_scale=choose_tensor_scale(weight_NK, format=format),
    )


def act_round_trip(x_TK: Tensor, *, spec: LinearSpec) -> Tensor:
    """The input as the quantized linear sees it, dequantized; unchanged for 16 bits."""
    if spec.act.format is None:
        return x_TK
    return round_trip(
        x_TK,
        format=FORMATS[spec.act.format],
        group_size=resolved_group(spec.act.group_size, x_TK.shape[-1]),
        scale_dtype=torch.float32,
    )


def snr_db(wanted: Tensor, got: Tensor) -> float:
    """Signal-to-noise ratio in dB; 200 stands for no measurable error."""
    signal = wanted.square().sum(dtype=torch.float64)
    noise = (wanted - got).square().sum(dtype=torch.float64)
    return ratio_db(float(signal), float(noise))


def ratio_db(signal: float, noise: float) -> float:
    """Within ±200 dB, which also stand for no noise and no signal."""
    if noise == 0:
        # a linear whose input is zero throughout has neither
        return 200.0
    ratio = torch.tensor(signal / noise, dtype=torch.float64)
    return float((10 * ratio.log10()).clamp(-200, 200))
