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
from pathlib import Path

import torch
import torch.nn.functional as F
from loop import Run, machine, save_json, save_weights
from safetensors.torch import load_file
from torch import Tensor, nn

from var_compressor.evaluation.reader import Reader, match_objects, reader_loss
from var_compressor.evaluation.scenes import SceneBatch, render, sample_scenes, truths
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
    for start in range(0, count, 100):
        scenes = sample_scenes(torch.arange(start, start + 100, device=device), split)
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


def wait_for(path: Path) -> Path:
    """Readers may still be training beside us."""
    while not (path / "model.safetensors").exists() or not (path / "metrics.json").exists():
        time.sleep(0.5)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--reader", type=Path, required=True, help="reader for the loss")
    parser.add_argument("--judge", type=Path, required=True, help="reader for the metrics")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="go on from this model.safetensors")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-images", type=int, default=2000)
    parser.add_argument("--compile", choices=["full", "norm", "none"], default="full")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    config = MODELS["infinity-tiny"].vae
    vae = VAE(config).to(device, memory_format=torch.channels_last)
    if args.init:
        vae.load_state_dict({k: v.float() for k, v in load_file(args.init).items()})
    model = Autoencoder(vae, Schedule.of(1.0, "0.06M"))
    run = Run([model], seconds=args.seconds, peak_lr=args.lr, weight_decay=0.01)
    draw = render
    if args.compile == "full":
        vae.encoder.compile()
        vae.decoder.compile()
        draw = torch.compile(render)
    elif args.compile == "norm":
        from var_compressor.models.vae import NormSwish

        NormSwish.forward = torch.compile(NormSwish.forward, dynamic=True)
        draw = torch.compile(render)

    def batch(step: int) -> tuple[SceneBatch, Tensor]:
        first = (args.seed * 1_000_003 + step) * args.batch_size
        ids = torch.arange(first, first + args.batch_size, device=device)
        scenes = sample_scenes(ids, "train")
        return scenes, draw(scenes).contiguous(memory_format=torch.channels_last)

    began = time.monotonic()
    decoded, commitment = model(batch(0)[1])
    (decoded.mean() + commitment).backward()
    run.optimizer.zero_grad(set_to_none=True)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"warm-up (compile) {time.monotonic() - began:.1f} s", flush=True)
    reader = (
        Reader.load(wait_for(args.reader) / "model.safetensors")
        .to(device)
        .eval()
        .requires_grad_(False)
    )
    judge = (
        Reader.load(wait_for(args.judge) / "model.safetensors")
        .to(device)
        .eval()
        .requires_grad_(False)
    )
    print(f"readers ready after {time.monotonic() - began:.1f} s", flush=True)

    run.start()
    next_log = 0.0
    while run.elapsed < args.seconds:
        scenes, image = batch(run.step_index)
        decoded, commitment = model(image)
        pixel, feature, reading = reconstruction_loss(
            decoded, image, scenes, reader, model.use_bf16
        )
        run.step(2 * pixel + 0.5 * feature + 0.05 * reading + 0.25 * commitment)
        if run.elapsed >= next_log:
            next_log = run.elapsed + args.seconds / 40
            mse = F.mse_loss(decoded.clamp(-1, 1), image) / 4
            run.log(
                run.step_index * args.batch_size,
                pixel=pixel.item(),
                feature=feature.item(),
                reading=reading.item(),
                commitment=commitment.item(),
                psnr_db=-10 * mse.log10().item(),
            )
            if len(run.curve) % 10 == 0:
                save_weights(run.averaged[0].vae, args.out / "model.safetensors")
    averaged: Autoencoder = run.averaged[0]
    averaged.to(torch.bfloat16).float()  # measure what is shipped: weights rounded to bf16
    averaged.use_bf16 = False
    metrics = {
        split: evaluate(averaged, judge, split, args.eval_images, device)
        for split in ("validation", "test")
    }
    print(metrics, flush=True)
    save_weights(averaged.vae, args.out / "model.safetensors")
    save_json(config_to_dict(config), args.out / "config.json")
    record = {"metrics": metrics, "machine": machine(), "seed": args.seed, "seconds": run.elapsed}
    record |= {
        "images": run.step_index * args.batch_size,
        "batch_size": args.batch_size,
        "curve": run.curve,
    }
    save_json(record, args.out / "metrics.json")
    save_pictures(averaged, args.out / "reconstructions.png", device)


@torch.inference_mode()
def save_pictures(model: Autoencoder, path: Path, device: str) -> None:
    """Test scenes above their reconstructions."""
    from PIL import Image

    image = render(sample_scenes(torch.arange(8, device=device), "test"))
    rows = torch.cat([image, model(image)[0].clamp(-1, 1)])
    grid = rows.unflatten(0, (2, 8)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    Image.fromarray(((grid + 1) * 127.5).round().to(torch.uint8).cpu().numpy()).save(path)


if __name__ == "__main__":
    main()
