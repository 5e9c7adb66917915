"""Scenes are functions of their number, their captions are true of their pictures, and every word
is known.
"""

import itertools
import json
from dataclasses import asdict, fields, replace

import pytest
import torch

from var_compressor.evaluation import scenes as sc
from var_compressor.evaluation.scenes import (
    SPLITS,
    caption,
    captions,
    render,
    sample_scenes,
    tokenize,
    truths,
)


def _same(a, b):
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))


def _rows(scenes, index):
    return sc.SceneBatch(*(getattr(scenes, f.name)[index] for f in fields(scenes)))


@pytest.fixture(scope="module", params=SPLITS)
def many(request):
    return request.param, sample_scenes(torch.arange(3000), request.param)


def test_a_scene_does_not_depend_on_its_batch():
    ids = torch.tensor([7, 123_456_789_012, 0, 41])
    together = sample_scenes(ids, "test")
    for row in range(len(ids)):
        alone = sample_scenes(ids[row : row + 1], "test")
        assert _same(alone, _rows(together, slice(row, row + 1)))
        assert captions(alone) == [captions(together)[row]] == [caption(together, row)]
    shuffled = render(_rows(together, torch.tensor([3, 1, 0, 2])))
    assert torch.allclose(shuffled, render(together)[[3, 1, 0, 2]], atol=1e-6)


def test_hash_is_the_recorded_one():
    # a change of the hash changes every scene, and with them what the shipped model was trained and
    # measured on
    key = torch.tensor([0, 1, (1 << 41) + 5])
    expected = [[6187551, 1537890], [14296713, 568656], [7602137, 16577205]]
    assert (sc.hash_uniform(key, 2) * 2**24).long().tolist() == expected


def test_hash_is_uniform_and_slots_are_independent():
    uniform_BS = sc.hash_uniform(torch.arange(20_000), 8).double()
    assert torch.allclose(uniform_BS.mean(0), torch.full((8,), 0.5, dtype=torch.float64), atol=0.01)
    off_diagonal = torch.corrcoef(uniform_BS.T) - torch.eye(8)
    assert off_diagonal.abs().max() < 0.035
    next_scene = torch.corrcoef(torch.stack([uniform_BS[:-1, 0], uniform_BS[1:, 0]]))[0, 1]
    assert next_scene.abs() < 0.035


def test_splits_share_no_scene():
    ids = torch.arange(100)
    ranges = [set(sample_scenes(ids, split).scene_id_B.tolist()) for split in SPLITS]
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(ranges, 2))
    last = torch.tensor([sc.SPLIT_CAPACITY - 1])
    assert (
        sample_scenes(last, "train").scene_id_B < sample_scenes(ids, "validation").scene_id_B.min()
    )


@pytest.mark.parametrize("bad", [-1, sc.SPLIT_CAPACITY])
def test_ids_outside_the_split_are_refused(bad):
    with pytest.raises(ValueError, match=str(bad)):
        sample_scenes(torch.tensor([3, bad]), "train")
    with pytest.raises(ValueError, match="validation"):
        sample_scenes(torch.tensor([3]), "valid")


def test_held_out_triples_are_balanced_and_absent_from_train_only(many):
    split, scenes = many
    assert len(set(sc.HELD_OUT)) == 12
    triples = torch.stack([scenes.shape_BO, scenes.color_BO, scenes.material_BO], -1)[
        scenes.present_BO
    ]
    seen = {tuple(triple) for triple in triples.tolist()}
    every = set(
        itertools.product(range(len(sc.SHAPES)), range(len(sc.COLORS)), range(len(sc.MATERIALS)))
    )
    assert seen == (every - set(sc.HELD_OUT) if split == "train" else every)


def test_objects_differ_stay_inside_and_keep_apart(many):
    _, scenes = many
    for truth in truths(scenes):
        assert len({(o.shape, o.color, o.material) for o in truth.objects}) == len(truth.objects)
        for thing in truth.objects:
            low, high = sc.RADIUS_RANGES[sc.SIZES[thing.size]]
            assert low <= thing.radius <= high
            assert all(
                thing.radius + 4 < c < sc.IMAGE_SIZE - thing.radius - 4 for c in thing.center
            )
        for a, b in itertools.combinations(truth.objects, 2):
            gap = torch.dist(torch.tensor(a.center), torch.tensor(b.center)) - a.radius - b.radius
            assert gap > 2.9


def test_stated_relations_are_clearly_true(many):
    _, scenes = many
    for truth in truths(scenes):
        assert len(truth.relations) == len(truth.objects) - 1
        for relation in truth.relations:
            a, b = truth.objects[relation.subject].center, truth.objects[relation.object].center
            lead = {
                "left": b[0] - a[0],
                "right": a[0] - b[0],
                "above": b[1] - a[1],
                "below": a[1] - b[1],
            }
            beside = min(abs(a[0] - b[0]), abs(a[1] - b[1]))
            assert lead[relation.kind] >= max(sc.MIN_SEPARATION, sc.AXIS_DOMINANCE * beside) - 0.01


def _parse(text, table):
    """Which keys of a word table the text names, in order, the longest phrase first."""
    phrases = sorted(
        ((p, key) for key, ps in table.items() for p in ps), key=lambda pair: -len(pair[0])
    )
    found, text = [], f" {' '.join(tokenize(text))} "
    for phrase, key in phrases:
        while (at := text.find(f" {phrase} ")) >= 0:
            found.append((at, key))
            text = text[: at + 1] + "#" * len(phrase) + text[at + 1 + len(phrase) :]
    return [key for _, key in sorted(found)]


def test_captions_say_what_the_scene_holds(many):
    _, scenes = many
    for text, truth in zip(captions(scenes), truths(scenes), strict=True):
        num = len(truth.objects)
        sizes = _parse(text, sc.SIZE_WORDS)
        names = [_parse(text, t) for t in (sc.SHAPE_WORDS, sc.COLOR_WORDS, sc.MATERIAL_WORDS)]
        assert len(sizes) == num and len(set(map(len, names))) == 1
        said = list(zip(*names, strict=True))
        told = [
            (sc.SHAPES[o.shape], list(sc.COLORS)[o.color], sc.MATERIALS[o.material])
            for o in truth.objects
        ]
        assert set(said) == set(told)
        order = list(dict.fromkeys(said))
        by_name = dict(zip(told, truth.objects, strict=True))
        assert sizes == [sc.SIZES[by_name[name].size] for name in order]
        assert _parse(text, sc.BACKGROUND_WORDS) == [sc.BACKGROUNDS[truth.background]]
        kinds = _parse(text.replace("under a pale sky", ""), sc.RELATION_WORDS)
        assert len(kinds) == num - 1
        for kind, a, b in zip(kinds, order[:-1], order[1:], strict=True):
            assert kind == sc.relation_between(by_name[a].center, by_name[b].center)


def test_every_word_is_known_and_captions_are_short():
    longest = 0

    def choices(table):
        return max((p for ps in table.values() for p in ps), key=lambda p: len(tokenize(p)))

    name = " ".join(choices(t) for t in (sc.COLOR_WORDS, sc.MATERIAL_WORDS, sc.SHAPE_WORDS))
    full, relation = f"a {choices(sc.SIZE_WORDS)} {name}", choices(sc.RELATION_WORDS)
    parts = dict.fromkeys("abc", full) | dict.fromkeys(("da", "db", "dc"), name)
    parts |= {"ab": relation, "bc": relation, "on": choices(sc.BACKGROUND_WORDS)}
    for template in itertools.chain(*sc.TEMPLATES.values()):
        longest = max(longest, len(tokenize(template.format(**parts))))
    assert longest <= 60
    assert len(sc.VOCABULARY) == len(set(sc.VOCABULARY)) <= 150
    known = set(sc.VOCABULARY)
    texts = captions(sample_scenes(torch.arange(3000), "train"))
    assert {token for text in texts for token in tokenize(text)} == known


def test_synonyms_name_one_thing_each():
    tables = (
        sc.SIZE_WORDS,
        sc.COLOR_WORDS,
        sc.MATERIAL_WORDS,
        sc.SHAPE_WORDS,
        sc.RELATION_WORDS,
        sc.BACKGROUND_WORDS,
    )
    phrases = [phrase for table in tables for ps in table.values() for phrase in ps]
    assert len(phrases) == len(set(phrases))


def test_truth_is_json():
    truth = truths(sample_scenes(torch.tensor([5]), "test"))[0]
    assert json.loads(json.dumps(asdict(truth)))["scene_id"] == 5 + 2 * sc.SPLIT_CAPACITY


def test_every_object_shows_where_the_truth_says():
    scenes = sample_scenes(torch.arange(24), "validation")
    image_B3HW = render(scenes)
    assert image_B3HW.amin() >= -1 and image_B3HW.amax() <= 1
    axis = torch.arange(sc.IMAGE_SIZE) + 0.5
    for row, truth in enumerate(truths(scenes)):
        one = _rows(scenes, slice(row, row + 1))
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
