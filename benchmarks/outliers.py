"""What outliers in front of fc2 cost on Infinity-Tiny: naive W4A4 against SVDQuant W4A4.

    python benchmarks/outliers.py --out out/outliers
    python benchmarks/outliers.py --out out/quick --set collect.num_prompts=2 \\
        --set quant.smooth.num_grids=8 --set quant.low_rank.max_iters=5

The model with outliers computes the same function as the one without: every channel of fc2's input
is multiplied by a random power of two that the weight divides out again. Only fc2 is quantized. A
table in Markdown, block by block, goes to stdout, all numbers to OUT/outliers.json.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import asdict
from pathlib import Path

from load import commit
from variants import machine, markdown, progress

from var_compressor.artifact import write_json
from var_compressor.compress import collection_of, open_pipeline
from var_compressor.evaluation.outliers import (
    Fc2Result,
    fc2_inputs,
    max_to_median,
    mean_snr_db,
    quantize_fc2,
    with_outliers,
)
from var_compressor.recipe import Recipe, load_recipe

SVDQUANT = ("recipes/model/infinity-tiny.yaml", "recipes/collect/tiny.yaml")
NAIVE = ("recipes/model/infinity-tiny-naive.yaml", "recipes/collect/tiny.yaml")
INT4 = "recipes/svdquant/int4.yaml"
# signed inputs: unsigned ones count on GELU's own range, which a gain after it exceeds
ONLY_FC2 = "quant.modules=[{pattern: ffn.fc2, act: sint4}]"
HEADER = (
    *("block", "max/median", "with outliers", "naive, dB", "with outliers"),
    *("SVDQuant, dB (alpha, beta)", "with outliers"),
)

Results = dict[tuple[str, str], list[Fc2Result]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of results and artifacts")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of both recipes"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--min-ratio", type=float, default=350.0, help="max/median to reach")
    parser.add_argument("--seed", type=int, default=0, help="of the gains")
    args = parser.parse_args()
    overrides = [f"model.device={args.device}", "model.dtype=float32", ONLY_FC2, *args.set]
    recipes = {
        "naive": load_recipe((*NAIVE, INT4), overrides),
        "svdquant": load_recipe((*SVDQUANT, INT4), overrides),
    }
    ratios, results = measure(recipes, args.out, min_ratio=args.min_ratio, seed=args.seed)
    write_json(
        args.out / "outliers.json",
        {
            "machine": machine(),
            "commit": commit(),
            "min_ratio": args.min_ratio,
            "seed": args.seed,
            "recipes": {name: recipe.to_dict() for name, recipe in recipes.items()},
            "max_to_median": ratios,
            "fc2": [
                {
                    "recipe": recipe,
                    "model": model,
                    "mean_snr_db": mean_snr_db(blocks),
                    "blocks": [asdict(block) for block in blocks],
                }
                for (recipe, model), blocks in results.items()
            ],
        },
    )
    print(markdown(HEADER, lines(ratios, results)))


def measure(
    recipes: dict[str, Recipe], out: Path, *, min_ratio: float, seed: int
) -> tuple[dict[str, list[float]], Results]:
    """Max over median of fc2's input per block, and what quantizing did, by recipe and model."""
    recipe = recipes["svdquant"]
    plain, collection = open_pipeline(recipe.model), collection_of(recipe.collect)
    inputs = fc2_inputs(plain, collection)
    scaled = with_outliers(plain, inputs, min_ratio=min_ratio, seed=seed)
    ratios = {
        "plain": [max_to_median(x_TK) for x_TK in inputs],
        "outliers": [max_to_median(x_TK) for x_TK in fc2_inputs(scaled, collection)],
    }
    results = {}
    for name, recipe in recipes.items():
        for model, pipeline in (("plain", plain), ("outliers", scaled)):
            artifact = out / "artifacts" / f"{name}-{model}"
            shutil.rmtree(artifact, ignore_errors=True)
            results[name, model] = quantize_fc2(
                pipeline,
                collection,
                recipe.quant,
                artifact,
                on_progress=progress(f"{name}, {model}"),
            )
    return ratios, results


def lines(ratios: dict[str, list[float]], results: Results) -> list[list[str]]:
    """A line per block, and one of means."""
    found = [
        [
            str(block),
            *(f"{ratios[model][block]:.0f}" for model in ("plain", "outliers")),
            *(f"{results['naive', model][block].snr_db:.2f}" for model in ("plain", "outliers")),
            *(svdquant_cell(results["svdquant", m][block]) for m in ("plain", "outliers")),
        ]
        for block in range(len(ratios["plain"]))
    ]
    means = [f"{mean_snr_db(blocks):.2f}" for blocks in results.values()]
    return [*found, ["mean", "", "", *means]]


def svdquant_cell(result: Fc2Result) -> str:
    return f"{result.snr_db:.2f} ({result.alpha:.2f}, {result.beta:.2f})"


if __name__ == "__main__":
    main()
