"""Train Infinity-Tiny's VAE: image -> bits of 7 levels -> image.

    PYTHONPATH=src python training/vae.py --reader DIR/perceptual --judge DIR/judge --out DIR

The loss is a foreground-weighted L1, feature and classification losses of one reader
(``--reader``), and commitment to the quantized latent. What is reported comes from another,
independently trained reader (``--judge``) that no gradient ever saw.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from loop import Run, machine, save_grid, save_json, save_weights
from safetensors.torch import load_file
from torch import Tensor, nn

from var_compressor.evaluation.reader import Reader, reader_loss
from var_compressor.evaluation.rendering import render
from var_compressor.evaluation.scenes import SceneBatch, sample_scenes, truths
from var_compressor.evaluation.scores import match_objects
from var_compressor.models.bits import quantize_latent
from var_compressor.models.config import MODELS, config_to_dict
from var_compressor.models.schedule import Schedule
from var_compressor.models.vae import VAE


class Autoencoder(nn.Module):
    """Encoder, straight-through quantization, decoder."""

    def __init__(self, vae: VAE, schedule: Schedule) -> None:
        super().__init__()
        self.vae, self.schedule = vae, schedule
        self.use_bf16 = torch.cuda.is_available()

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast("cuda", torch.bfloat16, enabled=self.use_bf16)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        with self.autocast():
            latent = self.vae.encoder(image)
        latent = latent.float()
        with torch.no_grad():
            _, quantized = quantize_latent(latent, self.schedule, patchify=False)
        passed = latent + (quantized - latent).detach()
        with self.autocast():
            decoded = self.vae.decoder(passed)
        return decoded.float(), F.mse_loss(latent, quantized)


def foreground_weight(scenes: SceneBatch, size: int) -> Tensor:
    """1 on the background, 4 in a disc around each object: ``[B, 1, size, size]``."""
    axis = torch.arange(size, device=scenes.center_BO2.device) + 0.5
    dx = axis - scenes.center_BO2[..., 0, None]
    dy = axis - scenes.center_BO2[..., 1, None]
    squared = dx.square()[:, :, None, :] + dy.square()[:, :, :, None]
    inside = squared < (1.1 * scenes.radius_BO)[:, :, None, None].square()
    inside = inside & scenes.present_BO[:, :, None, None]
    return 1.0 + 3.0 * inside.any(1, keepdim=True).float()


def reconstruction_loss(
    decoded: Tensor, image: Tensor, scenes: SceneBatch, reader: Reader, use_bf16: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted L1, feature distance and classification loss of the reader."""
    weight = foreground_weight(scenes, image.shape[-1])
    pixel = ((decoded - image).abs() * weight).mean() / weight.mean()
    with torch.autocast("cuda", torch.bfloat16, enabled=use_bf16):
        with torch.no_grad():
            wanted = reader.feature_maps(image)
        got = reader.feature_maps(decoded)
    feature = sum(
        F.l1_loss(g.float(), w.float()) / w.float().abs().mean()
        for g, w in zip(got, wanted, strict=True)
    )
    return pixel, feature / len(wanted), reader_loss(reader(decoded), scenes)


@torch.inference_mode()
def evaluate(
    model: Autoencoder, judge: Reader, split: str, count: int, device: str
) -> dict[str, float]:
    """PSNR and the share of objects whose attributes the judge reads right."""
    objects = right = right_plain = 0
    squared_error = 0.0
    for ids in torch.arange(count, device=device).split(100):
        scenes = sample_scenes(ids, split)
        image = render(scenes)
        decoded = model(image)[0].clamp(-1, 1)
        squared_error += ((decoded - image) / 2).square().mean((1, 2, 3)).log10().sum().item()
        for reading, plain, truth in zip(
            judge.read(decoded), judge.read(image), truths(scenes), strict=True
        ):
            right += match_objects(reading, truth, by_position=True)
            right_plain += match_objects(plain, truth, by_position=True)
            objects += len(truth.objects)
    return {
        "psnr_db": -10 * squared_error / count,
        "objects_right": right / objects,
        "objects_right_original": right_plain / objects,
        "images": count,
    }


def wait_for_reader(folder: Path, device: str) -> Reader:
    """The frozen reader of a folder, once it is there: readers may still be training beside us."""
    while not all((folder / name).exists() for name in ("model.safetensors", "metrics.json")):
        time.sleep(0.5)
    return Reader.load(folder / "model.safetensors").to(device).eval().requires_grad_(False)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--reader", type=Path, required=True, help="folder, for the loss")
    parser.add_argument("--judge", type=Path, required=True, help="folder, for the metrics")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="go on from this model.safetensors")
    parser.add_argument("--seconds", type=float, default=370, help="training time")
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=0, help="weights and scenes")
    parser.add_argument("--eval-images", type=int, default=2000)
    return parser.parse_args()


def scene_source(
    options: argparse.Namespace, device: str
) -> Callable[[int], tuple[SceneBatch, Tensor]]:
    """A function from the number of a step to its scenes and their pictures."""
    draw = torch.compile(render) if device == "cuda" else render

    def batch(step: int) -> tuple[SceneBatch, Tensor]:
        first = (options.seed * 1_000_003 + step) * options.batch_size
        ids = torch.arange(first, first + options.batch_size, device=device)
        scenes = sample_scenes(ids, "train")
        return scenes, draw(scenes).contiguous(memory_format=torch.channels_last)

    return batch


def build_model(options: argparse.Namespace, device: str) -> Autoencoder:
    vae = VAE(MODELS["infinity-tiny"].vae).to(device, memory_format=torch.channels_last)
    if options.init:
        vae.load_state_dict({k: v.float() for k, v in load_file(options.init).items()})
    return Autoencoder(vae, Schedule.of(1.0, "0.06M"))


def warm_up(model: Autoencoder, image: Tensor) -> None:
    """Compile forward and backward, so that the clock of the run does not count it."""
    if image.is_cuda:
        model.vae.encoder.compile()
        model.vae.decoder.compile()
    decoded, commitment = model(image)
    (decoded.mean() + commitment).backward()
    model.zero_grad(set_to_none=True)
    if image.is_cuda:
        torch.cuda.synchronize()


def train(
    run: Run,
    model: Autoencoder,
    batch: Callable[[int], tuple[SceneBatch, Tensor]],
    reader: Reader,
    out: Path,
) -> None:
    """Steps until the run's seconds are over; the averaged weights are saved on the way."""
    run.start()
    next_log = 0.0
    while run.elapsed < run.seconds:
        scenes, image = batch(run.step_index)
        decoded, commitment = model(image)
        pixel, feature, reading = reconstruction_loss(
            decoded, image, scenes, reader, model.use_bf16
        )
        run.step(2 * pixel + 0.5 * feature + 0.05 * reading + 0.25 * commitment)
        if run.elapsed >= next_log:
            next_log = run.elapsed + run.seconds / 40
            mse = F.mse_loss(decoded.clamp(-1, 1), image) / 4
            run.log(
                run.step_index * len(image),
                pixel=pixel.item(),
                feature=feature.item(),
                reading=reading.item(),
                commitment=commitment.item(),
                psnr_db=-10 * mse.log10().item(),
            )
            if len(run.curve) % 10 == 0:
                save_weights(run.averaged[0].vae, out / "model.safetensors")


def main() -> None:
    options = parse_options()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(options.seed)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    options.out.mkdir(parents=True, exist_ok=True)
    model, batch = build_model(options, device), scene_source(options, device)
    run = Run([model], seconds=options.seconds, peak_lr=options.lr, weight_decay=0.01)
    warm_up(model, batch(0)[1])
    reader, judge = (wait_for_reader(f, device) for f in (options.reader, options.judge))
    train(run, model, batch, reader, options.out)

    averaged: Autoencoder = run.averaged[0]
    averaged.to(torch.bfloat16).float()  # measure what is shipped: weights rounded to bf16
    averaged.use_bf16 = False
    trained_seconds = run.elapsed
    metrics = {
        split: evaluate(averaged, judge, split, options.eval_images, device)
        for split in ("validation", "test")
    }
    print(metrics, flush=True)
    save_weights(averaged.vae, options.out / "model.safetensors")
    save_json(config_to_dict(averaged.vae.config), options.out / "config.json")
    record = {
        "metrics": metrics,
        "machine": machine(),
        "seed": options.seed,
        "seconds": trained_seconds,
        "images": run.step_index * options.batch_size,
        "batch_size": options.batch_size,
        "curve": run.curve,
    }
    save_json(record, options.out / "metrics.json")
    save_pictures(averaged, options.out / "reconstructions.png", device)


@torch.inference_mode()
def save_pictures(model: Autoencoder, path: Path, device: str) -> None:
    """Test scenes above their reconstructions."""
    image = render(sample_scenes(torch.arange(8, device=device), "test"))
    save_grid(torch.cat([image, model(image)[0].clamp(-1, 1)]), path)


if __name__ == "__main__":
    main()
