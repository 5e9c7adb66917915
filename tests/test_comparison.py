"""Comparing models on captions: every number against a computation of its own."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tiny import random_text, tiny_pipeline
from var_compressor.evaluation.agreement import BitAgreement, bit_agreement, pooled
from var_compressor.evaluation.captions import captions
from var_compressor.evaluation.comparison import (
    Exam,
    Resampling,
    compare,
    examine,
    likeness,
    render_features,
)
from var_compressor.evaluation.reader import Reader
from var_compressor.evaluation.scenes import sample_scenes, truths
from var_compressor.evaluation.scores import caption_accuracy, frechet_distance, score_caption
from var_compressor.models.sampling import Sampling
from var_compressor.pipeline import InfinityPipeline
from var_compressor.spec import KVSpec, QuantSpec

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SAMPLING = Sampling(cfg=2.0, tau=0.3, top_k=0, top_p=0.97)
COUNT = 4


def quiet(stage, done, total):
    pass


@pytest.fixture(scope="module")
def full():
    return InfinityPipeline.from_pretrained("infinity-tiny", dtype=torch.float32)


@pytest.fixture(scope="module")
def other(full):
    """A model that is a little off."""
    rng = torch.Generator().manual_seed(0)
    transformer = copy.deepcopy(full.transformer)
    for block in transformer.blocks:
        weight = block.ffn.fc2.weight
        weight.add_(0.3 * weight.std() * torch.randn(weight.shape, generator=rng))
    return InfinityPipeline(transformer, full.vae, full.text_encoder)


@pytest.fixture(scope="module")
def exam():
    reader = Reader.load()
    return Exam(
        scenes=sample_scenes(torch.arange(COUNT), "test"),
        seed=5,
        sampling=SAMPLING,
        batch=3,
        reader=reader,
        renders_NF=render_features(reader, sample_scenes(torch.arange(COUNT, 12), "test")),
        resampling=Resampling(num_resamples=200, num_frechet_resamples=20, seed=0),
    )


@pytest.fixture(scope="module")
def examined(full, exam):
    return examine(full, exam, on_progress=quiet)


def drawn_in_batches(model, texts):
    """Images, latents and bits, in the exam's batches: others may round otherwise."""
    runs = [
        model.generate(texts[rows], seed=seed, sampling=SAMPLING, with_trace=True)
        for rows, seed in ((slice(0, 3), 5), (slice(3, 4), 8))
    ]
    image_N3YX, latent_NDYX = (
        torch.cat([getattr(run, name) for run in runs]) for name in ("image_B3YX", "latent_BDYX")
    )
    bits = [torch.cat(level) for level in zip(*(run.trace.bits for run in runs), strict=True)]
    return image_N3YX, latent_NDYX, bits


def test_every_number_of_a_comparison(full, other, exam, examined):
    found, texts = compare(examined, other, exam, on_progress=quiet), captions(exam.scenes)
    wanted_N3YX, wanted_NDYX, bits = drawn_in_batches(full, texts)
    image_N3YX, latent_NDYX, _ = drawn_in_batches(other, texts)
    close = found.likeness
    mse_N = ((image_N3YX - wanted_N3YX) / 2).double().square().mean((1, 2, 3)).numpy()
    assert close.psnr_db.value == pytest.approx(-10 * np.log10(mse_N).mean(), abs=1e-3)
    away_N = (latent_NDYX - wanted_NDYX).flatten(1).norm(dim=1)
    relative = float((away_N / wanted_NDYX.flatten(1).norm(dim=1)).mean())
    assert close.latent_error.value == pytest.approx(relative, abs=1e-5) and relative > 0.05
    assert 0.3 < close.ssim.value < 1

    forced = bit_agreement(full, other, full.encode(texts), bits, cfg=SAMPLING.cfg)
    assert found.agreement.same_bit == pytest.approx(forced.same_bit, abs=2e-3)
    assert found.agreement.kl_nats == pytest.approx(forced.kl_nats, rel=0.02)
    assert found.agreement.num_bits == forced.num_bits

    accuracies, distances = [], []
    for images in (wanted_N3YX, image_N3YX):
        pairs = zip(exam.reader.read(images), truths(exam.scenes), strict=True)
        accuracies.append(caption_accuracy([score_caption(*pair) for pair in pairs]))
        with torch.inference_mode():
            features_NF = exam.reader.features(images)
        distances.append(frechet_distance(features_NF, exam.renders_NF))
    for marks, accuracy, distance in zip(
        (examined.marks, found.marks), accuracies, distances, strict=True
    ):
        assert marks.objects_right.value == pytest.approx(accuracy.objects)
        assert marks.captions_right.value == pytest.approx(accuracy.captions)
        assert marks.frechet.value == pytest.approx(distance, rel=1e-4)
    before, after = accuracies
    assert close.objects_right_change.value == pytest.approx(after.objects - before.objects)
    assert close.captions_right_change.value == pytest.approx(after.captions - before.captions)
    assert close.frechet_change.value == pytest.approx(distances[1] - distances[0], abs=1e-2)


def test_a_model_is_like_itself_and_the_interval_knows_it(exam, examined):
    found = likeness(examined, examined, exam)
    assert set(asdict(found.psnr_db).values()) == {100.0}
    assert found.ssim.value == pytest.approx(1, abs=1e-4)
    nothing = {"value": 0.0, "low": 0.0, "high": 0.0}
    for change in (
        *(found.latent_error, found.objects_right_change),
        *(found.captions_right_change, found.frechet_change),
    ):
        assert asdict(change) == nothing


def test_an_image_has_the_seed_of_its_place_not_of_its_batch(full, exam, examined):
    alone = [
        examine(full, replace(exam, seed=seed, batch=1), on_progress=quiet).answers
        for seed in (5, 6)
    ]
    same, other = (
        torch.cat(
            [
                (a == b).double().flatten()
                for a, b in zip(one.bits, examined.answers.bits, strict=True)
            ]
        )
        for one in alone
    )
    # a bit that rounding decides is rare, and so is what follows from it
    assert same.mean() > 0.97 > 0.9 > other.mean()


def test_one_cfg_for_all_levels(exam):
    with pytest.raises(ValueError, match="one cfg for all levels"):
        replace(exam, sampling=Sampling(cfg=(1.0,) * 7))


def test_batches_pool_to_what_all_at_once_gives():
    models, text = [tiny_pipeline(), tiny_pipeline(seed=1)], random_text((4, 7, 5))
    bits = models[0].generate(text, seed=0, sampling=Sampling(cfg=2.0), with_trace=True).trace.bits
    whole = bit_agreement(*models, text, bits, cfg=2.0)
    parts = [
        bit_agreement(*models, random_rows(text, rows), [b[rows] for b in bits], cfg=2.0)
        for rows in (slice(0, 2), slice(2, 3))
    ]
    assert pooled(parts).same_bit == pytest.approx(whole.same_bit, abs=1e-3)
    assert pooled(parts).kl_nats == pytest.approx(whole.kl_nats, rel=1e-3)
    assert pooled(parts).num_bits == whole.num_bits


def random_rows(text, rows):
    kept = text.rows()[rows]
    return type(text)(torch.cat(kept), tuple(map(len, kept)))


# --- benchmarks/variants.py -----------------------------------------------------------------------


@pytest.fixture
def variants(monkeypatch):
    if not BENCHMARKS.is_dir():
        pytest.skip("the benchmarks come with a checkout only")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import variants

    return variants


def estimate(value):
    return {"value": value, "low": value - 0.01, "high": value + 0.02}


def row(title):
    marks = {name: estimate(0.5) for name in ("objects_right", "captions_right", "frechet")}
    return {"title": title, "marks": marks, "transformer_bytes": 3 * 2**20} | dict.fromkeys(
        ("likeness", "agreement", "output_snr_db", "quantize_seconds")
    )


@pytest.fixture
def run(variants, monkeypatch, tmp_path, capsys):
    """Run the script with a measurement that says what it was asked for."""
    asked = []

    def measure(name, recipe, full, exam, artifacts):
        asked.append(name)
        if name == "int8" and recipe.quant.low_rank.rank == 16:
            raise ValueError("not today")
        return row(name)

    monkeypatch.setattr(variants, "measure", measure)
    monkeypatch.setattr(variants, "new_exam", lambda *args, **options: None)
    monkeypatch.setattr(variants, "examine", lambda *args, **options: None)

    def once(*words):
        asked.clear()
        argv = ["variants", "--out", str(tmp_path), "--device", "cpu", *words]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as caught:
            variants.main()
        results = json.loads((tmp_path / "results.json").read_text())
        return list(asked), caught.value.code, results, capsys.readouterr()

    return once


def test_the_script_measures_what_is_missing_only(run):
    floor = ["full", "other-seeds-1", "other-seeds-2"]
    asked, code, results, printed = run("--variants", "naive", "int8")
    assert (asked, code) == ([*floor, "naive", "int8"], 0)
    assert [one["title"] for one in results["rows"]] == asked
    assert "| naive | – |" in printed.out and "50.0 [49.0, 52.0]" in printed.out
    asked, _, results, _ = run("--variants", "naive", "int8", "gptq")
    assert asked == ["gptq"] and len(results["rows"]) == 6
    # other settings or another recipe make other rows
    assert len(run("--variants", "naive", "--num-captions", "300")[0]) == 4
    assert len(run("--variants", "naive", "--set", "quant.low_rank.rank=16")[0]) == 4


def test_a_variant_that_cannot_be_leaves_the_others(run):
    _, code, results, printed = run(
        "--variants", "int8", "naive", "--set", "quant.low_rank.rank=16"
    )
    assert code == 1 and results["failed"] == {"int8": "not today"}
    assert results["rows"][-1]["title"] == "naive" and "int8: left out: not today" in printed.err


def test_every_variant_is_a_recipe_of_its_own(variants):
    recipes = {
        name: variants.load_recipe(one.recipes, one.overrides).quant
        for name, one in variants.VARIANTS.items()
    }
    assert len(set(recipes.values())) == len(recipes) == 9
    assert recipes["naive"].low_rank.rank == 0 and not recipes["naive"].smooth.enabled
    assert recipes["smoothquant"].low_rank.rank == 0 and recipes["smoothquant"].smooth.enabled
    assert recipes["gptq"].weight.rounding == "gptq"
    fc2 = {name: one.for_module("blocks.0.ffn.fc2").act.format for name, one in recipes.items()}
    assert fc2["svdquant"] == "uint4" and fc2["signed"] == "sint4"
    formats = {name: (one.weight.format, one.act.format) for name, one in recipes.items()}
    assert formats["w4a8"] == ("sint4", "sint8") and formats["w4a16"] == ("sint4", None)
    assert formats["int8"] == ("sint8", "sint8") and formats["nvfp4"] == ("nvfp4", "nvfp4")


# --- benchmarks/kv_caches.py ----------------------------------------------------------------------


WEIGHTS = {"full": "full precision", "w4a4": "SVDQuant W4A4"}


def test_caches_are_measured_once_and_differ(variants, monkeypatch, tmp_path, capsys):
    import kv_caches

    specs = [cache.spec for cache in kv_caches.CACHES.values() if cache.spec is not None]
    assert len(set(specs)) == len(specs) == len(kv_caches.CACHES) - 2
    for spec in specs:
        replace(QuantSpec(), kv=spec).validate()
    asked = []

    def measure(name, spec, reference, base, exam):
        asked.append((name, spec))
        found = {
            **dict.fromkeys(("agreement", "likeness", "attention_kept", "output_snr_db")),
            **{"bytes_per_image": 2048, "marks": row(name)["marks"], "calibrate_seconds": 2.0},
        }
        return found, None

    def forced_agreement(truth, pipeline, exam, *, on_progress):
        return BitAgreement((0.5, 0.75), (0.1, 0.1), (4, 4))

    monkeypatch.setattr(kv_caches, "measure", measure)
    monkeypatch.setattr(
        kv_caches, "measure_floor", lambda name, *_: measure(name, None, None, None, None)
    )
    monkeypatch.setattr(kv_caches, "forced_agreement", forced_agreement)
    monkeypatch.setattr(kv_caches, "open_pipeline", lambda *args: None)
    for name in ("new_exam", "examine", "open_weights"):
        monkeypatch.setattr(kv_caches, name, lambda *args, **options: None)

    def run(*words):
        asked.clear()
        argv = ["kv_caches", "--out", str(tmp_path), "--device", "cpu", *words]
        monkeypatch.setattr(sys, "argv", argv)
        kv_caches.main()
        rows = json.loads((tmp_path / "results.json").read_text())["rows"]
        return [name for name, _ in asked], [(one["weights"], one["cache"]) for one in rows]

    plain = ("32-bit", "32-bit-noise", "int8")
    both = [(title, cache) for title in WEIGHTS.values() for cache in plain]
    names = [f"{weights} {cache}" for weights in WEIGHTS for cache in plain]
    assert run("--caches", "int8") == (names, both)
    assert run("--caches", "int8") == ([], both)
    measured, rows = run("--caches", "int4", "int8", "--weights", "w4a4")
    assert measured == ["w4a4 int4"] and rows[-1] == ("SVDQuant W4A4", "int8")
    assert asked[0][1] == KVSpec("int4")
    assert len(run("--caches", "int8", "--seed", "7")[0]) == 6
    assert "| INT8 | 2 | – | – |" in capsys.readouterr().out
