"""A compressed model on disk: per-block safetensors and a manifest that says what they are.

    manifest.json              what it is, how it was made, every file with size and sha256
    transformer.safetensors    everything outside the blocks, float32
    blocks/000.safetensors …   packed weights, scales, branches and small tensors of one block
    kv_cache.safetensors       affine parameters of the KV cache (after `varc calibrate-kv`)
    report.json                what the compressor saw and chose, per linear

The VAE and the text encoder stay with the base model, which the manifest names and whose VAE it
pins by hash. The manifest is written last: without it the directory is an unfinished run, which
the same command continues.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from var_compressor import __version__

FORMAT = "var-compressor/1"
MANIFEST = "manifest.json"
TRANSFORMER_FILE = "transformer.safetensors"
KV_FILE = "kv_cache.safetensors"
REPORT_FILE = "report.json"
_RESUME_FILE = "resume.json"


class ArtifactError(ValueError):
    """A compressed model that cannot be used or continued; the message tells the way out."""


@dataclass(frozen=True)
class Manifest:
    """What an artifact is.

    ``config`` the transformer's shape; ``base`` {source, vae: {file: sha256}, transformer: {…}};
    ``spec`` the QuantSpec; ``calibration`` prompts' hash, seed and sampling; ``kv`` what the cache
    parameters are, or None; ``files`` relative name → {bytes, sha256}.
    """

    config: dict[str, Any]
    base: dict[str, Any]
    spec: dict[str, Any]
    calibration: dict[str, Any]
    files: dict[str, dict[str, Any]]
    kv: dict[str, Any] | None = None
    created_by: str = field(default=f"var-compressor {__version__}")

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **vars(self)}

    @property
    def num_weight_bytes(self) -> int:
        """Bytes of the transformer's files."""
        names = [name for name in self.files if name not in (KV_FILE, REPORT_FILE)]
        return sum(self.files[name]["bytes"] for name in names)


def is_artifact(folder: str | Path) -> bool:
    return (Path(folder) / MANIFEST).is_file()


def block_file(index: int) -> str:
    return f"blocks/{index:03d}.safetensors"


def read_manifest(folder: str | Path) -> Manifest:
    """Raises: ArtifactError when it is missing, foreign or malformed."""
    path = Path(folder) / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        unfinished = (Path(folder) / _RESUME_FILE).exists()
        hint = "its run was cut off; repeat the command" if unfinished else "is it an artifact?"
        raise ArtifactError(f"{folder}: has no {MANIFEST}; {hint}") from None
    except (ValueError, RecursionError, OSError) as error:
        raise ArtifactError(f"{path}: not readable ({error})") from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ArtifactError(f"{path}: not of format {FORMAT!r}; make the artifact again")
    try:
        manifest = Manifest(**content)
        for name, entry in manifest.files.items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ArtifactError(f"{path}: refused, the file {name!r} lies outside the artifact")
            int(entry["bytes"]), str(entry["sha256"])
    except (TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{path}: malformed ({error}); make the artifact again") from None
    return manifest


def verify_files(folder: str | Path, manifest: Manifest) -> None:
    """Raises: ArtifactError naming the first file that is missing, cut short or changed."""

    def check(name: str) -> None:
        path, entry = Path(folder) / name, manifest.files[name]
        if not path.is_file():
            raise ArtifactError(f"{path}: missing; copy the artifact again")
        if path.stat().st_size != entry["bytes"]:
            raise ArtifactError(
                f"{path}: has {path.stat().st_size} bytes, expected {entry['bytes']}; "
                "copy the artifact again"
            )
        if sha256_of(path) != entry["sha256"]:
            raise ArtifactError(f"{path}: its content changed (sha256 differs); copy it again")

    with ThreadPoolExecutor() as pool:
        list(pool.map(check, manifest.files))


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )


def write_atomically(path: Path, content: bytes) -> None:
    """Temporary name, fsync, rename: after a kill the old file or the new one is there, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


class ArtifactWriter:
    """Writes an artifact block by block; finished blocks survive a kill.

    ``identity`` is everything that determines the result; a run with another identity refuses to
    continue in the same directory and says what differs.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any]) -> None:
        self.folder = Path(folder)
        if is_artifact(self.folder):
            raise ArtifactError(f"{folder}: holds a finished artifact; give another --out")
        resume = self.folder / _RESUME_FILE
        if resume.exists():
            self._check_identity(resume, identity)
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ArtifactError(f"{folder}: holds other files; give a new or empty directory")
        else:
            write_json(resume, identity)
        self._reports: dict[str, Any] = {}

    def _check_identity(self, resume: Path, identity: dict[str, Any]) -> None:
        try:
            started = json.loads(resume.read_text())
        except ValueError:
            started = None
        if not isinstance(started, dict):
            raise ArtifactError(f"{resume}: unreadable; delete the directory and start again")
        wanted = json.loads(json.dumps(identity))
        differing = sorted(_flat(started).items() ^ _flat(wanted).items())
        if differing:
            key = differing[0][0]
            raise ArtifactError(
                f"{self.folder}: was begun with {key} = {_flat(started).get(key, 'nothing')}, now "
                f"it is {_flat(wanted).get(key, 'nothing')}; give another --out, or delete it"
            )

    def has_block(self, index: int) -> bool:
        return (self.folder / block_file(index)).exists() and self._report_path(index).exists()

    def put_block(self, index: int, tensors: Mapping[str, Tensor], report: dict[str, Any]) -> None:
        """Commit a block; the report goes first, so that a block file means both are there."""
        write_json(self._report_path(index), report)
        self.put_tensors(block_file(index), tensors)

    def put_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        write_atomically(self.folder / name, save(on_cpu(tensors)))

    def finish(self, manifest: Manifest, num_blocks: int) -> Manifest:
        """Gather the report, list the files, write the manifest."""
        blocks = [json.loads(self._report_path(i).read_text()) for i in range(num_blocks)]
        write_json(self.folder / REPORT_FILE, {"blocks": blocks})
        names = [TRANSFORMER_FILE, REPORT_FILE, *map(block_file, range(num_blocks))]
        manifest = replace(manifest, files=_listed(self.folder, names))
        write_json(self.folder / MANIFEST, manifest.to_json())
        for index in range(num_blocks):
            self._report_path(index).unlink()
        (self.folder / _RESUME_FILE).unlink()
        return manifest

    def _report_path(self, index: int) -> Path:
        return self.folder / "blocks" / f"{index:03d}.json"


def put_kv(folder: str | Path, tensors: Mapping[str, Tensor], kv: dict[str, Any]) -> Manifest:
    """Add or replace the KV cache's parameters of a finished artifact."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    # a kill between the two writes leaves a manifest whose hash refuses the new file: run it again
    write_atomically(folder / KV_FILE, save(on_cpu(tensors)))
    files = {**manifest.files, **_listed(folder, [KV_FILE])}
    manifest = replace(manifest, kv=kv, files=files)
    write_json(folder / MANIFEST, manifest.to_json())
    return manifest


def read_tensors(path: Path, device: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError

    try:
        return load_file(path, device=device)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path}: not a readable safetensors file ({error})") from None


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _listed(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
        for name in names
    }


def _flat(content: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(content, dict):
        parts = (
            _flat(value, f"{prefix}.{key}" if prefix else key) for key, value in content.items()
        )
        return {key: value for part in parts for key, value in part.items()}
    return {prefix: json.dumps(content)}
