"""Captions are true of their scenes, short, and made of known words."""

import itertools

import pytest
import torch

from var_compressor.evaluation import captions as cap
from var_compressor.evaluation import scenes as sc
from var_compressor.evaluation.captions import captions, tokenize
from var_compressor.evaluation.scenes import SPLITS, sample_scenes, truths


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


@pytest.mark.parametrize("split", SPLITS)
def test_captions_say_what_the_scene_holds(split):
    scenes = sample_scenes(torch.arange(3000), split)
    for text, truth in zip(captions(scenes), truths(scenes), strict=True):
        num = len(truth.objects)
        sizes = _parse(text, cap.SIZE_WORDS)
        names = [_parse(text, t) for t in (cap.SHAPE_WORDS, cap.COLOR_WORDS, cap.MATERIAL_WORDS)]
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
        assert _parse(text, cap.BACKGROUND_WORDS) == [sc.BACKGROUNDS[truth.background]]
        kinds = _parse(text.replace("under a pale sky", ""), cap.RELATION_WORDS)
        assert len(kinds) == num - 1
        for kind, a, b in zip(kinds, order[:-1], order[1:], strict=True):
            assert kind == sc.relation_between(by_name[a].center, by_name[b].center)


def test_every_word_is_known_and_captions_are_short():
    longest = 0

    def choices(table):
        return max((p for ps in table.values() for p in ps), key=lambda p: len(tokenize(p)))

    name = " ".join(choices(t) for t in (cap.COLOR_WORDS, cap.MATERIAL_WORDS, cap.SHAPE_WORDS))
    full, relation = f"a {choices(cap.SIZE_WORDS)} {name}", choices(cap.RELATION_WORDS)
    parts = dict.fromkeys("abc", full) | dict.fromkeys(("da", "db", "dc"), name)
    parts |= {"ab": relation, "bc": relation, "on": choices(cap.BACKGROUND_WORDS)}
    for template in itertools.chain(*cap.TEMPLATES.values()):
        longest = max(longest, len(tokenize(template.format(**parts))))
    assert longest <= 60
    assert len(cap.VOCABULARY) == len(set(cap.VOCABULARY)) <= 150
    known = set(cap.VOCABULARY)
    texts = captions(sample_scenes(torch.arange(3000), "train"))
    assert {token for text in texts for token in tokenize(text)} == known


def test_synonyms_name_one_thing_each():
    tables = (
        cap.SIZE_WORDS,
        cap.COLOR_WORDS,
        cap.MATERIAL_WORDS,
        cap.SHAPE_WORDS,
        cap.RELATION_WORDS,
        cap.BACKGROUND_WORDS,
    )
    phrases = [phrase for table in tables for ps in table.values() for phrase in ps]
    assert len(phrases) == len(set(phrases))
