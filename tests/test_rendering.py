"""Pictures show what the truth says, where it says it."""

import itertools
from dataclasses import replace

import pytest
import torch

from var_compressor.evaluation import scenes as sc
from var_compressor.evaluation.captions import captions
from var_compressor.evaluation.rendering import render
from var_compressor.evaluation.scenes import sample_scenes, truths


def test_every_object_shows_where_the_truth_says():
    scenes = sample_scenes(torch.arange(24), "validation")
    image_B3HW = render(scenes)
    assert image_B3HW.amin() >= -1 and image_B3HW.amax() <= 1
    axis = torch.arange(sc.IMAGE_SIZE) + 0.5
    for row, truth in enumerate(truths(scenes)):
        one = sample_scenes(torch.tensor([row]), "validation")
        empty = render(replace(one, num_objects_B=torch.zeros_like(one.num_objects_B)))[0]
        for thing in truth.objects:
            x, y = thing.center
            inside_HW = (axis - x).square() + (axis[:, None] - y).square() < (
                0.95 * thing.radius
            ) ** 2
            changed_HW = (image_B3HW[row] - empty).abs().amax(0) > 0.15
            assert (changed_HW & inside_HW).sum() > 0.4 * inside_HW.sum()


@pytest.mark.parametrize("attribute", ["shape_BO", "color_BO", "material_BO"])
def test_every_value_of_an_attribute_shows(attribute):
    num_values = {
        "shape_BO": len(sc.SHAPES),
        "color_BO": len(sc.COLORS),
        "material_BO": len(sc.MATERIALS),
    }[attribute]
    base = sample_scenes(torch.full((num_values,), 11), "test")
    values_BO = torch.arange(num_values)[:, None].expand(-1, sc.MAX_OBJECTS)
    image_B3HW = render(replace(base, **{attribute: values_BO}))
    for a, b in itertools.combinations(range(num_values), 2):
        changed_HW = (image_B3HW[a] - image_B3HW[b]).abs().amax(0) > 0.1
        assert changed_HW.sum() > 250


def test_backgrounds_are_smooth_enough_for_a_codec():
    # pixels are close to the mean of their 5x5 neighbourhood: nothing that a stride of 16 must lose
    base = sample_scenes(torch.full((len(sc.BACKGROUNDS),), 3), "test")
    kinds = torch.arange(len(sc.BACKGROUNDS))
    image_B3HW = render(replace(base, background_B=kinds, num_objects_B=torch.zeros_like(kinds)))
    mean_B3HW = torch.nn.functional.avg_pool2d(image_B3HW, 5, stride=1)
    error_B = (mean_B3HW - image_B3HW[:, :, 2:-2, 2:-2]).square().mean((1, 2, 3))
    assert (10 * torch.log10(4 / error_B)).min() > 32


def test_light_comes_from_the_upper_left():
    base = sample_scenes(torch.tensor([11]), "test")
    ones = torch.ones(1, sc.MAX_OBJECTS)
    scene = replace(
        base,
        num_objects_B=torch.ones(1, dtype=torch.long),
        shape_BO=torch.zeros(1, sc.MAX_OBJECTS, dtype=torch.long),
        material_BO=torch.zeros(1, sc.MAX_OBJECTS, dtype=torch.long),
        center_BO2=128 * torch.ones(1, sc.MAX_OBJECTS, 2),
        radius_BO=46 * ones,
    )
    image_3HW = render(scene)[0]
    assert image_3HW[:, 105:115, 105:115].mean() > image_3HW[:, 145:155, 145:155].mean() + 0.2


@pytest.mark.gpu
def test_compiled_on_a_gpu_scenes_are_the_same():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")

    def draw(ids_B):
        scenes = sample_scenes(ids_B, "test")
        return scenes, render(scenes)

    ids = torch.arange(64) + (1 << 33)
    scenes, image_B3HW = torch.compile(draw)(ids.cuda())
    assert captions(scenes.to("cpu")) == captions(sample_scenes(ids, "test"))
    error_B3HW = (image_B3HW.cpu() - render(sample_scenes(ids, "test"))).abs()
    # a boundary between two shades may fall on the other side of a pixel
    assert error_B3HW.mean() < 1e-4 and (error_B3HW > 1e-2).float().mean() < 1e-4
