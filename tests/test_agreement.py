"""Comparing two models: identical ones agree fully, and hand-made cases have known answers."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch

from tiny import random_text, tiny_pipeline
from var_compressor.evaluation.agreement import BitAgreement, bit_agreement, psnr_db, ssim
from var_compressor.models.sampling import Sampling
from var_compressor.models.transformer import TextFeatures

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
    assert torch.allclose(same, torch.ones(3), atol=1e-6)
    assert noisy[0] > noisy[1] > noisy[2] and noisy[0] < 1
    # row by row, not over the batch
    alone = ssim(images[1:2], references[1:2])
    assert torch.allclose(noisy[1], alone[0], atol=1e-6)


def test_ssim_is_skipped_without_torchmetrics(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    assert ssim(*random_images()) is None
