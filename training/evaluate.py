"""Measure a trained Infinity-Tiny: caption accuracy, Fréchet distance, diversity over seeds.

    PYTHONPATH=src python training/evaluate.py --captions 500 --cfg 2 --tau 0.3 --split test \\
        --seed 0 --out training/metrics/evaluation.json

Several values of --cfg and --tau are taken in pairs. Images are drawn in float32 on the CPU, one
seed per image, so a result does not depend on the batch. Everything is judged by the reader that
comes with the model.

Shapes: N images, F features of the reader, R bootstrap resamples, S seeds, P captions.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from loop import machine, save_json
from torch import Tensor

from var_compressor.evaluation.captions import captions
from var_compressor.evaluation.reader import Reader, Reading
from var_compressor.evaluation.rendering import render
from var_compressor.evaluation.scenes import HELD_OUT, SceneTruth, sample_scenes, truths
from var_compressor.evaluation.scores import CaptionScore, frechet_distance, score_caption
from var_compressor.models.bits import quantize_latent
from var_compressor.models.sampling import Sampling
from var_compressor.pipeline import InfinityPipeline

BATCH = 25
NUM_RESAMPLES = 10_000
NUM_LAYOUTS = 20_000


def in_batches(function: Callable[[Tensor], Tensor], ids_N: Tensor) -> Tensor:
    """The concatenated results of ``function`` on runs of ids."""
    return torch.cat([function(ids) for ids in ids_N.split(BATCH)])


# ---------------------------------------------------------------- captions


def accuracy(scores: Sequence[CaptionScore], *, seed: int) -> dict:
    """Shares of objects and captions that are right, with 95 % bootstrap intervals over images."""
    columns = [(s.objects_right, s.num_objects, s.caption_right) for s in scores]
    right_N, objects_N, captions_N = torch.tensor(columns, dtype=torch.float64).unbind(1)
    rng = torch.Generator().manual_seed(seed)
    pick_RN = torch.randint(len(scores), (NUM_RESAMPLES, len(scores)), generator=rng)
    objects_R = right_N[pick_RN].sum(1) / objects_N[pick_RN].sum(1)
    return {
        "images": len(scores),
        "objects": int(objects_N.sum()),
        "objects_right": float(right_N.sum() / objects_N.sum()),
        "objects_right_95": interval(objects_R),
        "captions_right": float(captions_N.mean()),
        "captions_right_95": interval(captions_N[pick_RN].mean(1)),
    }


def interval(values_R: Tensor) -> list[float]:
    return [float(values_R.quantile(q)) for q in (0.025, 0.975)]


def holds_unseen(truth: SceneTruth) -> bool:
    """Whether an object has a shape-colour-material triple that training never showed."""
    return any(thing.attributes[:3] in HELD_OUT for thing in truth.objects)


def accuracy_by_group(
    readings: Sequence[Reading], wanted: Sequence[SceneTruth], *, seed: int
) -> dict[str, dict]:
    """Accuracy on all images, with and without unseen triples, and by the number of objects."""
    groups: dict[str, list[CaptionScore]] = defaultdict(list)
    for reading, truth in zip(readings, wanted, strict=True):
        score = score_caption(reading, truth)
        names = ["all", "unseen_triples" if holds_unseen(truth) else "seen_triples"]
        for name in (*names, f"objects_{len(truth.objects)}"):
            groups[name].append(score)
    return {name: accuracy(groups[name], seed=seed) for name in sorted(groups)}


# ---------------------------------------------------------------- diversity


def diversity(
    pipeline: InfinityPipeline,
    reader: Reader,
    sampling: Sampling,
    *,
    split: str,
    num_captions: int,
    num_seeds: int,
    seed: int,
) -> dict[str, float]:
    """How images of one caption differ from seed to seed."""
    scenes = sample_scenes(torch.arange(num_captions), split)
    wanted = truths(scenes)
    images, features, spreads = [], [], []
    for prompt, truth in zip(captions(scenes), wanted, strict=True):
        seeds = range(seed, seed + num_seeds)
        made = pipeline.generate([prompt] * num_seeds, seed=seeds, sampling=sampling)
        images.append(made.uint8_BYX3.flatten(1))
        features.append(reader.features(made.image_B3YX))
        spreads += center_spreads(reader.read(made.image_B3YX), truth)
    features_PSF = torch.stack(features)
    apart_PSS = torch.stack([torch.cdist(f, f) for f in features])
    middles_PF = features_PSF.mean(1)
    num_pairs = num_captions * num_seeds * (num_seeds - 1)
    return {
        "captions": num_captions,
        "seeds": num_seeds,
        "distinct_images": sum(len(x.unique(dim=0)) for x in images) / (num_captions * num_seeds),
        "feature_distance_between_seeds": float(apart_PSS.sum() / num_pairs),
        "feature_distance_between_captions": float(torch.pdist(middles_PF).mean()),
        "center_std_px": sum(spreads) / len(spreads),
        "center_std_px_of_scenes": layout_spread(wanted, split),
    }


def center_spreads(readings: Sequence[Reading], truth: SceneTruth) -> list[float]:
    """Of every object of the caption: standard deviation per axis of its centre, in pixels."""
    spreads = []
    for thing in truth.objects:
        centers = [
            next(seen.center for seen in reading.objects if seen.attributes == thing.attributes)
            for reading in readings
            if any(seen.attributes == thing.attributes for seen in reading.objects)
        ]
        if len(centers) > 1:
            spreads.append(float(torch.tensor(centers).std(0).mean()))
    return spreads


def layout_spread(wanted: Sequence[SceneTruth], split: str) -> float:
    """The same deviation in real scenes that fit the captions.

    Where objects stand depends on their sizes and relations alone, so scenes that agree in these
    serve as other pictures of the same caption.
    """

    def key(truth: SceneTruth) -> tuple:
        return tuple(t.size for t in truth.objects), tuple(r.kind for r in truth.relations)

    centers = defaultdict(list)
    for truth in truths(sample_scenes(torch.arange(NUM_LAYOUTS), split)):
        centers[key(truth)].append([thing.center for thing in truth.objects])
    spreads = [torch.tensor(centers[key(truth)]).std(0).mean(1) for truth in wanted]
    return float(torch.cat(spreads).mean())


# ---------------------------------------------------------------- all of it


def frechet_references(
    pipeline: InfinityPipeline, reader: Reader, split: str, count: int
) -> tuple[Tensor, dict[str, float]]:
    """Features of renders that no caption is taken from, and what stands between them and renders
    of the captions' scenes, before and after the VAE."""
    schedule = pipeline.schedule_for(1.0, None)

    def rendered(ids: Tensor) -> Tensor:
        return reader.features(render(sample_scenes(ids, split)))

    def reconstructed(ids: Tensor) -> Tensor:
        latent_BDYX = pipeline.vae.encode(render(sample_scenes(ids, split)))
        _, quantized_BDYX = quantize_latent(latent_BDYX, schedule, patchify=False)
        return reader.features(pipeline.vae.decode(quantized_BDYX))

    same, others_NF = torch.arange(count), in_batches(rendered, torch.arange(count, 2 * count))
    return others_NF, {
        "renders": frechet_distance(in_batches(rendered, same), others_NF),
        "reconstructions": frechet_distance(in_batches(reconstructed, same), others_NF),
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="infinity-tiny", help="name or directory")
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--cfg", type=float, nargs="+", default=[2.0])
    parser.add_argument("--tau", type=float, nargs="+", default=[0.3])
    parser.add_argument("--split", choices=["validation", "test"], default="test")
    parser.add_argument("--seed", type=int, default=0, help="of the first image; the next is +1")
    parser.add_argument("--diversity-captions", type=int, default=20)
    parser.add_argument("--diversity-seeds", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    args = parser.parse_args()

    pipeline = InfinityPipeline.from_pretrained(args.model, dtype=torch.float32)
    reader = Reader.load()
    scenes = sample_scenes(torch.arange(args.captions), args.split)
    prompts, wanted = captions(scenes), truths(scenes)
    others_NF, frechet = frechet_references(pipeline, reader, args.split, args.captions)
    record = {"machine": machine(), "model": args.model, "split": args.split, "seed": args.seed}
    record |= {"frechet_to_other_renders": frechet, "settings": []}
    for cfg, tau in zip(args.cfg, args.tau, strict=True):
        sampling, readings = Sampling(cfg=cfg, tau=tau), []

        def drawn(ids: Tensor, sampling: Sampling = sampling, seen: list = readings) -> Tensor:
            texts, seeds = [prompts[i] for i in ids], [args.seed + int(i) for i in ids]
            images = pipeline.generate(texts, seed=seeds, sampling=sampling).image_B3YX
            seen += reader.read(images)
            return reader.features(images)

        features_NF = in_batches(drawn, torch.arange(args.captions))
        result = {
            "cfg": cfg,
            "tau": tau,
            "accuracy": accuracy_by_group(readings, wanted, seed=args.seed),
            "frechet_to_other_renders": frechet_distance(features_NF, others_NF),
        }
        result["diversity"] = diversity(
            pipeline,
            reader,
            sampling,
            split=args.split,
            num_captions=args.diversity_captions,
            num_seeds=args.diversity_seeds,
            seed=args.seed,
        )
        print(result, flush=True)
        record["settings"].append(result)
        save_json(record, args.out)


if __name__ == "__main__":
    main()
