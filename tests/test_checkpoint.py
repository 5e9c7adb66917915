"""Official files and model directories: what goes in comes out, and bad files are named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tiny import make_t5, random_text, tiny_config, tiny_pipeline
from var_compressor.cli import app
from var_compressor.models.checkpoint import (
    load_official_transformer,
    to_official,
    transformer_names,
    vae_names,
)
from var_compressor.models.config import MODELS
from var_compressor.models.convert import WriteOptions, convert_official, init_random
from var_compressor.models.directory import MODEL_INDEX, meta_transformer, meta_vae, read_index
from var_compressor.models.inspection import inspect_path, sha256_of
from var_compressor.models.random_init import random_tensor, random_tensors
from var_compressor.models.tensor_files import CheckpointError
from var_compressor.pipeline import InfinityPipeline

CONFIG = tiny_config()
FP32 = WriteOptions(torch.float32)


def official_state(*, seed: int = 0) -> dict[str, torch.Tensor]:
    model = meta_transformer(CONFIG.transformer, torch.float32)
    tensors = dict(random_tensors(model, seed=seed))
    names = transformer_names(CONFIG.transformer)
    return {name: tensor.clone() for name, tensor in to_official(tensors, names)}


def official_vae_state(*, seed: int = 0) -> dict[str, torch.Tensor]:
    model = meta_vae(CONFIG.vae, torch.float32)
    return dict(to_official(dict(random_tensors(model, seed=seed)), vae_names(model)))


def load(path: Path) -> dict[str, torch.Tensor]:
    model = meta_transformer(CONFIG.transformer, torch.float32)
    load_official_transformer(model, path)
    return model.state_dict()


def saved(folder: Path, content: object) -> Path:
    path = folder / "transformer.pth"
    torch.save(content, path)
    return path


def assert_same(ours: dict[str, torch.Tensor], *, seed: int = 0) -> None:
    expected = dict(random_tensors(meta_transformer(CONFIG.transformer, torch.float32), seed=seed))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def convert(folder: Path, *, vae: object = None, **options: object) -> Path:
    vae_path = folder / "vae.pth"
    torch.save({"vae": official_vae_state()} if vae is None else vae, vae_path)
    out = folder / "out"
    convert_official(
        CONFIG,
        out,
        transformer=saved(folder, official_state()),
        vae=vae_path,
        text_encoder="some/t5",
        copy_text_encoder=False,
        options=WriteOptions(torch.float32, **options),
    )
    return out


# --- official files ------------------------------------------------------------------------------


def test_official_to_ours_to_official(tmp_path):
    state = official_state()
    ours = load(saved(tmp_path, state))
    assert_same(ours)
    again = dict(to_official(ours, transformer_names(CONFIG.transformer)))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_every_published_spelling_loads(tmp_path):
    state = official_state()
    state["lvl_1L"] = torch.zeros(3, dtype=torch.long)
    state["attn_bias_for_masking"] = torch.zeros(2, 2)
    without_zeros = {k: v for k, v in state.items() if not k.endswith("zero_k_bias")}
    scale_name = next(name for name in state if name.endswith("scale_mul_1H11"))
    longer = torch.cat([state["cfg_uncond"], torch.ones(5, state["cfg_uncond"].shape[1])])
    flat = {}
    for name, tensor in state.items():
        chunk = name.split(".")
        is_block = name.startswith("block_chunks.")
        flat[".".join(["blocks", chunk[1], *chunk[4:]]) if is_block else name] = tensor
    for variant in (
        state,
        {"trainer": {"gpt_fsdp": state}, "epoch": 3},
        without_zeros,
        state | {"cfg_uncond": longer},
        state | {scale_name: state[scale_name].reshape(1, 1, -1, 1)},
        flat,
    ):
        assert_same(load(saved(tmp_path, variant)))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_folder_of_shards_loads(tmp_path, kind):
    state = official_state()
    names = sorted(state)
    weight_map = {}
    for i in range(3):
        shard = {name: state[name] for name in names[i::3]}
        file = f"model-{i}.{kind}"
        (save_file if kind == "safetensors" else torch.save)(shard, tmp_path / file)
        weight_map |= dict.fromkeys(shard, file)
    (tmp_path / f"model.{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    # another framework's index beside it is left alone
    (tmp_path / "flax_model.msgpack.index.json").write_text("{}")
    assert_same(load(tmp_path))


def test_float16_files_are_cast_and_blocks_follow_the_policy(tmp_path):
    path = saved(tmp_path, {name: t.half() for name, t in official_state().items()})
    model = meta_transformer(CONFIG.transformer, torch.bfloat16)
    load_official_transformer(model, path)
    for name, tensor in model.state_dict().items():
        expected = torch.bfloat16 if name.startswith("blocks.") else torch.float32
        assert tensor.dtype == expected, name


@pytest.mark.parametrize("is_wrapped", [True, False])
@pytest.mark.parametrize("is_plain", [True, False])
def test_vae_spellings(tmp_path, is_wrapped, is_plain):
    state = official_vae_state()
    if is_plain:
        state = {
            name.replace(".conv.weight", ".weight")
            .replace(".conv.bias", ".bias")
            .replace(".norm.", "."): tensor
            for name, tensor in state.items()
        }
    state["quantize.lfq.mask"] = torch.ones(8, dtype=torch.long)
    out = convert(tmp_path, vae={"vae": state, "ema": {}} if is_wrapped else state)
    pipeline = InfinityPipeline.from_pretrained(out, dtype=torch.float32)
    expected = dict(random_tensors(meta_vae(CONFIG.vae, torch.float32), seed=0))
    ours = pipeline.vae.state_dict()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


class Malicious:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


def damaged_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """label -> (file, what its message must hold)."""
    state = official_state()
    good = saved(folder, state)
    name = "block_chunks.0.module.0.sa.mat_qkv.weight"

    def variant(label: str, content: object) -> Path:
        path = folder / f"{label}.pth"
        torch.save(content, path)
        return path

    def raw(label: str, content: bytes, suffix: str = ".pth") -> Path:
        path = folder / (label + suffix)
        path.write_bytes(content)
        return path

    whole = good.read_bytes()
    safetensors = folder / "good.safetensors"
    save_file(state, safetensors)
    outside = folder / "outside"
    outside.mkdir()
    (outside / "m.bin.index.json").write_text('{"weight_map": {"pos_start": "../transformer.pth"}}')
    lacking = folder / "lacking"
    lacking.mkdir()
    lost = {"weight_map": dict.fromkeys(state, "gone.bin")}
    (lacking / "m.bin.index.json").write_text(json.dumps(lost))
    bare = folder / "bare"
    bare.mkdir()
    nested = folder / "nested"
    nested.mkdir()
    (nested / "m.bin.index.json").write_text("[" * 100_000)
    return {
        "truncated": (raw("truncated", whole[: len(whole) // 2]), "download complete"),
        "empty": (raw("empty", b""), "begins with b''"),
        "html": (raw("html", b"<!DOCTYPE html><html>"), "begins with b'<!DOCTYP'"),
        "lfs": (raw("lfs", b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        "zip": (raw("zip", b"PK\x03\x04" + bytes(100)), "download complete"),
        "malicious": (
            variant("malicious", {**state, "x": Malicious(folder / "was-here")}),
            "more than tensors",
        ),
        "a list": (variant("list", [1, 2]), "holds a list"),
        "foreign": (variant("foreign", {"conv.weight": torch.ones(2)}), "unknown 1 tensors"),
        "missing": (
            variant("missing", {k: v for k, v in state.items() if k != name}),
            f"lacks 1 tensors ({name})",
        ),
        "left over": (variant("extra", state | {"extra": torch.ones(1)}), "unknown 1 tensors"),
        "shape": (
            variant("shape", state | {name: torch.ones(3, 64)}),
            f"{name} has shape [3, 64], the model needs [192, 64]",
        ),
        "short uncond": (
            variant("short", state | {"cfg_uncond": torch.ones(4, 128)}),
            "cfg_uncond has shape [4, 128], the model needs [16, 128]",
        ),
        "integers": (
            variant("int", state | {name: torch.ones(192, 64, dtype=torch.int8)}),
            f"{name} is int8",
        ),
        "sparse": (
            variant("sparse", state | {name: torch.eye(192, 64).to_sparse()}),
            f"{name} is a tensor without plain data",
        ),
        "cut safetensors": (
            raw("cut", safetensors.read_bytes()[:-9], ".safetensors"),
            "not a readable safetensors",
        ),
        "huge header": (raw("header", b"\xff" * 64, ".safetensors"), "not a readable safetensors"),
        "nothing": (folder / "nowhere.pth", "no such file"),
        "empty folder": (bare, "expected one"),
        "path trick": (outside, "lies outside the folder"),
        "lost shard": (lacking, "gone.bin: no such file"),
        "nested index": (nested, "not a shard index"),
    }


def test_damaged_and_hostile_files_get_one_clear_line(tmp_path):
    for label, (path, message) in damaged_files(tmp_path).items():
        with pytest.raises(CheckpointError) as caught:
            load(path)
        text = str(caught.value)
        assert message in text, label
        assert path.stem in text and "\n" not in text, label
    assert not (tmp_path / "was-here").exists()


# --- model directories ---------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [2**30, 40_000])
def test_convert_then_open(tmp_path, max_shard_bytes):
    out = convert(tmp_path, max_shard_bytes=max_shard_bytes)
    opened = InfinityPipeline.from_pretrained(out, dtype=torch.float32)
    assert_same(opened.transformer.state_dict())
    assert opened.text_encoder.encoder_dir == "some/t5"
    shards = list((out / "transformer").glob("*.safetensors"))
    assert (len(shards) > 1) == (max_shard_bytes < 2**30)
    for shard in shards:
        tensors = load_file(shard)
        total = sum(tensor.nbytes for tensor in tensors.values())
        assert total <= max_shard_bytes or len(tensors) == 1
    direct = InfinityPipeline.from_official(
        CONFIG,
        transformer=tmp_path / "transformer.pth",
        vae=tmp_path / "vae.pth",
        text_encoder=None,
        dtype=torch.float32,
    )
    text = random_text((5,))
    images = [p.generate(text, seed=0).image_B3YX for p in (opened, direct)]
    assert torch.equal(*images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_then_open_changes_nothing(tmp_path, dtype):
    pipeline = tiny_pipeline(dtype=dtype)
    pipeline.save_pretrained(tmp_path / "m", provenance={"trained": "here"})
    opened = InfinityPipeline.from_pretrained(tmp_path / "m", dtype=dtype)
    for part in ("transformer", "vae"):
        before, after = (getattr(p, part).state_dict() for p in (pipeline, opened))
        assert {k: v.dtype for k, v in before.items()} == {k: v.dtype for k, v in after.items()}
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert opened.text_encoder is None
    assert read_index(tmp_path / "m").provenance == {"trained": "here"}
    # onto itself, although its tensors are mapped from the very files
    opened.save_pretrained(tmp_path / "m", overwrite=True)
    again = InfinityPipeline.from_pretrained(tmp_path / "m", dtype=dtype)
    text = random_text((5,))
    images = [p.generate(text, seed=0).image_B3YX for p in (pipeline, opened, again)]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


def test_occupied_directories_are_refused(tmp_path):
    pipeline = tiny_pipeline()
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "cat.png").write_bytes(b"cat")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="holds other files"):
            pipeline.save_pretrained(foreign, overwrite=overwrite)
    assert (foreign / "cat.png").read_bytes() == b"cat"
    pipeline.save_pretrained(tmp_path / "m")
    with pytest.raises(CheckpointError, match="holds a model already"):
        pipeline.save_pretrained(tmp_path / "m")
    (tmp_path / "empty").mkdir()
    pipeline.save_pretrained(tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "m", "photos"]


def test_a_failed_conversion_leaves_nothing(tmp_path):
    vae = official_vae_state()
    vae.pop("decoder.conv_out.conv.bias")
    with pytest.raises(CheckpointError, match="lacks 1 tensors"):
        convert(tmp_path, vae=vae)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["transformer.pth", "vae.pth"]


def test_damaged_directories_are_named(tmp_path):
    source = tmp_path / "good"
    init_random(CONFIG, source, seed=0, with_vae=True, with_text_encoder=False, options=FP32)

    def broken(change) -> Path:
        target = tmp_path / "broken"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        change(target)
        return target

    def rewrite(file: str, **fields: object):
        def change(target: Path) -> None:
            content = json.loads((target / file).read_text())
            (target / file).write_text(json.dumps(content | fields))

        return change

    for change, message in (
        (lambda t: (t / "transformer/config.json").unlink(), "transformer/config.json: No such"),
        (lambda t: (t / MODEL_INDEX).unlink(), "no model_index.json"),
        (lambda t: (t / MODEL_INDEX).write_text("{"), "not JSON"),
        (lambda t: (t / MODEL_INDEX).write_text("[]"), "holds a list"),
        (rewrite(MODEL_INDEX, _class_name="FluxPipeline"), "is a 'FluxPipeline'"),
        (rewrite(MODEL_INDEX, _format_version=99), "format version 99"),
        (rewrite(MODEL_INDEX, vae=None), "holds no VAE"),
        (rewrite("transformer/config.json", depth=6), "lacks 54 tensors"),
        (rewrite("transformer/config.json", depth=-1), "depth is -1"),
        (rewrite("vae/config.json", base_channels="8"), "base_channels is '8'"),
        (lambda t: shutil.rmtree(t / "vae"), "vae/config.json"),
        (
            lambda t: (t / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"no"),
            "not a readable safetensors",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            InfinityPipeline.from_pretrained(broken(change))


def test_names_that_are_no_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source, message in (
        ("infinity-2b", "varc convert"),
        ("someone/no-such-model", "the hub cannot be reached"),
        ("no such thing", "no such directory"),
    ):
        with pytest.raises(CheckpointError, match=message):
            InfinityPipeline.from_pretrained(source)


# --- random models -------------------------------------------------------------------------------


def test_a_random_tensor_depends_on_seed_and_name_alone():
    shape = (8, 16)
    one = random_tensor("a.weight", shape, seed=0)
    assert torch.equal(one, random_tensor("a.weight", shape, seed=0))
    assert not torch.equal(one, random_tensor("b.weight", shape, seed=0))
    assert not torch.equal(one, random_tensor("a.weight", shape, seed=1))


@pytest.mark.parametrize("patchify", [False, True])
def test_random_models_are_alive(patchify):
    pipeline = tiny_pipeline(patchify=patchify)
    run = pipeline.generate(random_text((5, 5)), seed=0, with_trace=True)
    for logits, bits in zip(run.trace.logits, run.trace.bits, strict=True):
        assert logits.isfinite().all()
        assert 0.5 < (logits[..., 1] - logits[..., 0]).std() < 30
        assert 0 < bits.float().mean() < 1
    assert run.image_B3YX.std() > 0.01


def test_init_is_deterministic_and_may_leave_out_the_vae(tmp_path):
    for name in ("a", "b"):
        parts = {"with_vae": False, "with_text_encoder": False}
        init_random(CONFIG, tmp_path / name, seed=3, **parts, options=FP32)
    files = ["transformer/diffusion_pytorch_model.safetensors", MODEL_INDEX]
    for file in files:
        assert sha256_of(tmp_path / "a" / file) == sha256_of(tmp_path / "b" / file)
    assert not (tmp_path / "a" / "vae").exists()


KILLED_INIT = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
import torch
from tiny import tiny_config
from var_compressor.models.convert import WriteOptions, init_random

written = []

def on_tensor(name, num_bytes):
    written.append(name)
    if len(written) == 40:
        os.kill(os.getpid(), signal.SIGKILL)

options = WriteOptions(torch.float32, max_shard_bytes=20_000, on_tensor=on_tensor)
parts = {"with_vae": True, "with_text_encoder": False}
init_random(tiny_config(), sys.argv[1], seed=0, **parts, options=options)
"""


def test_a_killed_init_leaves_no_model_and_the_next_one_works(tmp_path):
    out = tmp_path / "model"
    command = [sys.executable, "-c", KILLED_INIT, str(out), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    assert list(tmp_path.rglob("*.safetensors")), "it was killed before the first shard"
    assert not list(tmp_path.rglob(MODEL_INDEX))
    init_random(CONFIG, out, seed=0, with_vae=True, with_text_encoder=False, options=FP32)
    InfinityPipeline.from_pretrained(out, dtype=torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --- telling what something is -------------------------------------------------------------------


def test_inspect_tells_the_kinds_apart(tmp_path):
    convert(tmp_path)
    for path, kind, words in (
        (
            tmp_path / "transformer.pth",
            "official-transformer",
            "depth 3, width 64, 2 heads, 8 bits",
        ),
        (tmp_path / "vae.pth", "official-vae", "8 code channels, stride 16"),
        (tmp_path / "out", "model-directory", "text encoder elsewhere: some/t5"),
        (tmp_path / "out" / "transformer", "transformer", "our names"),
        (tmp_path / "out" / "vae", "vae", "8 code channels"),
    ):
        found = inspect_path(path, with_hashes=True)
        assert found.kind == kind and words in found.description
        assert all(file.sha256 for file in found.files)
        json.dumps(found.to_dict())
    model = meta_transformer(CONFIG.transformer, torch.float32)
    parts = inspect_path(tmp_path / "transformer.pth", with_hashes=False).parts
    assert sum(part.num_bytes for part in parts) == sum(t.nbytes for t in model.parameters())


def test_inspect_refuses_the_unknown(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(4, dtype=torch.int8)}, path)
    with pytest.raises(CheckpointError, match="no model known here"):
        inspect_path(path, with_hashes=False)


def test_the_commands(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "infinity-test", CONFIG)
    torch.save({"vae": official_vae_state()}, tmp_path / "vae.pth")
    official = saved(tmp_path, official_state())

    def varc(*arguments: object) -> str:
        done = CliRunner().invoke(app, [str(word) for word in arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    files = ("--transformer", official, "--vae", tmp_path / "vae.pth")
    varc("convert", "--model", "infinity-test", *files, "--out", tmp_path / "a", "--dtype", "fp32")
    varc("init", "infinity-test", "--out", tmp_path / "b", "--dtype", "fp32")
    for name in ("a", "b"):
        pipeline = InfinityPipeline.from_pretrained(tmp_path / name, dtype=torch.float32)
        assert_same(pipeline.transformer.state_dict())
    found = json.loads(varc("inspect", tmp_path / "a", "--json", "--hashes"))
    assert found["kind"] == "model-directory" and all(file["sha256"] for file in found["files"])
    assert "made_by: init" in varc("inspect", tmp_path / "b")


# --- with a text encoder -------------------------------------------------------------------------


def test_a_copied_text_encoder_travels_and_a_referred_one_stays(tmp_path):
    t5 = make_t5(tmp_path / "t5")
    torch.save(official_vae_state(), tmp_path / "vae.pth")
    images = []
    for name, is_copied in (("copied", True), ("referred", False)):
        convert_official(
            CONFIG,
            tmp_path / name,
            transformer=saved(tmp_path, official_state()),
            vae=tmp_path / "vae.pth",
            text_encoder=str(t5),
            copy_text_encoder=is_copied,
            options=FP32,
        )
        assert (tmp_path / name / "text_encoder").is_dir() == is_copied
        pipeline = InfinityPipeline.from_pretrained(tmp_path / name, dtype=torch.float32)
        images.append(pipeline.generate(["a red cat"], seed=0).image_B3YX)
    pipeline.save_pretrained(tmp_path / "saved")
    shutil.rmtree(t5)
    for name in ("copied", "saved"):
        moved = tmp_path / f"{name}-moved"
        (tmp_path / name).rename(moved)
        opened = InfinityPipeline.from_pretrained(moved, dtype=torch.float32)
        images.append(opened.generate(["a red cat"], seed=0).image_B3YX)
        assert "T5 text encoder, 1 blocks" in inspect_path(moved, with_hashes=False).description
    assert all(torch.equal(images[0], image) for image in images)
    with pytest.raises(ValueError, match="no T5 encoder"):
        InfinityPipeline.from_pretrained(tmp_path / "referred").generate(["a"], seed=0)
