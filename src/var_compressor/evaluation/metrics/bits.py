"""Metrics of the bits that two models draw: minutes of work and little variance, where metrics of
images need thousands of them. `evaluation.bit_rows` computes them, without looking at an image.
"""

from __future__ import annotations

from var_compressor.evaluation.metrics.metric import MetricSpec

BIT_AGREEMENT = MetricSpec(
    name="bit_agreement",
    compares="bits",
    higher_is_better=True,
    meaning="share of bits whose likelier value is full precision's, given the bits that it drew",
)
BIT_KL = MetricSpec(
    name="bit_kl",
    compares="bits",
    higher_is_better=False,
    meaning="KL(full precision || model) per bit in nats at temperature 1, given the same bits",
)
FIRST_DIVERGENCE = MetricSpec(
    name="first_divergence",
    compares="bits",
    higher_is_better=True,
    meaning="first level with a bit that full precision drew otherwise; number of levels if none",
)
LATENT_ERROR = MetricSpec(
    name="latent_error",
    compares="bits",
    higher_is_better=False,
    meaning="norm of the final latents' difference over the norm of full precision's",
)
