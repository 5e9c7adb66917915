"""The low-rank branch of one step: our truncations against a full SVD in float64, time and error.

    python benchmarks/lowrank.py --device cuda --out results.json

"cold" starts from random directions, "warm" from the basis of the step before, "batch" is the cold
one for all 39 smoothing candidates at once, per candidate. The error is that of the rank-32
approximation over the optimum. Weights are random with log-normal column norms.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from var_compressor.ops.primitives import FORMATS, round_trip
from var_compressor.quant.lowrank import LowRankFactors, truncate_subspace

RANK, CANDIDATES, REPEATS = 32, 39, 3
SHAPES = {
    "2b proj": (2048, 2048),
    "2b fc2": (2048, 8192),
    "8b qkv": (10752, 3584),
    "8b fc2": (3584, 14336),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = [measure(name, torch.device(args.device)) for name in args.shapes]
    for row in rows:
        print(json.dumps(row))
    if args.out is not None:
        args.out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


def measure(name: str, device: torch.device) -> dict:
    generator = torch.Generator().manual_seed(0)
    N, K = SHAPES[name]
    weight_NK = torch.randn(N, K, generator=generator)
    weight_NK = (weight_NK * torch.exp(torch.randn(K, generator=generator))).to(device)

    def fit(matrix_NK: torch.Tensor, start_KP: torch.Tensor | None) -> LowRankFactors:
        return truncate_subspace(matrix_NK, rank=RANK, start_KP=start_KP, generator=generator)

    svd_s, values = timed(lambda: torch.linalg.svd(weight_NK.double(), full_matrices=False)[1], 1)
    cold_s, cold = timed(lambda: fit(weight_NK, None), REPEATS)
    residual_NK = weight_NK - cold.up_NR @ cold.down_RK
    qresidual_NK = round_trip(
        residual_NK, format=FORMATS["sint4"], group_size=64, scale_dtype=torch.bfloat16
    )
    next_NK = weight_NK - qresidual_NK
    warm_s, warm = timed(lambda: fit(next_NK, cold.basis_KP), REPEATS)
    count = max(1, min(CANDIDATES, 2**31 // weight_NK.nbytes))
    batch_CNK = weight_NK.expand(count, -1, -1).clone()
    batch_s, _ = timed(lambda: fit(batch_CNK, None), REPEATS)
    best_next = torch.linalg.svdvals(next_NK.double())[RANK:].norm()
    return {
        "weight": name,
        "shape": [N, K],
        "svd_s": svd_s,
        "cold_s": cold_s,
        "warm_s": warm_s,
        "batch_s": batch_s / count,
        "batch_size": count,
        "cold_error": error(weight_NK, cold) / float(values[RANK:].norm()),
        "warm_error": error(next_NK, warm) / float(best_next),
    }


def error(matrix_NK: torch.Tensor, found: LowRankFactors) -> float:
    return float((matrix_NK.double() - found.up_NR.double() @ found.down_RK.double()).norm())


def timed(work: Callable, repeats: int) -> tuple[float, object]:
    """Median seconds of a few runs, after one that warms up, and the result."""
    if repeats > 1:
        work()
    seconds, result = [], None
    for _ in range(repeats):
        synchronize()
        began = time.perf_counter()
        result = work()
        synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), result


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
