"""Comparing two models: identical ones agree fully, and hand-made cases have known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tiny import random_text, tiny_pipeline
from var_compressor.evaluation.agreement import (
    BitAgreement,
    bit_agreement,
    compare_logits,
    first_divergence,
    psnr_db,
    ssim,
)
from var_compressor.evaluation.bitwise import (
    DrawRequest,
    LayerGroup,
    bitwise_rows,
    group_agreement,
    layer_groups,
    only_quantized,
)
from var_compressor.evaluation.captions import captions
from var_compressor.evaluation.metrics import BIT_METRICS, open_metric
from var_compressor.evaluation.metrics.scenes import scene_of
from var_compressor.evaluation.reader import Reader
from var_compressor.evaluation.rendering import render
from var_compressor.evaluation.scenes import sample_scenes, truths
from var_compressor.evaluation.scores import frechet_distance
from var_compressor.layers.linear import QuantizedLinear
from var_compressor.models.sampling import Sampling
from var_compressor.models.transformer import TextFeatures
from var_compressor.pipeline import InfinityPipeline

NO_TEXT = TextFeatures(torch.zeros(1, 4), (1,))


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("aspect_ratio", [1.0, 0.5])
def test_a_model_agrees_with_itself_and_less_with_another(cfg, aspect_ratio):
    pipelines = [tiny_pipeline(), tiny_pipeline(), tiny_pipeline(seed=1)]
    text = random_text((4, 7))
    run = pipelines[0].generate(
        text, seed=0, sampling=Sampling(cfg=cfg), aspect_ratio=aspect_ratio, with_trace=True
    )
    same, other = (
        bit_agreement(pipelines[0], one, text, run.trace.bits, cfg=cfg, aspect_ratio=aspect_ratio)
        for one in pipelines[1:]
    )
    levels = pipelines[0].schedule_for(aspect_ratio, None).levels
    assert same.same_bit == (1.0,) * 7 and same.kl_nats == (0.0,) * 7
    assert same.num_bits == tuple(2 * 8 * level.num_tokens for level in levels)
    assert same.mean_same_bit == 1 and same.mean_kl_nats == 0
    # two random models guess
    assert 0.4 < other.mean_same_bit < 0.6 and other.mean_kl_nats > 0.1


class Answers:
    """Gives the logits it was made with."""

    def __init__(self, *logits):
        self.logits = logits

    def teacher_logits(self, text, bits, **options):
        return list(self.logits)


def test_known_answers():
    def pair(p):
        """Logits of a bit that is 1 with probability p, shifted, which must not matter."""
        return [3 + math.log(1 - p), 3 + math.log(p)]

    full = Answers(
        torch.tensor([[[pair(0.9), pair(0.9)]]]), torch.tensor([[[pair(0.2), pair(0.5 + 1e-3)]]])
    )
    small = Answers(
        torch.tensor([[[pair(0.6), pair(0.1)]]]), torch.tensor([[[pair(0.2), pair(0.5 - 1e-3)]]])
    )
    found = bit_agreement(full, small, NO_TEXT, [], cfg=1)

    def kl(p, q):
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    assert found.same_bit == (0.5, 0.5) and found.num_bits == (2, 2)
    first, second = found.kl_nats
    assert first == pytest.approx((kl(0.9, 0.6) + kl(0.9, 0.1)) / 2, rel=1e-6)
    assert second == pytest.approx(kl(0.501, 0.499) / 2, rel=1e-2)


def test_means_are_over_bits_not_levels():
    found = BitAgreement((1.0, 0.5), (0.0, 0.3), (10, 90))
    assert found.mean_same_bit == pytest.approx(0.55)
    assert found.mean_kl_nats == pytest.approx(0.27)


def random_images():
    rng = torch.Generator().manual_seed(0)
    reference = torch.rand(3, 3, 32, 24, generator=rng) * 2 - 1
    noise = torch.randn(reference.shape, generator=rng) * torch.tensor([0.01, 0.1, 0.5]).view(
        3, 1, 1, 1
    )
    return (reference + noise).clamp(-1, 1), reference


def test_psnr_is_the_textbook_formula_on_values_from_0_to_1():
    images, references = random_images()
    for got, image, reference in zip(psnr_db(images, references), images, references, strict=True):
        a, b = ((x.double().numpy() + 1) / 2 for x in (image, reference))
        wanted = 10 * np.log10(1.0 / np.mean((a - b) ** 2))
        assert float(got) == pytest.approx(wanted, abs=1e-3)
    black, white = torch.full((1, 3, 4, 4), -1.0), torch.ones(1, 3, 4, 4)
    assert float(psnr_db(black, white)) == pytest.approx(0)
    # equal images have a finite value, so that means of them exist
    assert float(psnr_db(white, white)) == 100


def test_ssim_is_1_for_equal_images_and_falls_with_noise():
    images, references = random_images()
    noisy, same = ssim(images, references), ssim(references, references)
    assert torch.allclose(same, torch.ones_like(same), atol=1e-6)
    assert noisy[0] > noisy[1] > noisy[2] and noisy[0] < 1
    # row by row, not over the batch
    alone = ssim(images[1:2], references[1:2])
    assert torch.allclose(noisy[1], alone[0], atol=1e-6)


# --- rows per image -------------------------------------------------------------------------------


def test_rows_are_those_of_each_image_alone():
    generator = torch.Generator().manual_seed(0)
    wanted, found = (
        [torch.randn(3, tokens, 4, 2, generator=generator) for tokens in (1, 5)] for _ in range(2)
    )
    rows = compare_logits(wanted, found)
    assert rows.num_bits == (4, 20) and rows.same_bit_BS.shape == (3, 2)
    for i in range(3):
        alone = compare_logits(
            [x[i : i + 1] for x in wanted], [x[i : i + 1] for x in found]
        ).pooled()
        assert float(rows.same_bit_B[i]) == pytest.approx(alone.mean_same_bit)
        assert float(rows.kl_nats_B[i]) == pytest.approx(alone.mean_kl_nats)
    same = torch.cat(
        [(a.argmax(-1) == b.argmax(-1)).flatten() for a, b in zip(wanted, found, strict=True)]
    )
    assert float(rows.same_bit_B.mean()) == pytest.approx(float(same.double().mean()))


def test_the_first_level_with_another_bit():
    drawn = [torch.zeros(4, tokens, 3, dtype=torch.uint8) for tokens in (1, 4, 9)]
    other = [level.clone() for level in drawn]
    other[1][1, 2, 0] = 1  # image 1 parts at level 1, whatever comes later
    other[2][1] = 1
    other[2][2, 8, 2] = 1  # the very last bit of image 2
    other[0][3, 0, 1] = 1
    assert first_divergence(drawn, other).tolist() == [3, 1, 2, 0]


@pytest.fixture(scope="module")
def models(kv_artifact_dir, model_dir):
    """A small random model with a text encoder, and the same in 4 bits with an int8 cache."""
    return tuple(
        InfinityPipeline.from_pretrained(folder, dtype=torch.float32, compute="reference")
        for folder in (model_dir, kv_artifact_dir)
    )


REQUEST = DrawRequest(("a red cat", "a cat", "red"), (5, 9, 7), Sampling(cfg=2.0, tau=0.7), 0.5)


def test_bitwise_rows_against_generating(models):
    full, small = models
    found = bitwise_rows(full, small, REQUEST)
    assert found.keys() >= BIT_METRICS.keys()
    runs = [
        one.generate(
            REQUEST.prompts,
            seed=REQUEST.seeds,
            sampling=REQUEST.sampling,
            aspect_ratio=0.5,
            with_trace=True,
        )
        for one in models
    ]
    bits = runs[0].trace.bits
    text = full.encode(REQUEST.prompts)
    forced = bit_agreement(full, small, text, bits, cfg=2.0, aspect_ratio=0.5)
    assert float(found["bit_agreement"].mean()) == pytest.approx(forced.mean_same_bit)
    assert float(found["bit_kl"].mean()) == pytest.approx(forced.mean_kl_nats)
    assert found["bit_agreement_level"].mean(0).tolist() == pytest.approx(forced.same_bit)
    away = (runs[1].latent_BDYX - runs[0].latent_BDYX).flatten(1).norm(dim=1)
    wanted = away / runs[0].latent_BDYX.flatten(1).norm(dim=1)
    assert found["latent_error"].tolist() == pytest.approx(wanted.tolist(), rel=1e-5)
    assert torch.equal(found["latent_error"], found["latent_error_level"][:, -1])
    # latents part at the level where bits do, and not before
    parted = (found["latent_error_level"] > 0).int().argmax(1)
    differs = found["first_divergence"] < len(bits)
    assert torch.equal(parted[differs].double(), found["first_divergence"][differs])
    assert differs.any()
    # bits that are there already are not drawn again
    again = bitwise_rows(full, small, REQUEST, full_bits=bits, other_bits=runs[1].trace.bits)
    assert all(torch.equal(again[name], rows) for name, rows in found.items())


def test_a_model_against_itself_differs_nowhere(models):
    found = bitwise_rows(models[1], models[1], REQUEST)
    assert found["bit_agreement"].tolist() == [1, 1, 1] and found["bit_kl"].tolist() == [0, 0, 0]
    assert found["first_divergence"].tolist() == [7, 7, 7]
    assert found["latent_error"].tolist() == [0, 0, 0]


def test_one_cfg_for_all_levels():
    with pytest.raises(ValueError, match="one cfg for all levels"):
        DrawRequest(("a",), (0,), Sampling(cfg=(1.0,) * 7))


# --- layer groups ---------------------------------------------------------------------------------


def quantized_names(pipeline):
    return {
        name
        for name, module in pipeline.transformer.named_modules()
        if isinstance(module, QuantizedLinear)
    }


def test_groups_hold_every_linear_once_by_kind_and_once_by_block(models):
    full, small = models
    groups = layer_groups(small)
    names = [one.name for one in groups]
    assert names[5:] == ["block 0", "block 1", "block 2", "KV cache"]
    parts = {one.name: only_quantized(full, small, one) for one in groups}
    everything = quantized_names(small)
    for chosen in (names[:5], names[5:8]):
        held = [quantized_names(parts[name]) for name in chosen]
        assert set().union(*held) == everything
        assert sum(map(len, held)) == len(everything)
    assert parts["FFN up"].kv_params is None
    assert quantized_names(parts["KV cache"]) == set()
    assert parts["KV cache"].kv_params is small.kv_params
    # nothing is stored twice, and the full-precision model is as it was
    weight = full.transformer.blocks[0].ffn.fc1.weight
    assert parts["FFN down"].transformer.blocks[0].ffn.fc1.weight is weight
    assert quantized_names(full) == set()


def test_a_group_alone_harms_less_than_all_of_them(models):
    full, small = models
    requests = [REQUEST, DrawRequest(("a cat",), (3,), REQUEST.sampling, 0.5)]
    calls = []
    found = group_agreement(full, small, requests, on_progress=lambda *words: calls.append(words))
    assert calls[-1][1:] == (2, 2)
    assert list(found) == ["all", *(one.name for one in layer_groups(small))]
    kl = {name: float(rows.kl_nats_B.mean()) for name, rows in found.items()}
    assert all(0 < kl[name] < kl["all"] for name in kl if name != "all")
    assert found["all"].same_bit_BS.shape == (4, 7)
    # the group of all linears, and the cache, is the compressed model
    whole = only_quantized(full, small, LayerGroup("whole", ("blocks.*",), cache=True))
    rows = bitwise_rows(full, whole, REQUEST)
    assert rows["bit_kl"].tolist() == pytest.approx(found["all"].kl_nats_B[:3].tolist(), rel=1e-6)


def test_a_group_of_what_is_not_quantized_is_refused(models):
    full, _ = models
    with pytest.raises(ValueError, match=r"FFN up: none of these linears is quantized"):
        only_quantized(full, full, LayerGroup("FFN up", ("blocks.*.ffn.fc1",)))


# --- what the reader sees -------------------------------------------------------------------------


def test_renders_are_true_to_their_captions_and_not_to_others():
    scenes = sample_scenes(torch.arange(6) + 40, "test")
    image_B3YX = ((render(scenes) + 1) * 127.5).round().to(torch.uint8)
    texts, others = captions(scenes), captions(sample_scenes(torch.arange(6) + 90, "test"))
    accuracy = open_metric("caption_accuracy", weights_dir=None, device="cpu")
    assert accuracy.rows(image_B3YX, prompts=texts).sum() >= 5
    assert accuracy.rows(image_B3YX, prompts=others).tolist() == [0] * 6
    with pytest.raises(ValueError, match="no caption of a known scene"):
        accuracy.rows(image_B3YX[:1], prompts=["a red cat"])
    assert [len(scene_of(text).objects) for text in texts] == [
        len(truth.objects) for truth in truths(scenes)
    ]


def test_the_readers_distance_is_of_its_features():
    image_B3YX = ((render(sample_scenes(torch.arange(6), "test")) + 1) * 127.5).to(torch.uint8)
    metric = open_metric("reader_fid", weights_dir=None, device="cpu")
    rows = metric.rows(image_B3YX, prompts=[])
    with torch.inference_mode():
        features = Reader.load().features(image_B3YX.float() / 127.5 - 1)
    assert torch.allclose(rows, features, atol=1e-5)
    wanted = frechet_distance(features[:3], features[3:])
    assert metric.value(rows[:3], rows[3:]) == pytest.approx(wanted, rel=1e-4)
