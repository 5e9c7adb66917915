"""Train the reader on fresh renders, measure it on fresh test scenes, and write model.safetensors
and metrics.json.

    PYTHONPATH=src python training/reader.py --out src/var_compressor/assets/infinity-tiny/reader
    --seconds 60 --seed 0

`--seconds` is training time; compiling before it and measuring after it are not counted. No picture
is seen twice.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from var_compressor.evaluation.reader import Reader, ReaderConfig, reader_loss
from var_compressor.evaluation.rendering import render
from var_compressor.evaluation.scenes import (
    SPLIT_CAPACITY,
    SceneBatch,
    SceneTruth,
    sample_scenes,
    truths,
)
from var_compressor.evaluation.scores import caption_accuracy, match_objects, score_caption

SEEDS_APART = 1 << 28  # scenes between the first ones of two seeds
PEAK_LEARNING_RATE = 3e-3
WARMUP_SHARE = 0.05
ATTRIBUTES = ("shape", "color", "material", "size")


@dataclass(frozen=True)
class Options:
    """The command line."""

    out: Path
    seconds: float
    seed: int
    batch_size: int
    log_every: int
    num_test: int


def parse_options() -> Options:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for model.safetensors, config.json, metrics.json",
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="training time")
    parser.add_argument("--seed", type=int, default=0, help="weights and scenes")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument(
        "--log-every", type=int, default=50, help="steps between points of the curve"
    )
    parser.add_argument("--num-test", type=int, default=5000, help="test scenes to measure on")
    return Options(**vars(parser.parse_args()))


# ---------------------------------------------------------------- pictures


def draw(
    paint: Callable[[SceneBatch], Tensor], first_id: Tensor, batch_size: int, split: str
) -> tuple[SceneBatch, Tensor]:
    """Consecutive scenes and their pictures, painted by ``render`` or its compiled form."""
    scenes = sample_scenes(first_id + torch.arange(batch_size, device=first_id.device), split)
    return scenes, paint(scenes)


def augment(image_B3HW: Tensor) -> Tensor:
    """What an image codec may do to a picture: other contrast and brightness, blur, loss of
    resolution, noise.

    Each row draws its own strengths, so the batch always holds clean and damaged pictures.
    """
    device, num_rows = image_B3HW.device, len(image_B3HW)
    draws_B5 = torch.rand(num_rows, 5, device=device)
    contrast_B, brightness_B, blur_B, coarse_B, noise_B = draws_B5[:, :, None, None, None].unbind(1)
    soft_B3HW = _blur(image_B3HW)
    image_B3HW = torch.lerp(image_B3HW, soft_B3HW, (2.0 * blur_B - 1.0).clamp(min=0.0))
    low_B3HW = F.interpolate(
        F.avg_pool2d(image_B3HW, 2), scale_factor=2.0, mode="bilinear", align_corners=False
    )
    image_B3HW = torch.where(coarse_B < 0.2, low_B3HW, image_B3HW)
    image_B3HW = image_B3HW * (0.9 + 0.2 * contrast_B) + 0.16 * (brightness_B - 0.5)
    strength_B = 0.10 * (2.0 * noise_B - 1.0).clamp(min=0.0)
    return image_B3HW + strength_B * torch.randn_like(image_B3HW)


def _blur(image_B3HW: Tensor) -> Tensor:
    """A Gaussian of standard deviation 1.5 pixels."""
    tap_K = torch.exp(-0.5 * (torch.arange(-4, 5, device=image_B3HW.device) / 1.5).square())
    tap_K = tap_K / tap_K.sum()
    wide = F.pad(image_B3HW, (4, 4, 4, 4), mode="replicate")
    rows = F.conv2d(wide, tap_K.view(1, 1, 1, -1).expand(3, 1, 1, -1), groups=3)
    return F.conv2d(rows, tap_K.view(1, 1, -1, 1).expand(3, 1, -1, 1), groups=3)


# ---------------------------------------------------------------- training


def learning_rate(share_done: float) -> float:
    """Warm-up, then half a cosine, over the share of the training time that has passed."""
    warmup = min(1.0, share_done / WARMUP_SHARE + 0.01)
    return PEAK_LEARNING_RATE * warmup * (0.5 + 0.5 * math.cos(math.pi * min(share_done, 1.0)))


def train(options: Options, device: torch.device, make: Callable) -> tuple[Reader, dict]:
    """A reader trained for `options.seconds`, and a record of the training."""
    torch.manual_seed(options.seed)
    reader = Reader(ReaderConfig()).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        reader.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=1e-4, fused=device.type == "cuda"
    )
    first_id = torch.tensor(options.seed * SEEDS_APART, device=device)
    compiling = time.perf_counter()
    make(first_id, options.batch_size, "train")
    synchronize(device)

    start, step, curve = time.perf_counter(), 0, []
    while (elapsed := time.perf_counter() - start) < options.seconds:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(elapsed / options.seconds)
        scenes, image_B3HW = make(first_id + step * options.batch_size, options.batch_size, "train")
        loss = training_step(reader, optimizer, scenes, image_B3HW)
        if step % options.log_every == 0:
            curve.append(
                {"step": step, "seconds": round(elapsed, 2), "loss": round(loss.item(), 4)}
            )
            print(curve[-1], flush=True)
        step += 1
    synchronize(device)
    record = {
        "seconds": round(time.perf_counter() - start, 2),
        "seconds_compiling": round(start - compiling, 2),
        "steps": step,
        "images_seen": step * options.batch_size,
        "curve": curve,
    }
    return reader, record


def training_step(
    reader: Reader, optimizer: torch.optim.Optimizer, scenes: SceneBatch, image_B3HW: Tensor
) -> Tensor:
    """One update; returns the detached loss."""
    on_gpu = image_B3HW.is_cuda
    image_B3HW = augment(image_B3HW).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext():
        output = reader(image_B3HW)
    loss = reader_loss(output, scenes)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(reader.parameters(), 5.0)
    optimizer.step()
    return loss.detach()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------- measuring


def measure(reader: Reader, options: Options, device: torch.device, make: Callable) -> dict:
    """Accuracies (0 to 1) on the last `num_test` scenes of the test split, which no other script
    draws from its end.
    """
    batch_size = min(options.batch_size, options.num_test)
    num_batches = math.ceil(options.num_test / batch_size)
    first_id = torch.tensor(SPLIT_CAPACITY - num_batches * batch_size, device=device)
    true, read = [], []
    for index in range(num_batches):
        scenes, image_B3HW = make(first_id + index * batch_size, batch_size, "test")
        true += truths(scenes)
        read += reader.read(image_B3HW.contiguous(memory_format=torch.channels_last))
    scores = [score_caption(reading, truth) for reading, truth in zip(read, true, strict=True)]
    num_objects = sum(len(truth.objects) for truth in true)
    placed = sum(
        match_objects(reading, truth, by_position=True)
        for reading, truth in zip(read, true, strict=True)
    )
    return {
        "num_scenes": len(true),
        "num_objects": num_objects,
        "objects_all_attributes_and_place": placed / num_objects,
        "count": sum(len(r.objects) == len(t.objects) for r, t in zip(read, true, strict=True))
        / len(true),
        "background": sum(r.background == t.background for r, t in zip(read, true, strict=True))
        / len(true),
        "per_attribute": attribute_accuracy(read, true, num_objects),
        **{f"score_{name}": value for name, value in asdict(caption_accuracy(scores)).items()},
    }


def attribute_accuracy(read: list, true: list[SceneTruth], num_objects: int) -> dict[str, float]:
    """Per attribute: the share of true objects whose nearest detection (within the radius) has it
    right.
    """
    num_right = dict.fromkeys(ATTRIBUTES, 0)
    for reading, truth in zip(read, true, strict=True):
        for thing in truth.objects:
            near = [(math.dist(seen.center, thing.center), seen) for seen in reading.objects]
            gap, seen = min(near, key=lambda pair: pair[0], default=(math.inf, None))
            if gap <= thing.radius:
                for name in ATTRIBUTES:
                    num_right[name] += getattr(seen, name) == getattr(thing, name)
    return {name: count / num_objects for name, count in num_right.items()}


def main() -> None:
    options = parse_options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    make = partial(draw, torch.compile(render) if device.type == "cuda" else render)
    torch.set_float32_matmul_precision("high")
    reader, record = train(options, device, make)
    reader.save(options.out / "model.safetensors")
    # what is measured is what was written: the weights after their rounding to bfloat16
    stored = Reader.load(options.out / "model.safetensors").to(
        device, memory_format=torch.channels_last
    )
    metrics = {
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "seed": options.seed,
        "batch_size": options.batch_size,
        "parameters": sum(p.numel() for p in stored.parameters()),
        "test": measure(stored, options, device, make),
        "training": record,
    }
    (options.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics["test"], indent=2))


if __name__ == "__main__":
    main()
