"""`varc demo`: compress Infinity-Tiny, draw the same prompts with both models, and show the result.

Everything shown is measured in the run itself. Captions come from the validation scenes, so the
objects' attributes are known and the reader can check them.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from var_compressor import page
from var_compressor.artifact import is_artifact, write_atomically
from var_compressor.compress import calibrate_cache, check_kv, open_pipeline, quantize, store_cache
from var_compressor.evaluation.agreement import BitAgreement, bit_agreement, pooled, psnr_db, ssim
from var_compressor.evaluation.captions import captions
from var_compressor.evaluation.reader import Reader
from var_compressor.evaluation.scenes import sample_scenes, truths
from var_compressor.evaluation.scores import CaptionScore, caption_accuracy, score_caption
from var_compressor.generation import Drawn
from var_compressor.models.directory import meta_transformer
from var_compressor.models.sampling import Sampling
from var_compressor.models.schedule import Schedule
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.calibration import Progress
from var_compressor.recipe import Recipe

BATCH = 4


@dataclass(frozen=True)
class ModelResult:
    """One model's share of the table; bytes are of the transformer and of its KV cache.

    Full precision counts as a bf16 pipeline holds it, also where a CPU runs it in float32.
    """

    transformer_bytes: int
    kv_bytes_per_image: int
    seconds_per_image: float
    objects_right: float
    captions_right: float


@dataclass(frozen=True)
class DemoResult:
    """All that the demo measured; images are [B, 3, Y, X] in [-1, 1]."""

    summary: str
    captions: list[str]
    full: ModelResult
    compressed: ModelResult
    agreement: BitAgreement
    psnr_db: list[float]
    ssim: list[float]
    full_images: Tensor
    compressed_images: Tensor
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return {
            "compression": self.summary,
            "num_prompts": len(self.captions),
            "full": asdict(self.full),
            "compressed": asdict(self.compressed),
            "bit_agreement": asdict(self.agreement),
            "mean_bit_agreement": self.agreement.mean_same_bit,
            "mean_psnr_db": sum(self.psnr_db) / len(self.psnr_db),
            "mean_ssim": sum(self.ssim) / len(self.ssim),
            "seconds": self.seconds,
        }


def run_demo(
    recipe: Recipe,
    out: Path,
    *,
    num_prompts: int,
    seed: int,
    sampling: Sampling,
    on_progress: Progress,
) -> DemoResult:
    """Compress into ``out/artifact``, replacing an earlier demo's, draw, read and compare."""
    artifact, seconds = out / "artifact", {}
    check_kv(recipe.quant.kv)
    if not isinstance(sampling.cfg, float | int):
        raise ValueError("the demo takes one cfg for all levels; set collect.cfg to a number")
    if is_artifact(artifact):
        shutil.rmtree(artifact)
    began = perf_counter()
    quantize(recipe, artifact, on_progress=on_progress)
    seconds["quantize"] = perf_counter() - began
    began = perf_counter()
    store_cache(calibrate_cache(recipe, artifact, on_progress=on_progress), artifact, None)
    seconds["calibrate_kv"] = perf_counter() - began

    scenes = sample_scenes(torch.arange(num_prompts), "validation")
    texts = captions(scenes)
    full = open_pipeline(recipe.model)
    compressed = InfinityPipeline.from_pretrained(
        artifact, dtype=full.transformer.block_dtype, device=full.device
    )
    reader = Reader.load()
    runs = []
    for name, pipeline in (("full precision", full), ("compressed", compressed)):
        drawn = _draw_all(name, pipeline, texts, seed, sampling, on_progress)
        images = torch.cat([pipeline.vae.decode(one.latent_BDYX) for one, _ in drawn]).cpu()
        scores = _scores(reader, images, scenes)
        runs.append((pipeline, drawn, images, scores))
    agreement = _agreement(full, compressed, texts, [one for one, _ in runs[0][1]], sampling)
    images, compressed_images = runs[0][2], runs[1][2]
    full_result, compressed_result = (_result(*run) for run in runs)
    seconds["generate"] = num_prompts * (
        full_result.seconds_per_image + compressed_result.seconds_per_image
    )
    return DemoResult(
        summary=f"{recipe.quant.summary()}, {recipe.quant.kv.format.upper()} KV cache",
        captions=texts,
        full=full_result,
        compressed=compressed_result,
        agreement=agreement,
        psnr_db=psnr_db(compressed_images, images).tolist(),
        ssim=ssim(compressed_images, images).tolist(),
        full_images=images,
        compressed_images=compressed_images,
        seconds=seconds,
    )


def _draw_all(
    name: str,
    pipeline: InfinityPipeline,
    texts: list[str],
    seed: int,
    sampling: Sampling,
    on_progress: Progress,
) -> list[tuple[Drawn, float]]:
    schedule = Schedule.of(1.0, pipeline.transformer.config.pixel_budget)
    drawn = []
    for start in range(0, len(texts), BATCH):
        text = pipeline.encode(texts[start : start + BATCH])
        began = perf_counter()
        one = pipeline.draw(text, schedule, seed=seed + start, sampling=sampling, with_trace=True)
        drawn.append((one, perf_counter() - began))
        on_progress(f"drawing, {name}", min(start + BATCH, len(texts)), len(texts))
    return drawn


def _scores(reader: Reader, images: Tensor, scenes: Any) -> list[CaptionScore]:
    return [
        score_caption(reading, truth)
        for reading, truth in zip(reader.read(images), truths(scenes), strict=True)
    ]


def _result(
    pipeline: InfinityPipeline,
    drawn: list[tuple[Drawn, float]],
    images: Tensor,
    scores: list[CaptionScore],
) -> ModelResult:
    accuracy = caption_accuracy(scores)
    first = drawn[0][0]
    kv_bytes = first.kv_bytes // len(first.latent_BDYX)
    if pipeline.kv_params is None:
        kv_bytes = kv_bytes * 2 // pipeline.transformer.block_dtype.itemsize
    return ModelResult(
        transformer_bytes=transformer_bytes(pipeline),
        kv_bytes_per_image=kv_bytes,
        seconds_per_image=sum(seconds for _, seconds in drawn) / len(images),
        objects_right=accuracy.objects,
        captions_right=accuracy.captions,
    )


def transformer_bytes(pipeline: InfinityPipeline) -> int:
    """Bytes of all tensors; a full-precision model counts as a bf16 pipeline holds it."""
    model = pipeline.transformer
    if not pipeline.is_compressed:
        model = meta_transformer(model.config, torch.bfloat16)
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def _agreement(
    full: InfinityPipeline,
    compressed: InfinityPipeline,
    texts: list[str],
    drawn: list[Drawn],
    sampling: Sampling,
) -> BitAgreement:
    """Over all prompts, on the bits that the full-precision model drew."""
    assert isinstance(sampling.cfg, float | int)
    parts = []
    for i, one in enumerate(drawn):
        text = full.encode(texts[i * BATCH : (i + 1) * BATCH])
        parts.append(bit_agreement(full, compressed, text, one.trace.bits, cfg=sampling.cfg))
    return pooled(parts)


# --- showing --------------------------------------------------------------------------------------


def table_rows(result: DemoResult) -> list[tuple[str, str, str]]:
    """(what, full precision, compressed), ready to print."""
    full, small = result.full, result.compressed
    mib = 2**20
    rows = [
        ("transformer, MiB", full.transformer_bytes / mib, small.transformer_bytes / mib, "{:.2f}"),
        (
            "KV cache per image, MiB",
            full.kv_bytes_per_image / mib,
            small.kv_bytes_per_image / mib,
            "{:.3f}",
        ),
        ("seconds per image", full.seconds_per_image, small.seconds_per_image, "{:.2f}"),
        ("objects right, %", 100 * full.objects_right, 100 * small.objects_right, "{:.1f}"),
        ("captions right, %", 100 * full.captions_right, 100 * small.captions_right, "{:.1f}"),
    ]
    shown = [(name, form.format(a), form.format(b)) for name, a, b, form in rows]
    totals = result.to_dict()
    shown.append(("PSNR against full precision, dB", "", f"{totals['mean_psnr_db']:.2f}"))
    shown.append(("SSIM", "", f"{totals['mean_ssim']:.3f}"))
    levels = result.agreement.same_bit
    shown.append(("bit agreement, all levels, %", "", f"{100 * totals['mean_bit_agreement']:.2f}"))
    shown += [(f"  level {i}, %", "", f"{100 * share:.2f}") for i, share in enumerate(levels)]
    return shown


def write_page(result: DemoResult, path: Path) -> None:
    """One self-contained HTML file: the table, and every prompt with both images."""
    figures = [
        page.pictures(
            [(_png(full), "full precision"), (_png(small), "compressed")],
            text,
            f"PSNR {psnr:.1f} dB",
        )
        for text, full, small, psnr in zip(
            result.captions,
            result.full_images,
            result.compressed_images,
            result.psnr_db,
            strict=True,
        )
    ]
    parts = [
        page.paragraph(
            f"Left: full precision. Right: {result.summary}. Same prompts, same seeds; prompts are "
            "captions of validation scenes that the model was not trained on."
        ),
        page.table(("", "full precision", "compressed"), table_rows(result)),
        page.gallery(figures),
    ]
    page.write_page(path, "Infinity-Tiny, full precision and compressed", parts)


def write_grid(result: DemoResult, path: Path, *, columns: int) -> None:
    """PNG: full precision above compressed, the first ``columns`` prompts."""
    pair = torch.stack([result.full_images[:columns], result.compressed_images[:columns]])
    grid_3YX = pair.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    write_atomically(path, _png(grid_3YX))


def write_json(result: DemoResult, path: Path) -> None:
    write_atomically(path, (json.dumps(result.to_dict(), indent=1) + "\n").encode())


def _png(image_3YX: Tensor) -> bytes:
    from PIL import Image

    image = Image.fromarray(((image_3YX + 1) * 127.5).to(torch.uint8).permute(1, 2, 0).numpy())
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
