"""Benchmarks as they are published, files of prompts, and that a choice is the same for all."""

from __future__ import annotations

import io
import json
import random
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from var_compressor.evaluation.benchmarks import (
    BenchmarkError,
    image_seed,
    open_benchmarks,
    prompts_sha256,
)
from var_compressor.evaluation.captions import captions
from var_compressor.evaluation.rendering import render
from var_compressor.evaluation.scenes import sample_scenes


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.getbasetemp())
    )


def opened(name: str, root: Path = Path("nowhere")):
    return open_benchmarks([name], root)[0]


def jpeg(color: tuple[int, int, int], size: tuple[int, int] = (8, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


COLORS = {f"{i:02x}ab": (i * 20, 255 - i * 20, 7) for i in range(12)}


def shows(sample, color) -> bool:
    image_3YX = sample.truth.load()
    assert image_3YX.dtype == torch.uint8 and image_3YX.shape == (3, 4, 8)
    return bool((image_3YX == torch.tensor(color)[:, None, None]).all())


# ---- MJHQ-30K and sDCI


def mjhq(root: Path, layout: str) -> Path:
    folder = root / "MJHQ-30K"
    folder.mkdir(parents=True)
    meta = {
        id: {"category": ("art", "food")[i % 2], "prompt": f" a {id} "}
        for i, id in enumerate(COLORS)
    }
    (folder / "meta_data.json").write_text(json.dumps(meta))
    files = {f"{meta[id]['category']}/{id}.jpg": jpeg(color) for id, color in COLORS.items()}
    if layout.startswith("zip"):
        with zipfile.ZipFile(folder / "mjhq30k_imgs.zip", "w") as archive:
            for name, content in files.items():
                archive.writestr(layout.removeprefix("zip") + name, content)
        return root
    for name, content in files.items():
        path = folder / layout / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


@pytest.mark.parametrize("layout", ["", "mjhq30k_imgs", "zip", "zipmjhq30k_imgs/"])
def test_mjhq_as_it_is_published(tmp_path, layout):
    benchmark = opened("MJHQ", mjhq(tmp_path, layout))
    assert benchmark.name == "MJHQ" and benchmark.ids == tuple(COLORS)
    for sample in benchmark.choose(12, seed=0):
        assert sample.prompt == f"a {sample.id}"
        assert shows(sample, COLORS[sample.id])


@pytest.mark.parametrize("layout", ["", "images", "sDCI", "tar"])
def test_sdci_as_it_is_published(tmp_path, layout):
    folder = tmp_path / "sDCI"
    folder.mkdir()
    lines = [f'"{id}": "a {id}: short"' for id in COLORS]
    (folder / "sDCI.yaml").write_text("\n".join(lines))
    if layout == "tar":
        with tarfile.open(folder / "sDCI.gz", "w:gz") as archive:
            for id, color in COLORS.items():
                info = tarfile.TarInfo(f"{id}.jpg")
                info.size = len(jpeg(color))
                archive.addfile(info, io.BytesIO(jpeg(color)))
    else:
        (folder / layout).mkdir(exist_ok=True)
        for id, color in COLORS.items():
            (folder / layout / f"{id}.jpg").write_bytes(jpeg(color))
    benchmark = opened("DCI", tmp_path)
    for sample in benchmark.choose(12, seed=0):
        assert sample.prompt == f"a {sample.id}: short"
        assert shows(sample, COLORS[sample.id])
    assert not list(folder.glob(".*"))


def test_the_choice_is_that_of_the_published_tables(tmp_path):
    """deepcompressor's: shuffle the ids of the file by seed 0, take the first ones, sort them."""
    benchmark = opened("MJHQ", mjhq(tmp_path, ""))
    ids = list(COLORS)
    random.Random(0).shuffle(ids)
    assert [sample.id for sample in benchmark.choose(5, seed=0)] == sorted(ids[:5])


def test_missing_data_is_one_line_that_says_what_to_put_where(tmp_path):
    for name, file in (("MJHQ", "MJHQ-30K/meta_data.json"), ("DCI", "sDCI/sDCI.yaml")):
        with pytest.raises(BenchmarkError) as caught:
            opened(name, tmp_path)
        line = str(caught.value)
        assert str(tmp_path / file) in line and "huggingface.co/datasets/" in line
        assert "\n" not in line
    mjhq(tmp_path, "")
    for path in tmp_path.rglob("*.jpg"):
        path.unlink()
    sample = opened("MJHQ", tmp_path).choose(1, seed=0)[0]
    with pytest.raises(BenchmarkError, match=r"mjhq30k_imgs\.zip: missing"):
        sample.truth.load()


@pytest.mark.parametrize(
    "content", ["", "[1]", "{}", '{"a": {"prompt": "x"}}', '{"a": "x"}', "[" * 100_000]
)
def test_malformed_meta_data(tmp_path, content):
    (tmp_path / "MJHQ-30K").mkdir()
    (tmp_path / "MJHQ-30K" / "meta_data.json").write_text(content)
    with pytest.raises(BenchmarkError, match=r"meta_data\.json"):
        opened("MJHQ", tmp_path)


def test_damaged_archives_and_images(tmp_path):
    root = mjhq(tmp_path, "zip")
    archive = root / "MJHQ-30K" / "mjhq30k_imgs.zip"
    archive.write_bytes(archive.read_bytes()[:200])
    sample = opened("MJHQ", root).choose(1, seed=0)[0]
    with pytest.raises(BenchmarkError, match=r"mjhq30k_imgs\.zip: not readable"):
        sample.truth.load()
    image = root / "MJHQ-30K" / "art" / "00ab.jpg"
    image.parent.mkdir()
    image.write_bytes(jpeg((1, 2, 3))[:40])
    with pytest.raises(BenchmarkError, match=r"00ab\.jpg: not a readable image"):
        opened("MJHQ", root).samples(["00ab"])[0].truth.load()


def test_an_archive_cannot_write_outside(tmp_path):
    folder = tmp_path / "sDCI"
    folder.mkdir()
    (folder / "sDCI.yaml").write_text("a: one")
    with tarfile.open(folder / "sDCI.gz", "w:gz") as archive:
        info = tarfile.TarInfo("../../outside.jpg")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    with pytest.raises(BenchmarkError, match=r"sDCI\.gz"):
        opened("DCI", tmp_path).samples(["a"])[0].truth.load()
    assert not (tmp_path / "outside.jpg").exists() and not (folder / "images").exists()


# ---- files


FILES = {
    "p.txt": "one\n\ntwo: 2\n",
    "p.csv": 'id,prompt,image\n0000,one,a.png\n0001,"two: 2",\n',
    "p.jsonl": '{"prompt": "one", "image": "a.png"}\n\n{"id": "0001", "prompt": "two: 2"}\n',
    "p.json": '[{"prompt": "one", "image": "a.png"}, "two: 2"]',
    "p.yaml": '"0000": {prompt: one, image: a.png}\n"0001": "two: 2"\n',
}


@pytest.mark.parametrize("name", FILES)
def test_prompt_files_with_and_without_images(tmp_path, name):
    path = tmp_path / name
    path.write_text(FILES[name])
    (tmp_path / "a.png").write_bytes(jpeg((9, 8, 7)))
    benchmark = opened(str(path))
    samples = benchmark.choose(99, seed=4)
    assert benchmark.name == "p"
    assert [(s.id, s.prompt) for s in samples] == [("0000", "one"), ("0001", "two: 2")]
    assert samples[1].truth is None
    if name != "p.txt":
        assert shows(samples[0], (9, 8, 7))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.csv", "id,prompt\nx,one\nx,two\n"),
        ("p.jsonl", '{"prompt": "one"}\n{"prompt": \n'),
        ("p.jsonl", '{"text": "one"}\n'),
        ("p.json", '[{"prompt": "one", "image": 3}]'),
        ("p.yaml", "a: [1]"),
        ("p.txt", "\n"),
    ],
)
def test_prompt_files_that_cannot_be(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=name) as caught:
        opened(str(path))
    assert "\n" not in str(caught.value)


def test_names(tmp_path):
    path = tmp_path / "tiny.txt"
    path.write_text("one")
    with pytest.raises(BenchmarkError, match="no such benchmark; use MJHQ"):
        opened("COCO")
    with pytest.raises(ValueError, match="nowhere"):
        opened("nowhere.txt")
    with pytest.raises(BenchmarkError, match="a benchmark called tiny is there already"):
        open_benchmarks(["tiny", str(path)], tmp_path)


# ---- Infinity-Tiny's


def test_tiny_is_captions_of_test_scenes_and_the_scenes():
    chosen = opened("tiny").choose(6, seed=1)
    numbers = torch.tensor([int(sample.id.removeprefix("test-")) for sample in chosen])
    scenes = sample_scenes(numbers, "test")
    assert [sample.prompt for sample in chosen] == captions(scenes)
    wanted = (render(scenes) + 1) * 127.5
    for sample, image_3YX in zip(chosen, wanted, strict=True):
        found = sample.truth.load().float()
        assert np.abs((found - image_3YX).numpy()).max() <= 0.51


# ---- choices and seeds


def test_choices_repeat_nest_and_differ_by_seed():
    benchmark = opened("tiny")
    few, many = ({s.id for s in benchmark.choose(count, seed=0)} for count in (20, 50))
    assert few < many
    again, other = benchmark.choose(20, seed=0), benchmark.choose(20, seed=1)
    assert {s.id for s in again} == few != {s.id for s in other}
    assert [s.id for s in again] == sorted(few)
    assert prompts_sha256(again) == prompts_sha256(benchmark.choose(20, seed=0))
    assert prompts_sha256(again) != prompts_sha256(other)


def test_seeds_are_of_the_benchmark_the_prompt_and_the_run():
    seeds = [image_seed(*of) for of in (("a", "b", 0), ("a", "b", 1), ("a", "c", 0), ("b", "b", 0))]
    assert len(set(seeds)) == 4 and all(0 <= seed < 2**63 for seed in seeds)
    # what separates them is not part of them
    assert image_seed("a", "b1", 0) != image_seed("ab", "1", 0)
    # fixed for good: images of earlier runs are found again
    assert image_seed("tiny", "a cat", 0) == 5948491019294437217
