"""Sampling settings are honoured, rows are independent, and shortcuts change nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import random_text, tiny_pipeline
from var_compressor.models.bits import bits_to_codes, latent_to_tokens, resize
from var_compressor.models.sampling import (
    Sampling,
    draw_noise,
    sample_bits,
    seeded_generators,
)
from var_compressor.models.schedule import Level, Schedule
from var_compressor.pipeline import InfinityPipeline

PATCHIFY = pytest.mark.parametrize("patchify", [False, True])
# as long as the schedule of the 0.06M budget
SEVEN_CFG = (1.0, 2.0, 3.0, 1.0, 4.0, 0.5, 3.0)
SEVEN_TAU = (1.0, 0.5, 0.25, 1.0, 0.7, 2.0, 0.5)


def images_equal(a, b):
    return torch.allclose(a.image_B3YX, b.image_B3YX, atol=1e-5)


class PlainAttention:
    """A cache that keeps everything in lists and attends in float64."""

    def __init__(self):
        self.past = {}

    def attend(self, layer, levels, q, k, v):
        past = self.past.setdefault(layer, [])
        past.append((k, v))
        keys, values = (torch.cat(parts, dim=2).double() for parts in zip(*past, strict=True))
        weights = (q.double() @ keys.transpose(-1, -2)).softmax(-1)
        return (weights @ values).to(v.dtype)


@torch.inference_mode()
def straightforward_logits(pipeline, text, negative, bits, sampling):
    """Guided logits level by level, written down from the definition, bits given."""
    model, config = pipeline.transformer, pipeline.transformer.config
    schedule = Schedule.of(1.0, config.pixel_budget)
    context = model.embed_text(text, negative or model.unconditional_text(text))
    context = model.with_cross_kv(context)
    batch, cache = len(text.lens), PlainAttention()
    rope = model.rotary_table(schedule)
    latent, all_logits = 0, []
    x = context.cond_RC[:, None] + model.start_position
    for level, cfg, tau in zip(schedule.levels, sampling.cfg, sampling.tau, strict=True):
        x = x + model.level_embed.weight[level.index]
        for i, block in enumerate(model.blocks):
            x = block(x, context, rope[:, level.offset : level.end], cache, i, (level,))
            if cfg != 1 and i - config.depth in sampling.cfg_layers:
                merged = cfg * x[:batch] + (1 - cfg) * x[batch:]
                x = torch.cat([merged, merged])
        logits = model.head(x, context.cond_RC) / tau
        if cfg != 1 and 0 in sampling.cfg_layers:
            all_logits.append(cfg * logits[:batch] + (1 - cfg) * logits[batch:])
        else:
            all_logits.append(logits[:batch])
        codes = bits_to_codes(bits[level.index], level, patchify=config.patchify)
        finest = 2 * 16 if config.patchify else 16
        latent = latent + resize(codes, (finest, finest))
        if not level.is_last:
            following = schedule.after(level)
            factor = 2 if config.patchify else 1
            small = F.interpolate(
                latent, (following.height * factor, following.width * factor), mode="bilinear"
            )
            small = latent if following.is_last else small
            x = model.bit_embed(latent_to_tokens(small, patchify=config.patchify)).repeat(2, 1, 1)
    return all_logits


@PATCHIFY
@pytest.mark.parametrize("cfg_layers", [(0,), (-1,), (-2,), (0, -1), ()])
@pytest.mark.parametrize("negative_lens", [None, (3, 1)])
def test_logits_equal_the_definition(patchify, cfg_layers, negative_lens):
    pipeline = tiny_pipeline(patchify=patchify)
    text = random_text((4, 9))
    negative = None if negative_lens is None else random_text(negative_lens, seed=1)
    sampling = Sampling(cfg=SEVEN_CFG, tau=SEVEN_TAU, cfg_layers=cfg_layers)
    run = pipeline.generate(text, seed=3, sampling=sampling, negative=negative, with_trace=True)
    expected = straightforward_logits(pipeline, text, negative, run.trace.bits, sampling)
    for ours, theirs in zip(run.trace.logits, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@PATCHIFY
@pytest.mark.parametrize("aspect_ratio", [1.0, 0.5, 3.0])
def test_each_row_equals_its_own_run(patchify, aspect_ratio):
    pipeline = tiny_pipeline(patchify=patchify)
    rows = [random_text((length,), seed=length) for length in (3, 11, 1)]
    seeds = (5, 17, 5)
    together = pipeline.generate(
        type(rows[0]).concat(rows), seed=seeds, aspect_ratio=aspect_ratio, with_trace=True
    )
    for i, (row, seed) in enumerate(zip(rows, seeds, strict=True)):
        alone = pipeline.generate(row, seed=seed, aspect_ratio=aspect_ratio, with_trace=True)
        for bits, own in zip(together.trace.bits, alone.trace.bits, strict=True):
            assert torch.equal(bits[i : i + 1], own)
        assert torch.allclose(together.image_B3YX[i : i + 1], alone.image_B3YX, atol=1e-5)


@PATCHIFY
@pytest.mark.parametrize("aspect_ratio", [1.0, 0.571, 2.5])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_one_teacher_forced_pass_equals_cached_generation(patchify, aspect_ratio, cfg):
    pipeline = tiny_pipeline(patchify=patchify)
    text = random_text((4, 7))
    run = pipeline.generate(
        text,
        seed=0,
        sampling=Sampling(cfg=cfg, tau=1.0),
        aspect_ratio=aspect_ratio,
        with_trace=True,
    )
    at_once = pipeline.teacher_logits(text, run.trace.bits, cfg=cfg, aspect_ratio=aspect_ratio)
    for ours, cached in zip(at_once, run.trace.logits, strict=True):
        assert (ours - cached).abs().max() <= 1e-4 * cached.abs().max()
    schedule = Schedule.of(aspect_ratio, "0.06M")
    assert run.image_B3YX.shape[2:] == schedule.image_size


def test_teacher_forcing_takes_a_negative_prompt():
    pipeline, text, negative = tiny_pipeline(), random_text((4,)), random_text((6,), seed=8)
    run = pipeline.generate(
        text, seed=0, sampling=Sampling(tau=1.0), negative=negative, with_trace=True
    )
    at_once = pipeline.teacher_logits(text, run.trace.bits, cfg=3.0, negative=negative)
    for ours, cached in zip(at_once, run.trace.logits, strict=True):
        assert (ours - cached).abs().max() <= 1e-4 * cached.abs().max()


def test_a_negative_prompt_matters_and_only_under_guidance():
    pipeline, text, negative = tiny_pipeline(), random_text((4,)), random_text((6,), seed=8)
    unguided = Sampling(cfg=1.0)
    for sampling, is_same in ((Sampling(), False), (unguided, True)):
        without = pipeline.generate(text, seed=0, sampling=sampling)
        with_negative = pipeline.generate(text, seed=0, sampling=sampling, negative=negative)
        assert images_equal(without, with_negative) == is_same


def test_the_first_level_obeys_its_own_cfg_and_tau():
    pipeline, text = tiny_pipeline(), random_text((4,))
    model = pipeline.transformer
    run = pipeline.generate(
        text, seed=0, sampling=Sampling(cfg=SEVEN_CFG, tau=SEVEN_TAU), with_trace=True
    )
    forced = run.trace.bits
    for name, changed in (("cfg", (5.0, *SEVEN_CFG[1:])), ("tau", (2.0, *SEVEN_TAU[1:]))):
        sampling = Sampling(**{"cfg": SEVEN_CFG, "tau": SEVEN_TAU, name: changed})
        other = pipeline.generate(
            text, seed=0, sampling=sampling, forced_bits=forced, with_trace=True
        )
        same = [
            torch.allclose(a, b, atol=1e-4)
            for a, b in zip(run.trace.logits, other.trace.logits, strict=True)
        ]
        assert same == [False] + [True] * 6, name
    assert len(model.blocks) == 3


def test_seeds_decide():
    pipeline, text = tiny_pipeline(), random_text((4, 4))
    first, again = (pipeline.generate(text, seed=1) for _ in range(2))
    assert torch.equal(first.image_B3YX, again.image_B3YX)
    assert not images_equal(first, pipeline.generate(text, seed=2))
    # one seed counts up over the batch
    assert images_equal(first, pipeline.generate(text, seed=[1, 2]))


def test_greedy_does_not_depend_on_the_seed():
    pipeline, text = tiny_pipeline(), random_text((4,))
    runs = [pipeline.generate(text, seed=s, sampling=Sampling(top_k=1)) for s in (0, 1)]
    assert torch.equal(runs[0].image_B3YX, runs[1].image_B3YX)
    large = pipeline.generate(text, seed=0, sampling=Sampling(top_k=900))
    assert images_equal(large, pipeline.generate(text, seed=0, sampling=Sampling(top_k=0)))


def test_stopping_early_decodes_what_is_there():
    pipeline, text = tiny_pipeline(), random_text((4,))
    latents = []
    whole = pipeline.generate(text, seed=0, on_level=lambda level, latent: latents.append(latent))
    for num_levels in (1, 3, 7):
        run = pipeline.generate(text, seed=0, sampling=Sampling(num_levels=num_levels))
        assert torch.allclose(run.latent_BDYX, latents[num_levels - 1])
    assert torch.equal(run.image_B3YX, whole.image_B3YX)


@PATCHIFY
@pytest.mark.parametrize("strip_rows", [1, 7, 24, 1000])
def test_vae_strips_change_rounding_only(patchify, strip_rows):
    vae = tiny_pipeline(patchify=patchify).vae
    latent = torch.randn(2, vae.config.code_dim, 12, 9, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = vae.decode(latent)
        stripped = vae.decode(latent, strip_rows=strip_rows)
    assert (whole - stripped).abs().max() <= 2e-5


# --- bits from logits ----------------------------------------------------------------------------


def test_noise_and_argmax_are_torch_multinomial():
    level = Level(0, 5, 7, 0, is_last=False)
    logits = 2 * torch.randn(3, 35, 8, 2, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(top_p=0.97)
    seeds = [3, 3, 99]
    bits = sample_bits(
        logits, draw_noise(seeded_generators(seeds, 3), level, 8, logits.device), sampling
    )
    for i, rng in enumerate(seeded_generators(seeds, 3)):
        probabilities = sampling.allowed(logits[i]).softmax(-1).view(-1, 2)
        expected = torch.multinomial(probabilities, 1, replacement=True, generator=rng)
        assert torch.equal(bits[i].flatten(), expected.flatten().to(torch.uint8))


def original_allowed(logits, top_k, top_p):
    """Top-k then top-p by sorting, as for a vocabulary of any size."""
    logits = logits.clone()
    if top_k > 0:
        kth = logits.topk(min(top_k, 2), dim=-1).values.amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p > 0:
        ascending, order = logits.sort(dim=-1, descending=False, stable=True)
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[..., -1] = False
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return logits


numbers = st.floats(-30, 30, width=32, allow_subnormal=False)


@settings(max_examples=300, deadline=None)
@given(
    zero=numbers,
    one=numbers,
    top_k=st.sampled_from([0, 1, 2, 900]),
    top_p=st.sampled_from([0.0, 0.03, 0.4, 0.97, 0.999]),
)
def test_top_k_and_top_p_equal_the_sorting_version(zero, one, top_k, top_p):
    logits = torch.tensor([[[[zero, one]]]])
    ours = Sampling(top_k=top_k, top_p=top_p).allowed(logits)
    assert torch.equal(ours, original_allowed(logits, top_k, top_p))


def test_top_p_keeps_the_larger_value_and_a_tie():
    tie = torch.zeros(1, 1, 1, 2)
    for top_p in (0.01, 0.5, 0.97):
        assert torch.isfinite(Sampling(top_p=top_p).allowed(tie)).any(-1).all()
    assert torch.isfinite(Sampling(top_k=1, top_p=0).allowed(tie)).all()


def test_the_top_p_boundary_is_compared_in_float32():
    limit = torch.tensor(1 - 0.97, dtype=torch.float32)
    gap = torch.log((1 - limit) / limit)
    for steps in range(-40, 41):
        z1 = gap + steps * torch.finfo(torch.float32).eps * gap
        logits = torch.stack([torch.zeros(()), z1]).view(1, 1, 1, 2)
        dropped = torch.isinf(Sampling(top_p=0.97).allowed(logits))[..., 0].item()
        assert dropped == (logits.softmax(-1)[..., 0] <= limit).item()


def test_memory_that_is_short_for_the_vae_takes_what_was_kept_for_the_next_image(monkeypatch):
    pipeline, text = tiny_pipeline(), random_text([3])
    wanted = pipeline.generate(text, seed=0).image_B3YX
    decode, kept_at = pipeline.vae.decode, []

    def with_little_memory(latent_BDYX, *, strip_rows):
        kept_at.append(pipeline._kept)
        if pipeline._kept is not None:
            raise torch.OutOfMemoryError("no memory left")
        return decode(latent_BDYX, strip_rows=strip_rows)

    monkeypatch.setattr(pipeline.vae, "decode", with_little_memory)
    pipeline._kept = "the cache and its graphs"
    assert torch.equal(pipeline.generate(text, seed=0).image_B3YX, wanted)
    assert len(kept_at) == 2 and kept_at[1] is None and not pipeline.records_graphs


def test_memory_that_runs_out_with_nothing_kept_is_an_error(monkeypatch):
    pipeline, tries = tiny_pipeline(), []

    def without_memory(latent_BDYX, *, strip_rows):
        tries.append(1)
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(pipeline.vae, "decode", without_memory)
    with pytest.raises(torch.OutOfMemoryError):
        pipeline.generate(random_text([3]), seed=0)
    assert len(tries) == 1 and pipeline.records_graphs


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(top_p=1.5), "top_p 1.5"),
        (Sampling(top_k=-1), "top_k -1"),
        (Sampling(tau=0.0), "tau must be > 0"),
        (Sampling(cfg=(1.0, 2.0)), "cfg has 2 values, the schedule has 7"),
        (Sampling(cfg_layers=(1,)), "cfg_layers holds 1"),
        (Sampling(cfg_layers=(-3,)), "cfg_layers holds -3"),
        (Sampling(num_levels=8), "num_levels is 8"),
    ],
)
def test_bad_settings_are_named(sampling, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline().generate(random_text((2,)), seed=0, sampling=sampling)


def test_wrong_text_is_named():
    pipeline = tiny_pipeline()
    with pytest.raises(ValueError, match="17 tokens, the model takes 16"):
        pipeline.generate(random_text((17,)), seed=0)
    with pytest.raises(ValueError, match="no text encoder"):
        pipeline.generate(["a cat"], seed=0)
    with pytest.raises(ValueError, match="2 seeds for 1 prompts"):
        pipeline.generate(random_text((2,)), seed=[1, 2])
    with pytest.raises(ValueError, match="1 negative prompts for 2"):
        pipeline.generate(random_text((2, 3)), seed=0, negative=random_text((2,)))


def test_loading_tells_of_the_bytes_it_read(model_dir, artifact_dir):
    for source in (model_dir, artifact_dir):
        told = {}
        InfinityPipeline.from_pretrained(source, dtype=torch.float32, on_tensor=told.setdefault)
        total = InfinityPipeline.stored_bytes(source)
        # a file has a header, and an artifact what lies outside its blocks
        assert 0.5 * total < sum(told.values()) <= total
