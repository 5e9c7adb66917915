"""Damaged files: every reader says what is wrong, in one line, or reads what was written.

`VARC_MUTATIONS` sets how many files each reader gets; how they are damaged is drawn by seed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mutations import (
    damaged_bytes,
    damaged_json,
    damaged_safetensors,
    damaged_torch,
    damaged_yaml,
)
from original import CONFIG, VAE, write_base, write_original
from tiny import tiny_pipeline
from var_compressor.artifact import (
    KV_FILE,
    TRACE_FILE,
    artifact_writer,
    read_kv,
    read_manifest,
    read_tensors,
    verify_files,
    write_kv,
)
from var_compressor.artifact_inspection import inspect_artifact
from var_compressor.images import read_settings, write_png
from var_compressor.interop import kv_quant_calib
from var_compressor.interop.import_original import import_artifact, settings_of
from var_compressor.layers.kv_params import CacheFormat, params_from_tensors, params_to_tensors
from var_compressor.layers.linear import load_compressed
from var_compressor.layers.lora import CONFIG_NAME, WEIGHTS_NAME, read_lora
from var_compressor.models import directory
from var_compressor.models.checkpoint import (
    load_official_transformer,
    load_official_vae,
    to_official,
    transformer_names,
    vae_names,
)
from var_compressor.models.inspection import inspect_path
from var_compressor.models.new_directory import write_component
from var_compressor.models.schedule import Schedule
from var_compressor.models.text_encoder import TextEncoder
from var_compressor.models.transformer import Infinity, TextFeatures
from var_compressor.pipeline import InfinityPipeline
from var_compressor.prompts import load_prompts
from var_compressor.publishing import published, source_files
from var_compressor.quant.calibration import CalibrationTrace, Recording
from var_compressor.quant.recording import read_trace, write_trace
from var_compressor.recipe import load_recipe

NUM_MUTATIONS = int(os.environ.get("VARC_MUTATIONS", "30"))
MAX_SECONDS, MAX_BYTES = 20, 2**30

Damage = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Reader:
    """Opens ``folder`` and tells what it read; of ``files``, one at a time is damaged.

    ``is_checked``: whether files have checksums, so that nothing else than what was written comes
    back when bytes are not what they were. ``is_sealed``: nor when somebody wrote another file.
    """

    folder: Path
    files: dict[str, Damage]
    open: Callable[[], Any]
    is_checked: bool = False
    is_sealed: bool = False


def told(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    """Names, shapes, dtypes and contents."""
    return {
        name: (tuple(tensor.shape), tensor.dtype, digest_of(tensor))
        for name, tensor in tensors.items()
    }


def digest_of(tensor: torch.Tensor) -> str:
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(content).hexdigest()


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(number, frame):
        raise TimeoutError("a reader hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(MAX_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def outcome(reader: Reader, wanted: Any, *, may_differ: bool) -> str | None:
    """What is wrong with how a damaged file was read; None if nothing is."""
    try:
        with time_limit():
            found = reader.open()
    except TimeoutError as error:
        return str(error)
    except (ValueError, OSError) as error:
        line = str(error)
        # `varc` joins lines; a text of a screenful helps nobody
        return None if 0 < len(line) < 3000 else f"a message of {len(line)} characters"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    if not may_differ and found != wanted:
        return "something else was read than was written"
    return None


READERS: dict[str, Callable[[Path, pytest.FixtureRequest], Reader]] = {}


def reader(name: str):
    def register(make):
        READERS[name] = make
        return make

    return register


# --- the readers ----------------------------------------------------------------------------------


@reader("artifact")
def _artifact(folder: Path, request: pytest.FixtureRequest) -> Reader:
    shutil.copytree(request.getfixturevalue("kv_artifact_dir"), folder, dirs_exist_ok=True)

    def opened():
        manifest = read_manifest(folder)
        verify_files(folder, manifest)
        model = load_compressed(folder, manifest, dtype=torch.float32, device="cpu")
        kv = read_tensors(folder / KV_FILE, "cpu")
        format = CacheFormat.of(manifest.kv, "") if manifest.kv else None
        if format is not None:
            params_from_tensors(kv, format, model.config, "kv")
        return told(model.state_dict()), told(kv), manifest.spec, manifest.kv

    files = dict.fromkeys(
        ["blocks/000.safetensors", "transformer.safetensors", KV_FILE], damaged_safetensors
    )
    return Reader(folder, {**files, "manifest.json": damaged_json}, opened, True, True)


@reader("compressed directory")
def _compressed(folder: Path, request: pytest.FixtureRequest) -> Reader:
    artifact = request.getfixturevalue("kv_artifact_dir")
    InfinityPipeline.from_pretrained(artifact, dtype=torch.float32).save_pretrained(folder)

    def opened():
        pipeline = InfinityPipeline.from_pretrained(folder, dtype=torch.float32)
        inspect_artifact(folder, with_hashes=False)
        published(source_files(folder), "someone/tiny", [])
        return told(pipeline.transformer.state_dict()), told(pipeline.vae.state_dict())

    files = dict.fromkeys(
        ["model_index.json", "transformer/config.json", "transformer/manifest.json"], damaged_json
    )
    vae = "vae/diffusion_pytorch_model.safetensors"
    return Reader(folder, {**files, vae: damaged_safetensors}, opened, True, True)


@reader("safetensors without a checksum")
def _tensors(folder: Path, request: pytest.FixtureRequest) -> Reader:
    """What is behind the checksums: names, shapes and dtypes must be right by themselves."""
    artifact = request.getfixturevalue("kv_artifact_dir")
    shutil.copytree(artifact, folder, dirs_exist_ok=True)
    manifest = read_manifest(folder)

    def opened():
        model = load_compressed(folder, manifest, dtype=torch.float32, device="cpu")
        format = CacheFormat.of(manifest.kv, "")
        params_from_tensors(read_tensors(folder / KV_FILE, "cpu"), format, model.config, "kv")

    files = dict.fromkeys(
        ["blocks/001.safetensors", "transformer.safetensors", KV_FILE], damaged_safetensors
    )
    return Reader(folder, files, opened)


@reader("kv directory")
def _kv(folder: Path, request: pytest.FixtureRequest) -> Reader:
    artifact = request.getfixturevalue("kv_artifact_dir")
    manifest = read_manifest(artifact)
    config = directory.read_transformer_config(Path(manifest.base["source"]) / "transformer")
    write_kv(folder, read_tensors(artifact / KV_FILE, "cpu"), manifest.kv)

    def opened():
        kv = read_kv(folder)
        tensors = read_tensors(folder / KV_FILE, "cpu")
        params_from_tensors(tensors, CacheFormat.of(kv, ""), config, "kv")
        return told(tensors), kv

    files = {KV_FILE: damaged_safetensors, "kv_cache.json": damaged_json}
    return Reader(folder, files, opened, True, True)


@reader("model directory")
def _model(folder: Path, request: pytest.FixtureRequest) -> Reader:
    shutil.copytree(request.getfixturevalue("model_dir"), folder, dirs_exist_ok=True)
    shards = folder / "transformer"

    def opened():
        index = directory.read_index(folder)
        directory.text_encoder_folders(folder, index)
        for load in (directory.load_transformer, directory.load_vae):
            load(folder, dtype=torch.float32, device="cpu")
        inspect_path(folder, with_hashes=False)

    files = {
        "model_index.json": damaged_json,
        "transformer/config.json": damaged_json,
        "vae/config.json": damaged_json,
        **{
            f"transformer/{path.name}": damaged_safetensors for path in shards.glob("*.safetensors")
        },
        "vae/diffusion_pytorch_model.safetensors": damaged_safetensors,
    }
    return Reader(folder, files, opened)


@reader("shard index")
def _shards(folder: Path, request: pytest.FixtureRequest) -> Reader:
    model = directory.load_transformer(
        request.getfixturevalue("model_dir"), dtype=torch.float32, device="cpu"
    )
    target = folder / "transformer"
    folder.mkdir(exist_ok=True)
    write_component(target, model.config, model.state_dict().items(), max_shard_bytes=2**19)
    (index,) = target.glob("*.index.json")
    files = {f"transformer/{index.name}": damaged_json}
    files |= {
        f"transformer/{path.name}": damaged_safetensors for path in target.glob("*.safetensors")
    }

    def opened():
        directory.load_transformer(folder, dtype=torch.float32, device="cpu")

    return Reader(folder, files, opened)


@reader("official checkpoints")
def _official(folder: Path, request: pytest.FixtureRequest) -> Reader:
    base = write_base(folder / "base")
    transformer = directory.load_transformer(base, dtype=torch.float32, device="cpu")
    vae = directory.load_vae(base, dtype=torch.float32, device="cpu")
    names = (transformer_names(transformer.config), vae_names(vae))
    for file, model, found in zip(("t.pth", "v.pth"), (transformer, vae), names, strict=True):
        state = {n: t.clone() for n, t in to_official(model.state_dict(), found)}
        torch.save(state if file == "t.pth" else {"vae": state}, folder / file)

    def opened():
        one = directory.meta_transformer(CONFIG, torch.float32)
        load_official_transformer(one, folder / "t.pth")
        other = directory.meta_vae(VAE, torch.float32)
        load_official_vae(other, folder / "v.pth")
        return told(one.state_dict()), told(other.state_dict())

    return Reader(folder, {"t.pth": damaged_torch, "v.pth": damaged_torch}, opened, True)


@reader("the original's files")
def _original(folder: Path, request: pytest.FixtureRequest) -> Reader:
    base, source = write_base(folder / "base"), write_original(folder / "source")
    out = folder / "out"

    def opened():
        shutil.rmtree(out, ignore_errors=True)
        import_artifact(source, str(base), out, settings_of(source, []))
        return [told(read_tensors(out / name, "cpu")) for name in written]

    written = ("blocks/000.safetensors", "transformer.safetensors", KV_FILE)
    names = ("model.pt", "scale.pt", "smooth.pt", "branch.pt", kv_quant_calib.FILE)
    return Reader(folder, {f"source/{name}": damaged_torch for name in names}, opened, True)


@reader("kv_quant_calib.pt")
def _kv_pt(folder: Path, request: pytest.FixtureRequest) -> Reader:
    write_original(folder / "source")
    path = folder / "source" / kv_quant_calib.FILE

    def opened():
        return told(params_to_tensors(kv_quant_calib.read(path, CONFIG)))

    return Reader(folder, {f"source/{path.name}": damaged_torch}, opened, True)


LORA_TARGETS = {"blocks.0.self_attn.qkv": (192, 64), "blocks.2.ffn.fc2": (64, 256)}


def _lora_tensors() -> dict[str, torch.Tensor]:
    """A rank of 4 with alphas of their own."""
    tensors = {}
    for name, (N, K) in LORA_TARGETS.items():
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = (
            torch.randn(4, K),
            torch.randn(N, 4),
        )
        tensors[f"{name}.alpha"] = torch.tensor(8.0)
    return tensors


def _read_loras(transformer: Infinity, *paths: Path) -> list[dict[str, tuple]]:
    """What was read, after a look at whether it could be put on the model."""
    found = []
    for path in paths:
        updates = read_lora(path, transformer)
        for name, update in updates.items():
            linear = transformer.get_submodule(name)
            change_NK = update.up_NR @ update.down_RK
            assert change_NK.shape == linear.weight.shape and change_NK.dtype == torch.float32
            assert update.up_NR.isfinite().all() and update.down_RK.isfinite().all()
        found.append({name: told(vars(update)) for name, update in updates.items()})
    return found


@reader("LoRA")
def _lora(folder: Path, request: pytest.FixtureRequest) -> Reader:
    """As PEFT saves it, a folder, and as diffusers does, with the settings in the header."""
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": False}
    single = folder / "single.safetensors"
    tensors = _lora_tensors()
    save_file(tensors, single)
    header = {f"transformer.{key}": value for key, value in settings.items()}
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}
    metadata = {"lora_adapter_metadata": json.dumps(header)}
    save_file(plain, folder / "diffusers.safetensors", metadata=metadata)
    peft = folder / "peft"
    peft.mkdir()
    prefixed = {f"base_model.model.{name}": tensor for name, tensor in plain.items()}
    save_file(prefixed, peft / WEIGHTS_NAME)
    (peft / CONFIG_NAME).write_text(json.dumps(settings))

    transformer = tiny_pipeline().transformer

    def opened():
        return _read_loras(transformer, peft, single, folder / "diffusers.safetensors")

    assert all(one == opened()[0] for one in opened())
    files: dict[str, Damage] = dict.fromkeys(
        ["single.safetensors", "diffusers.safetensors", f"peft/{WEIGHTS_NAME}"],
        damaged_safetensors,
    )
    return Reader(folder, {**files, f"peft/{CONFIG_NAME}": damaged_json}, opened)


@reader("LoRA of torch.save")
def _lora_torch(folder: Path, request: pytest.FixtureRequest) -> Reader:
    path, transformer = folder / "lora.pt", tiny_pipeline().transformer
    torch.save(_lora_tensors(), path)
    return Reader(
        folder, {path.name: damaged_torch}, lambda: _read_loras(transformer, path), is_checked=True
    )


@reader("recipes")
def _recipes(folder: Path, request: pytest.FixtureRequest) -> Reader:
    folder.mkdir(exist_ok=True)
    for name, text in (("a.yaml", load_recipe([], []).to_yaml()), ("b.yaml", _RULES)):
        (folder / name).write_text(text)
    paths = [folder / "a.yaml", folder / "b.yaml"]
    files = {"a.yaml": damaged_yaml, "b.yaml": damaged_yaml}
    return Reader(folder, files, lambda: load_recipe(paths, []))


_RULES = """\
quant:
  weight: {format: sint4, group_size: 64}
  exceptions:
    - {pattern: blocks.0.*, weight: sint8, act: null}
  low_rank:
    rank: 16
collect:
  cfg: [3.0, 2.0]
"""


@reader("prompts")
def _prompts(folder: Path, request: pytest.FixtureRequest) -> Reader:
    folder.mkdir(exist_ok=True)
    texts = {f"p{i}": f'a "red" cube, number {i}' for i in range(9)}
    written = {
        "a.yaml": "".join(f"{key}: {json.dumps(text)}\n" for key, text in texts.items()),
        "a.json": json.dumps(texts),
        "a.jsonl": "".join(json.dumps({"prompt": text}) + "\n" for text in texts.values()),
        "a.txt": "\n".join(texts.values()),
        "a.csv": "id,prompt\n" + "".join(f"{key},red cube\n" for key in texts),
    }
    for name, text in written.items():
        (folder / name).write_text(text)

    def opened():
        for name in written:
            load_prompts(str(folder / name))

    files = dict.fromkeys(written, damaged_bytes) | {"a.yaml": damaged_yaml, "a.json": damaged_json}
    return Reader(folder, files, opened)


@reader("calibration trace")
def _trace(folder: Path, request: pytest.FixtureRequest) -> Reader:
    folder.mkdir(exist_ok=True)
    schedule = Schedule.of(1.0, "0.06M")
    recordings = []
    for length in (3, 5):
        drawn = [torch.zeros(1, level.num_tokens, 8) for level in schedule.levels[:-1]]
        text = TextFeatures(torch.randn(length, 128), (length,))
        recordings.append(Recording(text, tuple(bits.to(torch.uint8) for bits in drawn)))
    trace = CalibrationTrace(tuple(recordings), schedule, True)
    write_trace(folder / TRACE_FILE, trace)

    def opened():
        found = read_trace(folder / TRACE_FILE, schedule, guided=True).recordings
        return [told(dict(enumerate((one.text.packed_TE, *one.bits)))) for one in found]

    return Reader(folder, {TRACE_FILE: damaged_safetensors}, opened, True, True)


@reader("features of prompts")
def _features(folder: Path, request: pytest.FixtureRequest) -> Reader:
    t5 = str(request.getfixturevalue("model_dir") / "text_encoder")
    tokenizer = str(Path(t5).with_name("tokenizer"))

    def opened():
        encoder = TextEncoder(
            t5, tokenizer, max_length=16, dtype=torch.float32, device="cpu", cache_dir=folder
        )
        found = encoder.encode(["a red cat"])
        return told({"features": found.packed_TE}), found.lens

    opened()
    (file,) = folder.glob("*.safetensors")
    return Reader(folder, {file.name: damaged_safetensors}, opened, True, True)


@reader("state of an unfinished run")
def _resume(folder: Path, request: pytest.FixtureRequest) -> Reader:
    identity = {"spec": {"rank": 32, "groups": [1, 2]}, "base": "infinity-tiny"}
    with artifact_writer(folder / "out", identity):
        pass

    def opened():
        with artifact_writer(folder / "out", identity) as writer:
            return [writer.has_block(0)]

    return Reader(folder, {"out/resume.json": damaged_json}, opened, True)


@reader("settings in a PNG")
def _png(folder: Path, request: pytest.FixtureRequest) -> Reader:
    folder.mkdir(exist_ok=True)
    write_png(Image.new("RGB", (8, 8)), folder / "a.png", {"seed": 3, "prompt": "a red cube"})
    return Reader(folder, {"a.png": damaged_bytes}, lambda: read_settings(folder / "a.png"))


# --- the test -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused_or_read_as_written(name, tmp_path, request):
    folder = tmp_path / "files"
    folder.mkdir()
    one = READERS[name](folder, request)
    wanted = one.open()
    before, failures = peak_bytes(), []
    for number in range(NUM_MUTATIONS):
        draw = random.Random(f"{name}:{number}")
        file = draw.choice(sorted(one.files))
        path, of_bytes = one.folder / file, draw.random() < 0.5
        content = path.read_bytes()
        path.write_bytes((damaged_bytes if of_bytes else one.files[file])(content, draw))
        may_differ = not (one.is_checked if of_bytes else one.is_sealed)
        try:
            wrong = outcome(one, wanted, may_differ=may_differ)
        finally:
            path.write_bytes(content)
        if wrong is not None:
            failures.append(f"{file}, {number}: {wrong}")
    assert not failures, "\n".join([f"{len(failures)} of {NUM_MUTATIONS}", *failures[:20]])
    assert peak_bytes() - before < MAX_BYTES, "a reader takes memory for what is not there"
    assert "VARC_HACKED" not in os.environ, "a file ran a program"
    assert one.open() == wanted
