"""Commands that draw, time and size: plan, generate, bench, demo."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from var_compressor.cli.app import (
    MAX_SEED,
    Compute,
    ComputeOption,
    LowMemoryOption,
    app,
    load_recipe_words,
)
from var_compressor.terminal import byte_progress, print_bench, print_memory_plan, progress

BENCH_PROMPT = "a large red metal cube on a wooden floor."


@app.command("plan")
def plan_command(
    model: Annotated[
        str, typer.Option(help="infinity-2b, infinity-8b, …, a model directory, or an artifact.")
    ],
    budget: Annotated[str, typer.Option(help="Memory of the device, e.g. 8GiB.")],
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 1,
    aspect_ratio: Annotated[float, typer.Option(help="Height / width; nearest is taken.")] = 1.0,
    pixel_budget: Annotated[str | None, typer.Option(help="0.06M, 0.25M, 0.60M or 1M.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of the longest prompt.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Choose weights, cache, text encoder and steps that fit a device, and predict their peak.

    Example: varc plan --model infinity-8b --budget 8GiB
    """
    from var_compressor.footprint import Request
    from var_compressor.models.schedule import Schedule
    from var_compressor.planning import model_shape, plan_memory
    from var_compressor.quant.activations import parse_bytes

    shape, budget_bytes = model_shape(model), parse_bytes(budget)
    schedule = Schedule.of(aspect_ratio, pixel_budget or shape.transformer.pixel_budget)
    prompt_tokens = min(prompt_tokens, shape.transformer.text_maxlen)
    request = Request(schedule, batch, prompt_tokens)
    planned = plan_memory(shape, request, budget_bytes=budget_bytes)
    print_memory_plan(planned, as_json=as_json)
    if planned.missing_bytes:
        raise ValueError(
            f"{model} does not fit {budget}: the smallest setup lacks {planned.missing_bytes} "
            "bytes; give a larger budget, a smaller batch or a smaller pixel budget"
        )


@app.command()
def generate(
    prompt: Annotated[list[str], typer.Argument(help="One or more prompts.")],
    out: Annotated[Path, typer.Option("--out", help="PNG to write; with more prompts, x-0.png …")],
    model: Annotated[
        str, typer.Option(help="infinity-tiny, a model directory, an artifact, or a hub id.")
    ] = "infinity-tiny",
    kv: Annotated[
        Path | None,
        typer.Option(help="What `calibrate-kv --out` wrote: a directory, or kv_quant_calib.pt."),
    ] = None,
    lora: Annotated[
        list[Path] | None,
        typer.Option(help="Low-rank adapter: a .safetensors file or a PEFT folder; may repeat."),
    ] = None,
    lora_scale: Annotated[
        list[float] | None, typer.Option(help="Of each --lora, in their order; 1 if left out.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Of the first image; the next gets seed + 1.")
    ] = 0,
    negative: Annotated[str | None, typer.Option(help="Negative prompt.")] = None,
    cfg: Annotated[float, typer.Option(help="Guidance; 1 is off.")] = 3.0,
    tau: Annotated[float, typer.Option(help="Temperature.")] = 0.5,
    top_p: Annotated[float, typer.Option(help="0 keeps every bit value.")] = 0.97,
    aspect_ratio: Annotated[float, typer.Option(help="Height / width; nearest is taken.")] = 1.0,
    pixel_budget: Annotated[str | None, typer.Option(help="0.06M, 0.25M, 0.60M or 1M.")] = None,
    prompt_cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps prompts' features between runs.")
    ] = None,
    release_text_encoder: Annotated[
        bool,
        typer.Option(
            "--release-text-encoder/--keep-text-encoder", help="Free its memory before drawing."
        ),
    ] = False,
    text_encoder_bits: Annotated[
        int, typer.Option(help="Of its weights: 16, 8 or 4; fewer take less memory.")
    ] = 16,
    strip_rows: Annotated[
        int | None, typer.Option(min=1, help="Decode in strips of so many rows, to save memory.")
    ] = None,
    compute: ComputeOption = Compute.auto,
    low_memory: LowMemoryOption = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = "auto",
) -> None:
    """Draw images, with a full-precision model or an artifact.

    Example: varc generate "a large red metal cube on a wooden floor." --seed 0 --out cube.png
    """
    from var_compressor.artifact import find_model
    from var_compressor.compress import choose_device, choose_dtype
    from var_compressor.images import check_png_path, write_png
    from var_compressor.interop.kv_quant_calib import use_cache
    from var_compressor.models.sampling import Sampling
    from var_compressor.pipeline import InfinityPipeline

    chosen = choose_device(device)
    paths = [out]
    if len(prompt) > 1:
        paths = [out.with_stem(f"{out.stem}-{i}") for i in range(len(prompt))]
    for path in paths:
        check_png_path(path)
    adapters = _with_scales(lora or [], lora_scale or [])
    # once: the hub is asked each time
    folder = find_model(model)
    with byte_progress("loading", InfinityPipeline.stored_bytes(folder)) as on_tensor:
        pipeline = InfinityPipeline.from_pretrained(
            folder,
            dtype=choose_dtype(dtype, chosen),
            device=chosen,
            text_encoder_cache=prompt_cache,
            text_encoder_bits=text_encoder_bits,
            compute=compute.value,
            low_memory=low_memory,
            lora=adapters,
            on_tensor=on_tensor,
        )
    pipeline.records_graphs = False
    if kv is not None:
        use_cache(pipeline, kv)
    num_levels = len(pipeline.schedule_for(aspect_ratio, pixel_budget).levels)
    with progress() as on_progress:
        generation = pipeline.generate(
            prompt,
            seed=seed,
            sampling=Sampling(cfg=cfg, tau=tau, top_p=top_p),
            negative=None if negative is None else [negative] * len(prompt),
            aspect_ratio=aspect_ratio,
            pixel_budget=pixel_budget,
            text_encoder="release" if release_text_encoder else "keep",
            vae_strip_rows=strip_rows,
            on_level=lambda level, latent: on_progress("level", level.index + 1, num_levels),
        )
    shared: dict[str, object] = {
        "model": model,
        "kv": None if kv is None else str(kv),
        "cfg": cfg,
        "tau": tau,
        "top_p": top_p,
        "negative": negative,
    }
    shared |= {"aspect_ratio": aspect_ratio, "pixel_budget": pixel_budget}
    shared |= {"text_encoder_bits": text_encoder_bits}
    if adapters:
        shared["lora"] = [[str(path), strength] for path, strength in adapters]
    for i, (image, path) in enumerate(zip(generation.pil, paths, strict=True)):
        write_png(image, path, {"prompt": prompt[i], "seed": seed + i, **shared})
        typer.echo(f"wrote {path}")


def _with_scales(lora: list[Path], strengths: list[float]) -> list[tuple[Path, float]]:
    """Raises: ValueError when not every adapter or none has a scale."""
    if strengths and len(strengths) != len(lora):
        raise ValueError(
            f"{len(strengths)} --lora-scale for {len(lora)} --lora; give each one a scale, or none"
        )
    return list(zip(lora, strengths or [1.0] * len(lora), strict=True))


class Baseline(str, Enum):
    """What a model is compared with."""

    bf16 = "bf16"
    none = "none"


@app.command()
def bench(
    model: Annotated[
        str, typer.Argument(help="As `generate --model`; a preset name with --shapes-only.")
    ],
    kv: Annotated[
        str | None,
        typer.Option(help="As `generate --kv`; int8 or int4 with --shapes-only."),
    ] = None,
    compute: ComputeOption = Compute.auto,
    low_memory: LowMemoryOption = False,
    baseline: Annotated[
        Baseline, typer.Option(help="bf16: the model at full precision, in turns (A B A B …).")
    ] = Baseline.bf16,
    prompt: Annotated[str, typer.Option(help="Drawn in every run.")] = BENCH_PROMPT,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the first image.")] = 0,
    runs: Annotated[int, typer.Option(min=1, help="Timed runs of each model.")] = 5,
    batch: Annotated[int, typer.Option(min=1, help="Images per run.")] = 1,
    aspect_ratio: Annotated[float, typer.Option(help="Height / width; nearest is taken.")] = 1.0,
    pixel_budget: Annotated[str | None, typer.Option(help="0.06M, 0.25M, 0.60M or 1M.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path, typer.Option("--out", help="Directory of the results.")] = Path(
        "out/bench"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    shapes_only: Annotated[
        bool, typer.Option("--shapes-only", help="Random weights of a preset, without files.")
    ] = False,
) -> None:
    """Time a model by stage and kind, measure its memory, and compare it with full precision.

    Example: varc bench out/tiny-w4a4 --runs 10 --out out/bench-tiny
    """
    from var_compressor.bench import sources
    from var_compressor.bench.session import Settings, benchmark
    from var_compressor.compress import choose_device, choose_dtype
    from var_compressor.interop.kv_quant_calib import use_cache
    from var_compressor.models.schedule import Schedule

    chosen = choose_device(device)
    dtype = choose_dtype("auto", chosen)
    Schedule.of(aspect_ratio, pixel_budget or "1M")
    choice = sources.Choice(
        model, kv, compute.value, low_memory, baseline is Baseline.bf16, chosen, dtype
    )
    found = sources.random(choice, seed=seed) if shapes_only else sources.saved(choice, use_cache)
    out.mkdir(parents=True, exist_ok=True)
    settings = Settings(prompt, batch, seed, runs, aspect_ratio, pixel_budget)
    with progress() as on_progress:
        result = benchmark(found, settings, device=chosen, dtype=dtype, on_progress=on_progress)
    print_bench(result, out, as_json=as_json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Directory for the artifact and page.")] = Path(
        "out/demo"
    ),
    num_prompts: Annotated[int, typer.Option(min=1, help="Images drawn by each model.")] = 48,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the first image.")] = 0,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value on top of the demo's recipe.")
    ] = None,
) -> None:
    """Compress Infinity-Tiny, draw the same prompts with both models, and compare them.

    Example: varc demo --num-prompts 8 quant.weight.rounding=gptq --out out/gptq
    """
    import json

    from rich.console import Console
    from rich.table import Table

    from var_compressor.evaluation.demo import (
        run_demo,
        table_rows,
        write_grid,
        write_json,
        write_page,
    )
    from var_compressor.models.sampling import Sampling

    recipe = load_recipe_words(
        [
            "recipes/model/infinity-tiny.yaml",
            "recipes/collect/tiny.yaml",
            "recipes/svdquant/int4.yaml",
            *(overrides or []),
        ]
    )
    collect = recipe.collect
    sampling = Sampling(cfg=collect.cfg, tau=collect.tau, top_k=collect.top_k, top_p=collect.top_p)
    with progress() as on_progress:
        result = run_demo(
            recipe,
            out,
            num_prompts=num_prompts,
            seed=seed,
            sampling=sampling,
            on_progress=on_progress,
        )
    write_page(result, out / "index.html")
    write_grid(result, out / "grid.png", columns=min(8, num_prompts))
    write_json(result, out / "result.json")
    table = Table("Infinity-Tiny", "full precision", "compressed")
    for row in table_rows(result):
        table.add_row(*row)
    Console().print(table)
    typer.echo(f"page: {out / 'index.html'}")
    typer.echo(json.dumps(result.to_dict()))
