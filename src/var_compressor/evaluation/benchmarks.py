"""Sets of prompts that models are judged on, with real images where there are any.

    MJHQ    MJHQ-30K: DATA/MJHQ-30K/meta_data.json, {id: {"category", "prompt"}}, and the images as
            <category>/<id>.jpg beside it, in mjhq30k_imgs/, or unread in mjhq30k_imgs.zip
    DCI     sDCI, short captions of densely captioned images: DATA/sDCI/sDCI.yaml, {id: prompt},
            and <id>.jpg beside it, in images/, or packed in sDCI.gz, which is unpacked into images/
    tiny    captions of Infinity-Tiny's test scenes, which it was not trained on; the scenes
            themselves, rendered, are the real images
    a file  .txt, .csv, .jsonl, .json or .yaml (`prompts.read_prompts`); images are paths,
            relative to the file

What is not in the data folder is taken from the cache of the Hugging Face hub, or from the hub.

Sources: playgroundai/MJHQ-30K and mit-han-lab/svdquant-datasets on the hub. The choice of a subset
is deepcompressor's: for seed 0 its 5,000 prompts are those of the published tables.
"""

from __future__ import annotations

import hashlib
import json
import random
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from var_compressor.prompts import SUFFIXES, read_prompts

TINY_SCENES = 10_000
_HUB = {"MJHQ-30K": "playgroundai/MJHQ-30K", "sDCI": "mit-han-lab/svdquant-datasets"}


class BenchmarkError(ValueError):
    """A benchmark whose data is missing or malformed; the message says what to put where."""


class Truth(Protocol):
    """A real image that fits a prompt.

    Raises: BenchmarkError naming the image when it is missing or not readable.
    """

    def content(self) -> bytes:
        """What determines the image: its file, or what it is rendered from."""

    def load(self) -> Tensor:
        """uint8 RGB ``[3, Y, X]``."""


@dataclass(frozen=True)
class Sample:
    """A prompt, and the real image that belongs to it if there is one."""

    id: str
    prompt: str
    truth: Truth | None = None


@dataclass(frozen=True)
class Benchmark:
    """A set of prompts; ``ids`` are all that it has, ``samples(ids)`` are some of them."""

    name: str
    ids: tuple[str, ...]
    samples: Callable[[Sequence[str]], list[Sample]]

    def choose(self, num_samples: int, *, seed: int) -> tuple[Sample, ...]:
        """So many samples, or all if there are fewer, sorted by id.

        The same for every model. A smaller choice with the same seed is part of a larger one.
        """
        ids = list(self.ids)
        random.Random(seed).shuffle(ids)
        return tuple(self.samples(sorted(ids[:num_samples])))


def image_seed(benchmark: str, prompt: str, run_seed: int) -> int:
    """The seed of a prompt's image: of its own, so that any image can be drawn again alone."""
    text = json.dumps([benchmark, prompt, run_seed])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def prompts_sha256(samples: Sequence[Sample]) -> str:
    """Tells one choice of prompts from another."""
    text = json.dumps([(sample.id, sample.prompt) for sample in samples])
    return hashlib.sha256(text.encode()).hexdigest()


def open_benchmarks(names: Sequence[str], data_root: Path) -> list[Benchmark]:
    """The benchmarks of these names or files.

    Raises: BenchmarkError for an unknown name, one that is named twice, or missing data; ValueError
    for a prompt file that is not readable.
    """
    found: dict[str, Benchmark] = {}
    for name in names:
        benchmark = _opened(name, data_root)
        if benchmark.name in found:
            raise BenchmarkError(f"{name}: a benchmark called {benchmark.name} is there already")
        found[benchmark.name] = benchmark
    return list(found.values())


def _opened(name: str, data_root: Path) -> Benchmark:
    known = {"mjhq": _mjhq, "mjhq-30k": _mjhq, "dci": _dci, "sdci": _dci}
    if name.lower() in known:
        return known[name.lower()](data_root)
    if name.lower() == "tiny":
        return _tiny()
    path = Path(name)
    if path.suffix in SUFFIXES:
        return _prompt_file(path)
    raise BenchmarkError(
        f"{name}: no such benchmark; use MJHQ, DCI, tiny, or a file ending in {', '.join(SUFFIXES)}"
    )


# --- the sets -------------------------------------------------------------------------------------


def _mjhq(data_root: Path) -> Benchmark:
    folder = data_root / "MJHQ-30K"
    path = _found(folder, "meta_data.json")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BenchmarkError(f"{path}: not readable ({error}); copy it again") from None
    wanted = isinstance(meta, dict) and all(
        isinstance(one, dict)
        and isinstance(one.get("prompt"), str)
        and isinstance(one.get("category"), str)
        for one in meta.values()
    )
    if not wanted or not meta:
        raise BenchmarkError(f"{path}: expected {{id: {{category, prompt}}}}; copy it again")
    images = _Images("MJHQ-30K", folder, ("", "mjhq30k_imgs"), "mjhq30k_imgs.zip")

    def sample(id: str) -> Sample:
        entry = meta[id]
        return Sample(id, entry["prompt"].strip(), _InSet(images, f"{entry['category']}/{id}.jpg"))

    return Benchmark("MJHQ", tuple(meta), lambda ids: [sample(id) for id in ids])


def _dci(data_root: Path) -> Benchmark:
    folder = data_root / "sDCI"
    prompts = {one.id: one.text for one in read_prompts(str(_found(folder, "sDCI.yaml")))}
    images = _Images("sDCI", folder, ("", "images", "sDCI"), "sDCI.gz")

    def samples(ids: Sequence[str]) -> list[Sample]:
        return [Sample(id, prompts[id], _InSet(images, f"{id}.jpg")) for id in ids]

    return Benchmark("DCI", tuple(prompts), samples)


def _tiny() -> Benchmark:
    from var_compressor.evaluation.captions import captions
    from var_compressor.evaluation.scenes import sample_scenes

    def samples(ids: Sequence[str]) -> list[Sample]:
        numbers = [int(id.removeprefix("test-")) for id in ids]
        texts = captions(sample_scenes(torch.tensor(numbers, dtype=torch.int64), "test"))
        scenes = map(_Scene, numbers)
        return [Sample(*one) for one in zip(ids, texts, scenes, strict=True)]

    return Benchmark("tiny", tuple(f"test-{i:06d}" for i in range(TINY_SCENES)), samples)


def _prompt_file(path: Path) -> Benchmark:
    prompts = {one.id: one for one in read_prompts(str(path))}

    def sample(id: str) -> Sample:
        image = prompts[id].image
        truth = None if image is None else _File(path.parent / Path(image).expanduser())
        return Sample(id, prompts[id].text, truth)

    return Benchmark(path.stem, tuple(prompts), lambda ids: [sample(id) for id in ids])


# --- real images ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scene:
    number: int

    def content(self) -> bytes:
        return f"test scene {self.number}".encode()

    def load(self) -> Tensor:
        from var_compressor.evaluation.rendering import render
        from var_compressor.evaluation.scenes import sample_scenes

        image_3YX = render(sample_scenes(torch.tensor([self.number]), "test"))[0]
        return ((image_3YX + 1) / 2 * 255).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class _File:
    path: Path

    def content(self) -> bytes:
        return _bytes(self.path)

    def load(self) -> Tensor:
        return _rgb(self.content(), str(self.path))


class _Images:
    """The images of a published set: as files, or in the archive that they are published in."""

    def __init__(self, name: str, folder: Path, places: tuple[str, ...], archive: str) -> None:
        self.name, self.folder = name, folder
        self.roots = [folder / place for place in places]
        self.archive = archive
        self.zip: zipfile.ZipFile | None = None

    def read(self, name: str) -> bytes:
        for root in self.roots:
            if (root / name).is_file():
                return _bytes(root / name)
        path = _found(self.folder, self.archive)
        if path.suffix == ".zip":
            return self._from_zip(path, name)
        return _bytes(_unpacked(path, self.folder / "images") / name)

    def _from_zip(self, path: Path, name: str) -> bytes:
        if self.zip is None:
            try:
                self.zip = zipfile.ZipFile(path)
            except (OSError, zipfile.BadZipFile) as error:
                raise BenchmarkError(f"{path}: not readable ({error}); copy it again") from None
        members = self.zip.NameToInfo
        for member in (name, f"{path.stem}/{name}"):
            if member in members:
                try:
                    return self.zip.read(member)
                except (OSError, ValueError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
                    raise _unreadable(f"{path}: {member}", error) from None
        raise BenchmarkError(f"{path}: has no {name}; copy it again")


@dataclass(frozen=True)
class _InSet:
    images: _Images
    name: str

    def content(self) -> bytes:
        return self.images.read(self.name)

    def load(self) -> Tensor:
        return _rgb(self.content(), f"{self.images.folder}: {self.name}")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise BenchmarkError(f"{path}: no such image; put it there") from None
    except OSError as error:
        raise _unreadable(str(path), error) from None


def _rgb(content: bytes, name: str) -> Tensor:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(BytesIO(content)) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except UnidentifiedImageError:
        raise _unreadable(name, "of no known format") from None
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(name, error) from None


def _unreadable(name: str, reason: object) -> BenchmarkError:
    return BenchmarkError(f"{name}: not a readable image ({reason}); copy it again")


def _found(folder: Path, name: str) -> Path:
    """A file of a published set: in the data folder, in the hub's cache, or from the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    if (folder / name).is_file():
        return folder / name
    repo, reason = _HUB[folder.name], ""
    for local_only in (True, False):
        try:
            # asks once; hf_hub_download goes on for half a minute where there is no network
            snapshot = snapshot_download(
                repo, repo_type="dataset", allow_patterns=[name], local_files_only=local_only
            )
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            continue
        if (downloaded := Path(snapshot) / name).is_file():
            return downloaded
        reason = f"{repo} has no such file"
    raise BenchmarkError(
        f"{folder / name}: missing, and the hub did not give it ({reason}); download it from "
        f"https://huggingface.co/datasets/{repo} and put it there, or name another --data-root"
    )


def _unpacked(archive: Path, target: Path) -> Path:
    """The folder that an archive was unpacked into; made whole or not at all."""
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpacking-") as temporary:
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(Path(temporary) / "images", filter="data")
        except (tarfile.TarError, EOFError, OSError) as error:
            raise BenchmarkError(f"{archive}: not readable ({error}); copy it again") from None
        try:
            (Path(temporary) / "images").rename(target)
        except OSError:
            # another process of this run was first
            if not target.is_dir():
                raise
    return target
