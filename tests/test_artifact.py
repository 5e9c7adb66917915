"""Artifacts that are damaged, malformed or malicious are refused by name; writes are whole."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

from tiny import QUICK_SPEC
from var_compressor.artifact import (
    _DIGEST,
    FORMAT,
    KV_FILE,
    MANIFEST,
    ArtifactError,
    _digest_of,
    artifact_writer,
    is_artifact,
    put_kv,
    read_manifest,
    read_tensors,
    verify_files,
    write_atomically,
)
from var_compressor.artifact_inspection import inspect_artifact
from var_compressor.models.inspection import sha256_of, to_text
from var_compressor.models.new_directory import locked
from var_compressor.models.tensor_files import CheckpointError
from var_compressor.pipeline import InfinityPipeline


@pytest.fixture
def folder(kv_artifact_dir, tmp_path) -> Path:
    copied = tmp_path / "artifact"
    shutil.copytree(kv_artifact_dir, copied)
    return copied


# --- damaged files -------------------------------------------------------------------------------


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["blocks/001.safetensors", "transformer.safetensors", KV_FILE, "report.json"]
)
def test_damaged_files_are_named(folder, name):
    good = (folder / name).read_bytes()
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    for damage, message in (
        (cut_short, rf"has {len(good) - 1} bytes, expected {len(good)}; copy the artifact again"),
        (flip_a_bit, "its content changed"),
        (Path.unlink, "missing; copy the artifact again"),
    ):
        damage(folder / name)
        for opens in (
            lambda: verify_files(folder, manifest),
            lambda: InfinityPipeline.from_pretrained(folder),
        ):
            with pytest.raises(ArtifactError, match=f"{name}: {message}"):
                opens()
        (folder / name).write_bytes(good)
    InfinityPipeline.from_pretrained(folder)


def test_a_file_that_is_no_safetensors_is_named(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ArtifactError, match=r"x\.safetensors: not a readable safetensors file"):
        read_tensors(tmp_path / "x.safetensors", "cpu")
    with pytest.raises(ArtifactError, match=r"y\.safetensors: not a readable"):
        read_tensors(tmp_path / "y.safetensors", "cpu")


def test_a_base_that_is_gone_or_another_is_named(folder, model_dir, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(model_dir, base)
    rewrite(folder, lambda m: m["base"].update(source=str(base)))
    InfinityPipeline.from_pretrained(folder)
    flip_a_bit(base / "vae/diffusion_pytorch_model.safetensors")
    with pytest.raises(ArtifactError, match=r"is not the VAE that .*artifact was made with"):
        InfinityPipeline.from_pretrained(folder)
    shutil.rmtree(base)
    with pytest.raises(ValueError, match="no such directory"):
        InfinityPipeline.from_pretrained(folder)


# --- manifests -----------------------------------------------------------------------------------


def rewrite(folder: Path, change) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content))


def put(*place, value):
    """Set the entry at ``place`` of a manifest; a value of ... takes it out."""

    def change(content):
        for key in place[:-1]:
            content = content[key]
        if value is ...:
            del content[place[-1]]
        else:
            content[place[-1]] = value

    return change


ENTRY = {"bytes": 3, "sha256": "0"}
BLOCK = "blocks/000.safetensors"
MALFORMED = [
    (put("format", value="var-compressor/2"), f"not of format '{FORMAT}'"),
    (put("format", value=...), "not of format"),
    (put("config", value=[]), "config is list, expected dict"),
    (put("config", value=...), "config is missing, expected dict"),
    (put("config", "depth", value="3"), "config: depth is '3'"),
    (put("config", "depth", value=10**9), "config: depth is 1000000000, expected 1 to"),
    (put("config", "depth", value=65535), "files lacks blocks/003.safetensors"),
    (put("config", "__class__", value=1), "config: unknown keys"),
    (put("base", value="/"), "base is str, expected dict"),
    (put("base", value={}), "base names no source"),
    (put("base", "source", value=["x"]), "base names no source"),
    (put("base", "vae", value=None), "base names no source, or no vae files"),
    (put("base", "vae", value={"../../secret": "0"}), "'../../secret' lies outside"),
    (put("spec", value={"weight": {"format": "sint3"}}), "weight.format: unknown number format"),
    (put("spec", value={"weight": []}), "weight: expected a group"),
    (put("spec", "modules", value="x"), "modules: expected a list"),
    (put("calibration", value=None), "calibration is NoneType, expected dict"),
    (put("created_by", value=3), "created_by is int, expected str"),
    (put("extra", value=3), "extra is int, expected nothing"),
    (put("kv", value=[1]), "kv is list, expected dict or NoneType"),
    (put("kv", value={}), "kv.format is None, expected dict"),
    (put("kv", "format", value="int4"), "kv.format is 'int4', expected dict"),
    (put("files", value=[]), "files is list, expected dict"),
    (put("files", value={}), "files lacks blocks/000.safetensors"),
    (put("files", KV_FILE, value=...), "files lacks kv_cache.safetensors"),
    (put("files", BLOCK, value=[]), "files.blocks/000.safetensors lacks bytes or sha256"),
    (put("files", BLOCK, "bytes", value="3"), "lacks bytes or sha256"),
    (put("files", BLOCK, "bytes", value=True), "lacks bytes or sha256"),
    (put("files", BLOCK, "sha256", value=None), "lacks bytes or sha256"),
    (put("files", "/etc/passwd", value=ENTRY), "'/etc/passwd' lies outside"),
    (put("files", "../x", value=ENTRY), "'../x' lies outside"),
    (put("files", "blocks/../../x", value=ENTRY), "lies outside"),
]


@pytest.mark.parametrize(("change", "message"), MALFORMED)
def test_malformed_manifests_are_refused_with_the_key(folder, change, message):
    rewrite(folder, change)
    for opens in (read_manifest, InfinityPipeline.from_pretrained):
        with pytest.raises(ArtifactError, match=MANIFEST) as caught:
            opens(folder)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"3",
        b'"var-compressor/1"',
        b'["format", "var-compressor/1"]',
        b"[" * 100_000,
        b'{"format":' * 100_000,
        b'{"format": ' + b"9" * 10_000 + b"}",
        b"\xff\xfe\x00",
        b'{"format": "var-compressor/1"}',
        b'{"format": "var-compressor/1", "files": ' + b"[0," * 50_000 + b"0" + b"]" * 50_000 + b"}",
    ],
    ids=range(12),
)
def test_what_is_no_manifest_at_all_is_refused(tmp_path, content):
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(ArtifactError, match=MANIFEST):
        read_manifest(tmp_path)


def test_a_folder_without_a_manifest(tmp_path):
    assert not is_artifact(tmp_path) and not is_artifact(tmp_path / "none")
    for missing in (tmp_path, tmp_path / "none"):
        with pytest.raises(ArtifactError, match=r"has no manifest\.json; is it an artifact\?"):
            read_manifest(missing)


def test_a_file_that_the_manifest_does_not_list_is_not_read(folder):
    before = InfinityPipeline.from_pretrained(folder).transformer.state_dict()
    shutil.copy(folder / BLOCK, folder / "blocks/003.safetensors")
    after = InfinityPipeline.from_pretrained(folder).transformer.state_dict()
    assert before.keys() == after.keys()


# --- writing -------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.bin"
    write_atomically(path, b"old")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*arguments):
        raise full

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, call, fail)
            with pytest.raises(OSError, match="No space left"):
                write_atomically(path, b"new")
        assert [entry.name for entry in path.parent.iterdir()] == ["file.bin"]
        assert path.read_bytes() == b"old"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.bin"]


def test_what_a_kill_left_is_cleared_when_the_run_goes_on(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    # a kill during the very first write
    (out / ".resume.json.99.tmp").write_bytes(b"{")
    with artifact_writer(out, {"a": 1}) as writer:
        writer.put_tensors("blocks/000.safetensors", {"x": torch.zeros(2)})
    (out / "blocks" / ".001.safetensors.99.tmp").write_bytes(b"x")
    with artifact_writer(out, {"a": 1}):
        names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
        assert names == {"resume.json", "blocks/000.safetensors"}


def test_a_block_counts_only_with_its_report(tmp_path):
    with artifact_writer(tmp_path / "out", {"a": 1}) as writer:
        assert not writer.has_block(0)
        writer.put_tensors("blocks/000.safetensors", {"x": torch.zeros(2)})
        assert not writer.has_block(0)
        writer.put_block(0, {"x": torch.zeros(2)}, {"linears": []})
        assert writer.has_block(0) and not writer.has_block(1)


def test_one_writer_at_a_time(folder, tmp_path):
    out = tmp_path / "out"
    with artifact_writer(out, {"a": 1}):
        with (
            pytest.raises(CheckpointError, match="another process is writing it"),
            artifact_writer(out, {"a": 1}),
        ):
            pass
        assert (out / "resume.json").exists()
    with artifact_writer(out, {"a": 1}):
        pass
    tensors = read_tensors(folder / KV_FILE, "cpu")
    with locked(folder), pytest.raises(CheckpointError, match="another process is writing it"):
        put_kv(folder, tensors, {"format": {}})


def test_readers_see_a_whole_artifact_while_its_cache_parameters_are_replaced(folder):
    """Either the old parameters, or none, or the new ones; never a manifest of other files."""
    tensors = read_tensors(folder / KV_FILE, "cpu")
    other = {n: t * 2 if t.is_floating_point() else t for n, t in tensors.items()}
    seen, stop = [], threading.Event()

    def read():
        while not stop.is_set():
            seen.append(copy.deepcopy(read_manifest(folder)).kv)

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(10):
        put_kv(folder, other if i % 2 else tensors, {"format": {"name": "int8"}, "round": i})
    stop.set()
    reader.join()
    assert seen and all(kv is None or kv["format"]["name"] == "int8" for kv in seen)
    verify_files(folder, read_manifest(folder))
    assert read_manifest(folder).kv["round"] == 9


# --- telling what it is --------------------------------------------------------------------------


def test_inspect_tells_base_formats_sizes_and_origin(folder, model_dir, artifact_dir):
    found = inspect_artifact(folder, with_hashes=True)
    assert found.kind == "artifact"
    assert f"compressed {model_dir}" in found.description
    assert "W4A4 g64 rank 8 (cross_attn.kv W4A16 g64 rank 8" in found.description
    assert "16-bit KV cache" in inspect_artifact(artifact_dir, with_hashes=False).description

    tensors = {}
    for file in folder.rglob("*.safetensors"):
        label = str(file.relative_to(folder))
        tensors |= {f"{label}:{n}": t for n, t in read_tensors(file, "cpu").items()}
    assert sum(part.num_bytes for part in found.parts) == sum(t.nbytes for t in tensors.values())
    sizes = {part.name: part.num_bytes for part in found.parts}
    packed = sum(t.nbytes for name, t in tensors.items() if name.endswith(".qweight"))
    branches = sum(t.nbytes for name, t in tensors.items() if ".proj_" in name)
    assert sizes["packed weights"] == packed
    # two 4-bit weights a byte
    counts = {part.name: part.num_parameters for part in found.parts}
    assert counts["packed weights"] == 2 * packed
    assert sizes["low-rank branches"] == branches
    assert sizes["KV cache parameters"] == sum(
        t.nbytes for name, t in tensors.items() if name.startswith(KV_FILE)
    )
    listed = {file.name: file.sha256 for file in found.files}
    assert listed[BLOCK] == sha256_of(folder / BLOCK)
    assert found.provenance["base"] == str(model_dir)
    assert found.provenance["calibration"]["num_prompts"] == 2
    json.dumps(found.to_dict())
    assert "created by: var-compressor" in to_text(found)


def test_inspect_refuses_packed_weights_that_no_rule_asks_for(folder):
    def leave_alone(content):
        for rule in content["spec"]["modules"]:
            rule["weight"] = None
        del content[_DIGEST]
        content[_DIGEST] = _digest_of(content)

    rewrite(folder, leave_alone)
    with pytest.raises(ArtifactError, match="is packed, which no rule asks for"):
        inspect_artifact(folder, with_hashes=False)


def test_the_summary_of_a_spec():
    from var_compressor.spec import PRESETS

    assert PRESETS["naive"].summary() == "W4A4 g64 rank 0 (cross_attn.kv W4A16 g64 rank 0)"
    words = "W4A4 g64 rank 32 (cross_attn.kv W4A16 g64 rank 32, ffn.fc2 W4A4 g64 rank 32 uint4)"
    assert PRESETS["svdquant"].summary() == words
    assert PRESETS["w8a8"].summary() == (
        "W8A8 per row rank 32 (cross_attn.kv W8A16 per row rank 32)"
    )
    assert PRESETS["w4a16"].summary() == "W4A16 g64 rank 32"
    assert PRESETS["nvfp4"].summary().startswith("W4A4 g16 rank 32 nvfp4 (cross_attn.kv W4A16")
    assert QUICK_SPEC.summary().startswith("W4A4 g64 rank 8")
