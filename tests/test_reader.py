"""Known answers of the scores, the Fréchet distance against its definition, and a reader that
learns and reloads.
"""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from var_compressor.evaluation.reader import Reader, ReaderConfig, Reading, ReadObject, reader_loss
from var_compressor.evaluation.rendering import render
from var_compressor.evaluation.scenes import BACKGROUNDS, sample_scenes, truths
from var_compressor.evaluation.scores import (
    caption_accuracy,
    frechet_distance,
    match_objects,
    score_caption,
)

TINY = ReaderConfig(widths=(8, 16, 24, 32), num_blocks=1)


def _perfect(truth, shift=(0.0, 0.0)):
    objects = tuple(
        ReadObject(
            *o.attributes, center=(o.center[0] + shift[0], o.center[1] + shift[1]), confidence=0.9
        )
        for o in truth.objects
    )
    return Reading(objects, truth.background)


def _with_object(reading, index, **changes):
    objects = list(reading.objects)
    objects[index] = objects[index]._replace(**changes)
    return replace(reading, objects=tuple(objects))


@pytest.fixture(scope="module")
def three_objects():
    return next(t for t in truths(sample_scenes(torch.arange(20), "test")) if len(t.objects) == 3)


@pytest.fixture(scope="module")
def learned():
    """A small reader fitted to 16 scenes, the scenes and their pictures."""
    torch.manual_seed(0)
    scenes = sample_scenes(torch.arange(16), "validation")
    image_B3HW = render(scenes)
    reader = Reader(TINY)
    optimizer = torch.optim.Adam(reader.parameters(), lr=6e-3)
    for _ in range(80):
        optimizer.zero_grad()
        loss = reader_loss(reader(image_B3HW), scenes)
        loss.backward()
        optimizer.step()
    # the moving averages lag behind: settle them on what eval mode will see
    with torch.no_grad():
        for _ in range(20):
            reader(image_B3HW)
    return reader.eval(), scenes, image_B3HW


def test_reader_learns_scenes_by_heart(learned):
    reader, scenes, image_B3HW = learned
    pairs = list(zip(reader.read(image_B3HW), truths(scenes), strict=True))
    num_objects = sum(len(truth.objects) for _, truth in pairs)
    assert (
        sum(match_objects(reading, truth, by_position=True) for reading, truth in pairs)
        >= 0.9 * num_objects
    )
    assert caption_accuracy([score_caption(*pair) for pair in pairs]).captions >= 0.8


def test_moving_the_picture_moves_the_reading(learned):
    reader, _, image_B3HW = learned
    padded = torch.nn.functional.pad(image_B3HW, (32, 0, 16, 0), mode="replicate")
    for before, after in zip(reader.read(image_B3HW)[:6], reader.read(padded)[:6], strict=True):
        moved = [(o.center[0] + 32, o.center[1] + 16) for o in before.objects]
        assert all(min(math.dist(m, o.center) for o in after.objects) < 12 for m in moved)


def test_stored_reader_reads_the_same(learned, tmp_path):
    reader, _, image_B3HW = learned
    reader.save(tmp_path / "model.safetensors")
    again = Reader.load(tmp_path / "model.safetensors")
    assert next(again.parameters()).dtype == torch.float32 and not again.training
    # stored in bf16, which may move what the reader hardly saw
    rounded = copy.deepcopy(reader)
    for tensor in rounded.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.bfloat16())
    assert rounded.read(image_B3HW) == again.read(image_B3HW)
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (
        tmp_path / "model.safetensors"
    ).read_bytes()


def test_a_file_that_does_not_fit_is_refused_by_name(learned, tmp_path):
    reader, _, _ = learned
    path = tmp_path / "model.safetensors"
    reader.save(path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("32", "40"))
    with pytest.raises(
        ValueError,
        match=r"background_head.weight holds \(8, 56\), its config.json asks for \(8, 64\)",
    ):
        Reader.load(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="no safetensors file"):
        Reader.load(path)
    with pytest.raises(ValueError, match=r"training/reader\.py"):
        Reader.load(tmp_path / "elsewhere" / "model.safetensors")


def test_default_reader_is_small_enough():
    assert sum(p.numel() for p in Reader(ReaderConfig()).parameters()) <= 1_200_000


def test_odd_pictures_are_refused_and_multiples_of_16_read(learned):
    reader, _, _ = learned
    assert len(reader.read(torch.zeros(2, 3, 160, 304))) == 2
    with pytest.raises(ValueError, match="100x256"):
        reader.read(torch.zeros(1, 3, 100, 256))


def test_feature_maps_carry_gradient_to_the_picture(learned):
    reader, _, image_B3HW = learned
    image = image_B3HW[:2].clone().requires_grad_()
    target = reader.feature_maps(image_B3HW[2:4])
    loss = sum(
        (a - b.detach()).square().mean()
        for a, b in zip(reader.feature_maps(image), target, strict=True)
    )
    (gradient,) = torch.autograd.grad(loss, image)
    closer = (image - 0.05 * gradient / gradient.abs().max()).detach()
    after = sum(
        (a - b.detach()).square().mean()
        for a, b in zip(reader.feature_maps(closer), target, strict=True)
    )
    assert after < loss


def test_features_tell_noise_from_scenes(learned):
    reader, _, image_B3HW = learned
    with torch.inference_mode():
        scenes_NF = reader.features(image_B3HW)
        noisy_NF = reader.features(image_B3HW + 0.3 * torch.randn_like(image_B3HW))
    assert (
        frechet_distance(scenes_NF, noisy_NF) > 10 * frechet_distance(scenes_NF, scenes_NF) + 1e-3
    )


# ---------------------------------------------------------------- scores


def test_a_perfect_reading_is_right_wherever_the_objects_are(three_objects):
    score = score_caption(_perfect(three_objects, shift=(9.0, -14.0)), three_objects)
    assert (score.objects_right, score.num_objects, score.caption_right) == (3, 3, True)


@pytest.mark.parametrize(
    ("attribute", "num_values"), [("shape", 6), ("color", 8), ("material", 3), ("size", 2)]
)
def test_one_wrong_attribute_makes_object_and_caption_wrong(three_objects, attribute, num_values):
    reading = _perfect(three_objects)
    wrong = (getattr(reading.objects[1], attribute) + 1) % num_values
    score = score_caption(_with_object(reading, 1, **{attribute: wrong}), three_objects)
    assert score.objects_right <= 2 and not score.caption_right


def test_missing_and_extra_objects_make_the_caption_wrong(three_objects):
    reading = _perfect(three_objects)
    fewer = replace(reading, objects=reading.objects[:2])
    extra = replace(reading, objects=(*reading.objects, reading.objects[0]))
    assert score_caption(fewer, three_objects).objects_right == 2
    assert not score_caption(fewer, three_objects).caption_right
    assert score_caption(extra, three_objects).objects_right == 3
    assert not score_caption(extra, three_objects).caption_right


def test_background_and_relations_count(three_objects):
    reading = _perfect(three_objects)
    other = replace(reading, background=(three_objects.background + 1) % len(BACKGROUNDS))
    assert not score_caption(other, three_objects).caption_right
    first, second = reading.objects[0].center, reading.objects[1].center
    swapped = _with_object(_with_object(reading, 0, center=second), 1, center=first)
    score = score_caption(swapped, three_objects)
    assert score.objects_right == 3 and not score.caption_right


def test_equal_objects_may_stand_for_one_another(three_objects):
    first, second, third = three_objects.objects
    twin = replace(three_objects, objects=(first, first._replace(center=second.center), third))
    reading = _perfect(twin)
    a, b, c = reading.objects
    for objects in ((a, b, c), (b, a, c), (c, b, a)):
        assert score_caption(replace(reading, objects=objects), twin).caption_right


def test_matching_by_position_needs_the_place(three_objects):
    radius = min(o.radius for o in three_objects.objects)
    near, far = _perfect(three_objects, (0.4 * radius, 0.0)), _perfect(three_objects, (0.0, 60.0))
    assert match_objects(near, three_objects, by_position=True) == 3
    assert match_objects(far, three_objects, by_position=True) < 3
    assert match_objects(far, three_objects, by_position=False) == 3
    one_seen_twice = replace(near, objects=(near.objects[0], near.objects[0]))
    assert match_objects(one_seen_twice, three_objects, by_position=True) == 1
    assert match_objects(one_seen_twice, three_objects, by_position=False) == 1


def test_accuracy_weighs_objects_and_captions(three_objects):
    good = score_caption(_perfect(three_objects), three_objects)
    bad = score_caption(Reading((), three_objects.background), three_objects)
    accuracy = caption_accuracy([good, good, good, bad])
    assert (accuracy.objects, accuracy.captions, accuracy.num_images) == (0.75, 0.75, 4)
    with pytest.raises(ValueError, match="no scores"):
        caption_accuracy([])


# ---------------------------------------------------------------- Fréchet distance


@pytest.mark.parametrize("num_rows", [400, 12])
def test_frechet_distance_equals_its_definition(num_rows):
    sqrtm = pytest.importorskip("scipy.linalg").sqrtm
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(16, 16))
    a, b = rng.normal(size=(num_rows, 16)) @ mix, 0.7 * rng.normal(size=(num_rows + 5, 16)) + 0.3
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    # with fewer rows than features the covariances are singular, which sqrtm of the product bears
    # only to a tolerance
    root = sqrtm(cov_a @ cov_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_of_a_shift_is_its_square_and_it_is_symmetric():
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(50, 24, generator=generator)
    b = torch.randn(60, 24, generator=generator) * 2
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 3) == pytest.approx(24 * 9, rel=1e-5)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_frechet_distance_refuses_sets_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(4, 5\)"):
        frechet_distance(torch.zeros(4, 3), torch.zeros(4, 5))
