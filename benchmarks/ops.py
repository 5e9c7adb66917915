"""Time every kernel of a compressed linear against bf16, at the shapes of the real models.

    python benchmarks/ops.py --out out/ops            # on a GPU; the settings that the policy uses
    python benchmarks/ops.py --out out/ops --sweep    # all tile settings, the best one reported

Every setting is first compared with the reference on a small problem; one that fails is named and
not timed. A timing is the median of CUDA-graph replays over as many sets of weights as outgrow the
L2 cache. Table to stdout, everything to OUT/ops.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from load import commit
from torch import Tensor

from var_compressor.ops import gemm, reference
from var_compressor.ops.gemm import Tiles
from var_compressor.ops.inputs import (
    FP8_TOKEN,
    GELU,
    INT_GROUPS,
    SMOOTHED,
    UNSMOOTHED,
    Coding,
    Norm,
    prepare,
)
from var_compressor.ops.packing import pack_int4, to_tile_order, unpack_int4
from var_compressor.ops.primitives import FORMATS, dequantize_symmetric

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
GROUP, RANK = 64, 32
# N, K of the linears
SHAPES = {
    "8b qkv": (10752, 3584),
    "8b proj": (3584, 3584),
    "8b fc1": (14336, 3584),
    "8b fc2": (3584, 14336),
    "2b fc2": (2048, 8192),
}
MANY, FEW = (512, 2048, 8192), (2, 8, 32, 64)
L2_BYTES = 150 << 20


class Linear:
    """Random weights of one linear in every form, drawn on the GPU."""

    def __init__(self, N: int, K: int) -> None:
        self.N, self.K = N, K
        codes_NK = torch.randint(-7, 8, (N, K), dtype=torch.int8, device="cuda")
        self.qweight = pack_int4(codes_NK)
        self.tiled = to_tile_order(self.qweight, group_size=GROUP)
        self.wscales_GN = (torch.rand(K // GROUP, N, device="cuda") * 0.01 + 0.005).to(BF16)
        self.up_NR = torch.randn(N, RANK, device="cuda").mul_(0.1).to(BF16)
        self.down_RK = torch.randn(RANK, K, device="cuda").mul_(0.1).to(BF16)
        self.bias_N = torch.randn(N, device="cuda").to(BF16)
        self.smooth_K = torch.rand(K, device="cuda") + 0.5
        self.weight_bf16 = self.merged(BF16, None)
        self.row_scales_N = self.weight_bf16.float().abs().amax(1) / 448
        self.weight_fp8 = self.merged(FP8, self.row_scales_N)
        self.codes_fp8 = gemm.expand_codes(
            self.tiled, group_size=GROUP, out_NK=torch.empty(N, K, dtype=FP8, device="cuda")
        )

    def merged(self, dtype: torch.dtype, row_scales_N: Tensor | None) -> Tensor:
        return gemm.merge_weight(
            self.tiled, self.wscales_GN, self.down_RK, self.up_NR, row_scales_N,
            out_NK=torch.empty(self.N, self.K, dtype=dtype, device="cuda"),
        )  # fmt: skip


class Input:
    """One input in every form."""

    def __init__(self, M: int, K: int) -> None:
        self.x = torch.randn(M, K, device="cuda").to(BF16)
        self.low = torch.randn(M, RANK, device="cuda").to(BF16)
        self.smooth_K = torch.rand(K, device="cuda") + 0.5
        self.codes = torch.randint(-7, 8, (M, K), dtype=torch.int8, device="cuda")
        self.codes_fp8 = self.codes.to(FP8)
        self.x_fp8 = self.x.float().mul(100).clamp(-448, 448).to(FP8)
        self.xscales_GM = torch.rand(K // GROUP, M, device="cuda") + 0.1
        self.xscales_M = torch.rand(M, device="cuda") + 0.1


Variant = Callable[[Input, Linear], Tensor]


def bf16(x: Input, w: Linear) -> Tensor:
    return F.linear(x.x, w.weight_bf16, w.bias_N)


def scaled_mm(x: Input, w: Linear) -> Tensor:
    """The library's fp8 product."""
    return torch._scaled_mm(
        x.x_fp8, w.weight_fp8.T, scale_a=x.xscales_M[:, None], scale_b=w.row_scales_N[None],
        bias=w.bias_N, out_dtype=BF16, use_fast_accum=True,
    )  # fmt: skip


def rows(tiles: Tiles | None) -> Variant:
    return lambda x, w: gemm.gemm_rows(
        x.x_fp8, x.xscales_M, w.weight_fp8, w.row_scales_N, w.bias_N,
        tiles=tiles or chosen("rows", x.x_fp8, w.weight_fp8), dtype=BF16,
    )  # fmt: skip


def chosen(op: Any, x_MK: Tensor, weight: Tensor) -> Tiles:
    """What the runtime takes."""
    gpu = torch.cuda.get_device_properties(0)
    known = gemm.GPU((gpu.major, gpu.minor), gpu.multi_processor_count)
    return gemm.tiles_for(op, x_MK, weight, known)


def groups(tiles: Tiles | None, *, packed: bool) -> Variant:
    def run(x: Input, w: Linear) -> Tensor:
        codes, weight = (x.codes, w.tiled) if packed else (x.codes_fp8, w.codes_fp8)
        return gemm.gemm_groups(
            codes, x.xscales_GM, weight, w.wscales_GN, x.low, w.up_NR, w.bias_N,
            tiles=tiles or chosen("groups", codes, weight), dtype=BF16,
        )  # fmt: skip

    return run


def w4a16(tiles: Tiles | None) -> Variant:
    """``tiles.k`` channels per program."""

    def run(x: Input, w: Linear) -> Tensor:
        used = chosen("w4a16", x.x, w.tiled)
        if tiles is not None:
            used = replace(tiles, splits=-(-w.K // tiles.k))
        return gemm.gemm_w4a16(
            x.x, w.tiled, w.wscales_GN, x.low, w.up_NR, w.bias_N, tiles=used, dtype=BF16
        )

    return run


def settled() -> dict[str, dict[str, Variant]]:
    """Each op as the runtime calls it."""
    return {
        "scaled_mm": {"library": scaled_mm},
        "w4a8 fp8": {"chosen": rows(None)},
        "w4a4 e4m3": {"chosen": groups(None, packed=False)},
        "w4a4 int8": {"chosen": groups(None, packed=True)},
        "w4a16": {"chosen": w4a16(None)},
    }


def sweeps() -> dict[str, dict[str, Variant]]:
    """Every setting worth a try, by op."""
    found: dict[str, dict[str, Variant]] = {"scaled_mm": {"library": scaled_mm}}
    rows_tiles = [
        Tiles(128, 256, 128, 8, 3, tma=True), Tiles(128, 256, 128, 8, 4, tma=True),
        Tiles(128, 128, 128, 4, 4, tma=True), Tiles(64, 256, 128, 4, 4, tma=True),
    ]  # fmt: skip
    groups_tiles = [
        Tiles(64, 128, 64, 4, 4, tma=True), Tiles(64, 128, 64, 4, 5, tma=True),
        Tiles(64, 128, 64, 4, 6, tma=True), Tiles(128, 64, 64, 4, 4, tma=True),
    ]  # fmt: skip
    packed_tiles = [Tiles(128, 64, 64, 4, 4), Tiles(64, 64, 64, 4, 4)]
    found["w4a8 fp8"] = {name(t): rows(t) for t in rows_tiles}
    found["w4a4 e4m3"] = {name(t): groups(t, packed=False) for t in groups_tiles}
    found["w4a4 int8"] = {name(t): groups(t, packed=True) for t in packed_tiles}
    found["w4a16"] = {
        name(t): w4a16(t)
        for t in (
            Tiles(m, n, k, warps, stages)
            for m, n, k, warps, stages in (
                (16, 16, 1024, 2, 6),
                (16, 32, 4096, 2, 6),
                (16, 64, 512, 4, 5),
                (16, 64, 1024, 4, 6),
                (16, 128, 1024, 4, 5),
                (32, 32, 4096, 2, 5),
                (32, 64, 512, 4, 5),
                (32, 128, 1024, 4, 5),
                (64, 64, 512, 4, 5),
                (64, 64, 1024, 4, 5),
                (64, 128, 1024, 4, 5),
                (64, 128, 1024, 8, 5),
                (64, 128, 4096, 4, 5),
                (128, 64, 4096, 4, 5),
                (128, 128, 1024, 8, 4),
                (128, 128, 4096, 8, 4),
                (128, 128, 4096, 4, 4),
                (256, 64, 4096, 4, 4),
            )
        )
    }
    return found


def name(tiles: Tiles) -> str:
    return (
        f"{tiles.m}x{tiles.n}x{tiles.k} w{tiles.num_warps} s{tiles.num_stages}"
        f"{' tma' if tiles.tma else ''}"
    )


def applies(op: str, label: str, M: int) -> bool:
    if label in ("chosen", "library"):
        return M <= 64 if op == "w4a16" else M >= 128
    if op == "w4a16":
        tile_m = int(label.split("x")[0])
        return M <= 512 and tile_m * 4 >= M and (tile_m // 2 < M or tile_m == 16)
    return M >= 128


def time_ms(call: Callable[[], Any], *, replays: int = 7) -> float:
    """Median of graph replays, milliseconds."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()
        graph.replay()
        times = []
        for _ in range(replays):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            times.append((start, end))
        torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in times)


def broken(op: str, variant: Variant) -> str:
    """What is wrong with a variant at a small odd problem, or nothing."""
    M = 37 if op == "w4a16" else 700
    x, w = Input(M, 448), Linear(320, 448)
    try:
        y_MN = variant(x, w).float()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:120]}"
    branch = (x.low.float() @ w.up_NR.float().T) + w.bias_N.float()
    if op.startswith("w4a4"):
        wanted = reference.gemm_w4a4(
            x.codes, x.xscales_GM.T, w.qweight, w.wscales_GN.T, x.low, w.up_NR, w.bias_N
        )
    elif op == "w4a16":
        scales_NG = w.wscales_GN.T.float()
        weight_NK = dequantize_symmetric(unpack_int4(w.qweight), scales_NG, format=FORMATS["sint4"])
        wanted = x.x.float() @ weight_NK.T + branch
    else:
        wanted = (x.x_fp8.float() @ w.weight_fp8.float().T) * x.xscales_M[:, None]
        wanted = wanted * w.row_scales_N + w.bias_N.float()
    error = ((y_MN - wanted).norm() / wanted.norm()).item()
    return "" if error < 4e-3 else f"relative error {error:.1e}"


def gemm_rows_of_table(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    variants = sweeps() if args.sweep else settled()
    for op, settings in variants.items():
        for label in list(settings):
            if problem := broken(op, settings[label]):
                print(f"# {op} {label}: {problem}", flush=True)
                del settings[label]
    for shape, (N, K) in SHAPES.items():
        weights = [Linear(N, K) for _ in range(max(1, L2_BYTES // (N * K)))]
        for M in (*FEW, *MANY):
            x = Input(M, K)
            sets = weights if M <= 512 else weights[:2]
            base = time_all(bf16, x, sets)
            yield {
                "op": "bf16",
                "shape": shape,
                "M": M,
                "ms": base,
                "tflops": tflops(M, N, K, base),
            }
            for op, settings in variants.items():
                timed = {
                    label: time_all(variant, x, sets)
                    for label, variant in settings.items()
                    if applies(op, label, M)
                }
                if timed:
                    best = min(timed, key=lambda label: timed[label])
                    yield {
                        "op": op, "shape": shape, "M": M, "ms": timed[best],
                        "bf16_ratio": base / timed[best],
                        "tflops": tflops(M, N, K, timed[best]), "best": best, "all": timed,
                    }  # fmt: skip
        for label, dtype in (("e4m3", FP8), ("bf16", BF16)):
            scaled = dtype == FP8
            ms = time_ms(
                lambda scaled=scaled, dtype=dtype, weights=weights: [
                    w.merged(dtype, w.row_scales_N if scaled else None) for w in weights
                ]
            ) / len(weights)
            num_bytes = N * K / 2 + N * K * dtype.itemsize
            yield {
                "op": f"merge to {label}", "shape": shape, "M": 0, "ms": ms,
                "gb_s": num_bytes / ms / 1e6,
            }  # fmt: skip


def time_all(variant: Variant, x: Input, weights: list[Linear]) -> float:
    return time_ms(lambda: [variant(x, w) for w in weights]) / len(weights)


def tflops(M: int, N: int, K: int, ms: float) -> float:
    return 2 * M * N * K / ms / 1e9


def input_rows_of_table() -> Iterator[dict[str, Any]]:
    codings = {
        "bf16": Coding(UNSMOOTHED), "smoothed": Coding(SMOOTHED), "int4": Coding(INT_GROUPS, 64),
        "int4 as e4m3": Coding(INT_GROUPS, 64, as_fp8=True), "fp8": Coding(FP8_TOKEN),
    }  # fmt: skip
    for K, source in ((3584, "norm"), (3584, "plain"), (14336, "gelu")):
        for M, (label, coding) in product((2, 512, 8192), codings.items()):
            yield {"op": f"{source} → {label}", **time_input(M, K, source, coding)}


def time_input(M: int, K: int, source: str, coding: Coding) -> dict[str, Any]:
    down_NK = torch.randn(RANK, K, device="cuda").to(BF16)
    smooth_K, x_MK = torch.rand(K, device="cuda") + 0.5, torch.randn(M, K, device="cuda")
    rows_RK, update_MK = torch.randn(2, K, device="cuda"), x_MK.to(BF16)
    made_from: Any = {"norm": Norm(rows_RK, rows_RK, update_MK, rows_RK), "plain": 0, "gelu": GELU}
    x = x_MK if source == "norm" else x_MK.to(BF16)
    smoothed, inverse_K = coding.kind != UNSMOOTHED, 1 / smooth_K
    projected = smoothed and coding.kind != FP8_TOKEN
    ms = time_ms(
        lambda: prepare(
            x, coding, smooth_K=smooth_K if smoothed else None, inverse_smooth_K=inverse_K,
            down_NK=down_NK if projected else None, source=made_from[source],
            tokens_per_row=M // 2, dtype=BF16,
        )
    )  # fmt: skip
    read = 2 * x.nbytes + update_MK.nbytes if source == "norm" else x.nbytes
    written = M * K * (2 if coding.kind in (UNSMOOTHED, SMOOTHED) else 1)
    return {"shape": f"K {K}", "M": M, "ms": ms, "gb_s": (read + written) / ms / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sweep", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    found = []
    for row in (*input_rows_of_table(), *gemm_rows_of_table(args)):
        found.append(row)
        numbers = " ".join(
            f"{k} {row[k]:.4g}" for k in ("ms", "tflops", "gb_s", "bf16_ratio") if k in row
        )
        print(
            f"{row['op']:22} {row['shape']:8} M {row['M']:5} {numbers} {row.get('best', '')}",
            flush=True,
        )
    args.out.mkdir(parents=True, exist_ok=True)
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": commit()}
    (args.out / "ops.json").write_text(json.dumps({"machine": machine, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
