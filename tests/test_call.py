"""A call as diffusers' pipelines are called draws what `generate` draws."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch

from tiny import random_text, tiny_pipeline
from var_compressor.diffusers_call import nearest_schedule, seeds_of
from var_compressor.models.sampling import Sampling
from var_compressor.models.schedule import ASPECT_RATIOS, PIXEL_BUDGETS, Schedule
from var_compressor.models.transformer import TextFeatures
from var_compressor.pipeline import InfinityPipeline

TEXT, NEGATIVE = random_text([3, 5]), random_text([2, 2], seed=7)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_a_call_draws_what_generate_draws():
    pipeline = tiny_pipeline()
    found = pipeline(
        TEXT,
        NEGATIVE,
        num_images_per_prompt=2,
        guidance_scale=2.0,
        generator=seeded(5),
        output_type="pt",
    ).images
    first, second = TEXT.rows()
    again = TextFeatures(torch.cat([first, first, second, second]), (3, 3, 5, 5))
    one, two = NEGATIVE.rows()
    unwanted = TextFeatures(torch.cat([one, one, two, two]), (2, 2, 2, 2))
    wanted = pipeline.generate(again, seed=5, sampling=Sampling(cfg=2.0), negative=unwanted)
    assert torch.equal(found, ((wanted.image_B3YX + 1) / 2).clamp(0, 1))
    assert not torch.equal(found[0], found[1])


def test_outputs_are_one_image_in_four_forms():
    pipeline, seen = tiny_pipeline(), []

    def on_step_end(pipe, step, timestep, values):
        assert pipe is pipeline
        seen.append((step, values["latents"].clone()))

    latent = pipeline(
        TEXT, generator=seeded(1), output_type="latent", callback_on_step_end=on_step_end
    ).images
    levels = pipeline.schedule_for(1.0, None).levels
    assert [step for step, _ in seen] == list(range(len(levels)))
    assert torch.equal(seen[-1][1], latent)
    torch_B3YX, array_BYX3, pils = (
        pipeline(TEXT, generator=seeded(1), output_type=kind).images for kind in ("pt", "np", "pil")
    )
    decoded = pipeline.decode(latent, strip_rows=None)
    assert torch.equal(torch_B3YX, ((decoded + 1) / 2).clamp(0, 1))
    assert np.array_equal(array_BYX3, torch_B3YX.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.stack(pils), (array_BYX3 * 255).astype(np.uint8))
    with pytest.raises(ValueError, match="output_type is 'jpg'; use one of pil, np, pt, latent"):
        pipeline(TEXT, output_type="jpg")


def test_a_string_is_one_prompt_and_a_negative_string_is_for_all(model_dir):
    pipeline = InfinityPipeline.from_pretrained(model_dir, dtype=torch.float32)
    (image,) = pipeline("a red cat", "a cat", generator=seeded(3)).images
    wanted = pipeline.generate(["a red cat"], seed=3, negative=["a cat"]).pil[0]
    assert image.tobytes() == wanted.tobytes()
    prompts = ["a cat", "a red cat"]
    both = pipeline(prompts, "a cat", generator=[seeded(9), seeded(3)]).images
    wanted = pipeline.generate(prompts, seed=[9, 3], negative=["a cat"] * 2).pil
    assert [one.tobytes() for one in both] == [one.tobytes() for one in wanted]


def test_seeds():
    generator = seeded(5)
    torch.rand(3, generator=generator)
    assert seeds_of(generator, 3) == [5, 6, 7]
    assert seeds_of([seeded(4), seeded(1)], 2) == [4, 1]
    torch.manual_seed(0)
    free = seeds_of(None, 1)
    assert free != seeds_of(None, 1)
    torch.manual_seed(0)
    assert free == seeds_of(None, 1)
    with pytest.raises(ValueError, match="1 generators for 2 images"):
        seeds_of([generator], 2)
    with pytest.raises(ValueError, match="num_images_per_prompt is 0"):
        tiny_pipeline()(TEXT, num_images_per_prompt=0)


@pytest.mark.parametrize(
    ("asked", "drawn"),
    [
        ((None, None), (1024, 1024)),
        ((1024, 1024), (1024, 1024)),
        ((512, 512), (512, 512)),
        ((500, 530), (512, 512)),
        ((720, 1440), (720, 1440)),
        ((4000, 4000), (1024, 1024)),
    ],
)
def test_a_size_is_the_nearest_schedules(asked, drawn):
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        found = nearest_schedule(*asked, Schedule.of(1.0, "1M"))
    assert found.image_size == drawn
    assert bool(noted) == (asked not in ((None, None), drawn))


def test_sizes_stay_within_the_models_budget():
    small = Schedule.of(1.0, "0.06M")
    with pytest.warns(UserWarning, match="1024x1024 .* nearest, 256x256"):
        assert nearest_schedule(1024, 1024, small) == small
    for ratio, budget in itertools.product(ASPECT_RATIOS, PIXEL_BUDGETS):
        exact = Schedule.of(ratio, budget)
        assert nearest_schedule(*exact.image_size, Schedule.of(1.0, "1M")) == exact
    for side in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="height is"):
            nearest_schedule(side, None, small)
    with pytest.warns(UserWarning):
        image = tiny_pipeline()(TEXT, height=200, width=400, output_type="np").images[0]
    assert image.shape[1] > 1.5 * image.shape[0]
