"""Smoothing search. Shapes: N output and K input channels, T tokens."""

from functools import partial

import pytest
import torch

from quant_golden import load_golden, tokens
from var_compressor.ops.primitives import FORMATS, round_trip
from var_compressor.quant import smooth
from var_compressor.quant.objectives import ProjectionOutput
from var_compressor.quant.smooth import search_smoothing, smooth_candidates, smoothing_factors

int4 = partial(round_trip, format=FORMATS["sint4"], group_size=64, scale_dtype=torch.float32)


def search(weight_NK, x_TK, *, objective=None, **changes):
    options = {
        "candidates": smooth_candidates(10),
        "rank": 0,
        "quantize_weight": int4,
        "quantize_act": int4,
        "shift": 0.0,
        "generator": torch.Generator().manual_seed(0),
    }
    objective = objective or ProjectionOutput(x_TK, weight_NK)
    x_absmax_K = (x_TK + changes.get("shift", 0.0)).abs().amax(0)
    return search_smoothing(weight_NK, objective, x_absmax_K, **(options | changes))


def outlier_case(*, N, K=128, T=60, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x_TK = torch.randn(T, K, generator=rng)
    x_TK[:, ::17] *= 30
    return torch.randn(N, K, generator=rng) * 0.1, x_TK


def test_candidates_are_the_originals():
    candidates = torch.tensor(smooth_candidates(20), dtype=torch.float64)
    assert torch.equal(candidates, load_golden("smooth_plain_b")["alpha_beta"])


@pytest.mark.parametrize(("name", "rank"), [("smooth_plain_b", 0), ("smooth_lowrank_a", 16)])
def test_factors_errors_and_choice_equal_the_original(name, rank):
    golden = load_golden(name)
    candidates = smooth_candidates(20)
    found = search(golden["weight.0"], tokens(golden), candidates=candidates, rank=rank)
    factors = [
        smoothing_factors(golden["x_span"], golden["w_span"], alpha=alpha, beta=beta)
        for alpha, beta in candidates
    ]
    torch.testing.assert_close(torch.stack(factors), golden["candidate_scales"], rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.tensor(found.errors), golden["errors"], rtol=1e-5, atol=0)
    best = int(torch.tensor(found.errors).argmin())
    assert (found.alpha, found.beta) == candidates[best]
    torch.testing.assert_close(found.factors_K, golden["best_scale"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [0.0, float("inf"), float("nan")])
def test_a_broken_channel_spoils_only_itself(bad):
    x_K, w_K = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([2.0, 2.0, 8.0])
    whole_K = smoothing_factors(x_K, w_K, alpha=0.5, beta=0.5)
    for broken_K, arguments in ((x_K.clone(), 0), (w_K.clone(), 1)):
        broken_K[1] = bad
        pair = (broken_K, w_K) if arguments == 0 else (x_K, broken_K)
        factors_K = smoothing_factors(*pair, alpha=0.5, beta=0.5)
        assert factors_K.tolist() == [whole_K[0], 1.0, whole_K[2]]


def test_smoothing_beats_none_on_outlier_channels():
    weight_NK, x_TK = outlier_case(N=48)
    found = search(weight_NK, x_TK)
    assert min(found.errors) < 0.6 * found.errors[0]
    assert (found.alpha, found.beta) != (0, 0)


class FirstOutputs(ProjectionOutput):
    """Only the first `count` outputs count."""

    count = 32

    def errors(self, y_CTN):
        return (y_CTN - self.wanted_TN)[..., : self.count].square().sum((1, 2)).double()


def test_the_objective_decides_what_counts():
    weight_NK, x_TK = outlier_case(N=48)
    alone = search(weight_NK[:32], x_TK)
    only_first = search(weight_NK, x_TK, objective=FirstOutputs(x_TK, weight_NK))
    # the other outputs still shape the factors of beta > 0, so compare the family without it
    torch.testing.assert_close(
        torch.tensor(only_first.errors[:10]), torch.tensor(alone.errors[:10]), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("rank", [0, 4])
def test_candidates_tried_together_are_those_tried_one_by_one(monkeypatch, rank):
    weight_NK, x_TK = outlier_case(N=48)
    together = search(weight_NK, x_TK, rank=rank)
    monkeypatch.setattr(smooth, "_CHUNK_BYTES", 1)
    one_by_one = search(weight_NK, x_TK, rank=rank)
    torch.testing.assert_close(
        torch.tensor(together.errors), torch.tensor(one_by_one.errors), rtol=1e-4, atol=0
    )
    assert (together.alpha, together.beta) == (one_by_one.alpha, one_by_one.beta)


def test_a_shift_leaves_the_output_where_it_was():
    """With nothing rounded, adding a constant to the input costs nothing, smoothed or not."""
    weight_NK, x_TK = outlier_case(N=24)
    found = search(
        weight_NK,
        x_TK,
        rank=4,
        shift=0.171875,
        quantize_weight=lambda w: w,
        quantize_act=lambda x: x,
    )
    signal = float((x_TK @ weight_NK.T).square().sum())
    assert max(found.errors) < 1e-9 * signal


def test_errors_are_those_of_a_float64_computation():
    weight_NK, x_TK = outlier_case(N=9)
    found = search(weight_NK, x_TK)
    for (alpha, beta), error in zip(found.candidates, found.errors, strict=True):
        s_K = smoothing_factors(x_TK.abs().amax(0), weight_NK.abs().amax(0), alpha=alpha, beta=beta)
        y_TN = int4(x_TK / s_K).double() @ int4(weight_NK * s_K).double().T
        wanted = (y_TN - x_TK.double() @ weight_NK.double().T).square().sum()
        assert error == pytest.approx(float(wanted), rel=1e-4)


def test_exact_ties_go_to_the_later_candidate():
    weight_NK, x_TK = outlier_case(N=9)
    found = search(weight_NK, x_TK, candidates=[(0.0, 0.0), (0.0, 0.0)])
    assert found.errors[0] == found.errors[1]
    everything_lost = search(
        weight_NK, x_TK, quantize_act=torch.zeros_like, candidates=[(0.0, 0.0), (0.5, 0.0)]
    )
    assert everything_lost.alpha == 0.5


def test_nan_is_an_error_not_a_choice():
    weight_NK, x_TK = outlier_case(N=9)
    x_TK[3, 5] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        search(weight_NK, x_TK)
