"""A compressed model on disk: per-block safetensors and a manifest that says what they are.

    manifest.json              what it is, how it was made, every file with size and sha256
    transformer.safetensors    everything outside the blocks, float32
    blocks/000.safetensors …   packed weights, scales, branches and small tensors of one block
    kv_cache.safetensors       bits, dropped levels and ranges of the KV cache, per layer and head
                               (after `varc calibrate-kv`)
    report.json                what the compressor saw and chose, per linear

The VAE and the text encoder stay with the base model, which the manifest names and whose VAE it
pins by hash. The manifest is written last: without it the directory is an unfinished run, which
the same command continues.

The same files as ``transformer/`` of a model directory, with a config.json, are a compressed model
that needs no other: its VAE and text encoder lie beside them (`InfinityPipeline.save_pretrained`).
Wherever an artifact may be given, such a directory may.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from var_compressor import __version__
from var_compressor.models import directory
from var_compressor.models.config import InfinityConfig, config_from_dict
from var_compressor.models.hub import how_to_get_again
from var_compressor.models.inspection import sha256_of
from var_compressor.models.new_directory import locked
from var_compressor.spec import QuantSpec

FORMAT = "var-compressor/1"
MANIFEST = "manifest.json"
# of the model directory whose transformer it is
CONFIG = "config.json"
QUANT_METHOD = "var_compressor"
# of the manifest's other keys, in itself
_DIGEST = "sha256"
TRANSFORMER_FILE = "transformer.safetensors"
KV_FILE = "kv_cache.safetensors"
# beside the file of parameters, of a model that is no artifact
KV_MANIFEST, KV_FORMAT = "kv_cache.json", "var-compressor-kv/1"
REPORT_FILE = "report.json"
# of an unfinished run only: what determines it, and the generations it calibrates on
_RESUME_FILE = "resume.json"
TRACE_FILE = "trace.safetensors"


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


def artifact_folder(source: str | Path) -> Path:
    """Where an artifact's own files are: of a compressed model directory, in its transformer/."""
    folder = Path(source).expanduser()
    inner = folder / "transformer"
    return inner if (inner / MANIFEST).is_file() and not (folder / MANIFEST).is_file() else folder


def enclosing_model(source: str | Path) -> Path | None:
    """The model directory whose transformer an artifact is; None for one by itself."""
    inner = artifact_folder(source).absolute()
    is_part = inner.name == "transformer" and (inner.parent / directory.MODEL_INDEX).is_file()
    return inner.parent if is_part or inner != Path(source).expanduser().absolute() else None


def is_artifact(source: str | Path) -> bool:
    """Whether a directory holds an artifact; an unfinished one does not."""
    return (artifact_folder(source) / MANIFEST).is_file()


def is_unfinished(folder: str | Path) -> bool:
    """Whether a directory holds what a run that was cut off left behind."""
    return (Path(folder) / _RESUME_FILE).is_file() and not is_artifact(folder)


def find_model(source: str | Path, *, revision: str | None = None) -> Path:
    """The artifact or model directory that a path, an embedded model's name or a hub id stands for.

    A hub id is downloaded, at ``revision`` or its newest. Raises: CheckpointError.
    """
    if revision is None and (is_artifact(source) or is_unfinished(source)):
        return Path(source).expanduser()
    return directory.resolve(source, revision=revision)


def companions(source: str | Path, manifest: Manifest) -> Path:
    """The model directory with an artifact's VAE and text encoder: the one it lies in, or its base.

    Raises: CheckpointError when that is not here.
    """
    return enclosing_model(source) or directory.resolve(manifest.base["source"])


def quantization_config(manifest: Manifest) -> dict[str, Any]:
    """How the weights are compressed, as config.json tells it to other programs."""
    spec = manifest.spec
    parts = {"weights": "weight", "activations": "act"}
    parts |= {name: name for name in ("low_rank", "smooth", "exceptions", "modules")}
    told = {name: spec[key] for name, key in parts.items() if key in spec}
    kv = None if manifest.kv is None else manifest.kv["format"]
    return {"quant_method": QUANT_METHOD, "format": FORMAT, **told, "kv_cache": kv}


def model_config(manifest: Manifest) -> dict[str, Any]:
    """The config.json of a compressed transformer."""
    told = {directory.QUANTIZATION: quantization_config(manifest)}
    return {"_class_name": "Infinity", **manifest.config, **told}


def block_file(index: int) -> str:
    return f"blocks/{index:03d}.safetensors"


def read_manifest(folder: str | Path) -> Manifest:
    """Raises: ArtifactError when it is missing, foreign, malformed, or contradicts config.json."""
    path = artifact_folder(folder) / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        cut_off = "the run that makes it was cut off; repeat its command"
        hint = cut_off if is_unfinished(folder) else "is it an artifact?"
        raise ArtifactError(f"{folder}: has no {MANIFEST}; {hint}") from None
    except (ValueError, RecursionError, OSError) as error:
        again = how_to_get_again(path, "copy it again")
        raise ArtifactError(f"{path}: not readable ({error}); {again}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ArtifactError(f"{path}: not of format {FORMAT!r}; make the artifact again")
    digest = content.pop(_DIGEST, None)
    # artifacts of before it was there have none
    is_whole = digest is None or digest == _digest_of(content)
    del content["format"]
    try:
        manifest = _checked(content)
    except ValueError as error:
        raise ArtifactError(f"{path}: malformed: {error}; make the artifact again") from None
    if not is_whole:
        again = how_to_get_again(path, "copy it again")
        raise ArtifactError(f"{path}: its content changed (sha256 differs); {again}")
    if enclosing_model(folder) is not None:
        _check_config(path.with_name(CONFIG), manifest)
    return manifest


def _check_config(path: Path, manifest: Manifest) -> None:
    """Raises: ValueError unless a config.json says the same of the model, as far as it goes."""
    again = how_to_get_again(path, "write the directory again with save_pretrained")
    content, wanted = directory.read_json(path), model_config(manifest)
    described, told = content.pop(directory.QUANTIZATION, None), wanted.pop(directory.QUANTIZATION)
    if not isinstance(described, dict) or described.get("quant_method") != QUANT_METHOD:
        raise ArtifactError(
            f"{path}: {directory.QUANTIZATION} is {_method_of(described)}, {MANIFEST} beside it is "
            f"of a compressed model; {again}"
        )
    for found, expected in ((content, wanted), (described, told)):
        for key, value in expected.items():
            if found.get(key, value) != value:
                raise ArtifactError(
                    f"{path}: {key} is {json.dumps(found[key])[:80]}, {MANIFEST} says "
                    f"{json.dumps(value)[:80]}; {again}"
                )


def _method_of(described: Any) -> str:
    if not isinstance(described, dict):
        return "missing" if described is None else f"a {type(described).__name__}"
    return f"of method {str(described.get('quant_method'))[:40]!r}"


def _digest_of(content: dict[str, Any]) -> str:
    """sha256 of all but where the base is, which may be edited: the VAE's hashes tell it again."""
    base = content.get("base")
    if isinstance(base, dict):
        content = {**content, "base": {key: base[key] for key in base if key != "source"}}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    content = manifest.to_json()
    write_json(folder / MANIFEST, {**content, _DIGEST: _digest_of(content)})


def _checked(content: dict[str, Any]) -> Manifest:
    """Raises: ValueError naming the first key that is missing, foreign or of another type."""
    types: dict[str, tuple[type, ...]] = dict.fromkeys(Manifest.__dataclass_fields__, (dict,))
    types |= {"kv": (dict, type(None)), "created_by": (str,)}
    for key in sorted(types.keys() | content.keys()):
        if key not in types or key not in content or not isinstance(content[key], types[key]):
            wanted = " or ".join(kind.__name__ for kind in types.get(key, ())) or "nothing"
            found = type(content[key]).__name__ if key in content else "missing"
            raise ValueError(f"{key} is {found}, expected {wanted}")
    manifest = Manifest(**content)
    config = config_from_dict(InfinityConfig, manifest.config, "config")
    QuantSpec.from_dict(manifest.spec)
    hashes = manifest.base.get("vae")
    if not isinstance(manifest.base.get("source"), str) or not isinstance(hashes, dict):
        raise ValueError("base names no source, or no vae files")
    for name in [*hashes, *manifest.files]:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"refused, the file {name!r} lies outside")
    for name, entry in manifest.files.items():
        entry = entry if isinstance(entry, dict) else {}
        if type(entry.get("bytes")) is not int or not isinstance(entry.get("sha256"), str):
            raise ValueError(f"files.{name} lacks bytes or sha256")
    needed = {TRANSFORMER_FILE, *map(block_file, range(config.depth))}
    if manifest.kv is not None:
        needed.add(KV_FILE)
        if not isinstance(manifest.kv.get("format"), dict):
            raise ValueError(f"kv.format is {manifest.kv.get('format')!r}, expected dict")
    if missing := needed - manifest.files.keys():
        raise ValueError(f"files lacks {min(missing)}")
    return manifest


def verify_files(folder: str | Path, manifest: Manifest) -> None:
    """Raises: ArtifactError naming the first file that is missing, cut short or changed."""

    folder = artifact_folder(folder)

    def check(name: str) -> None:
        path, entry = folder / name, manifest.files[name]
        again = how_to_get_again(path, "copy the artifact again")
        if not path.is_file():
            raise ArtifactError(f"{path}: missing; {again}")
        if path.stat().st_size != entry["bytes"]:
            raise ArtifactError(
                f"{path}: has {path.stat().st_size} bytes, expected {entry['bytes']}; {again}"
            )
        if sha256_of(path) != entry["sha256"]:
            raise ArtifactError(f"{path}: its content changed (sha256 differs); {again}")

    with ThreadPoolExecutor() as pool:
        list(pool.map(check, manifest.files))


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


@contextmanager
def artifact_writer(folder: str | Path, identity: dict[str, Any]) -> Iterator[ArtifactWriter]:
    """A writer for a new artifact, or for one whose run was cut off.

    ``identity`` is everything that determines the result; a run with another identity refuses to
    continue in the same directory and says what differs.
    Raises: ArtifactError when ``folder`` holds something else, CheckpointError while another
    process writes it.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder}: is a file; give a new or empty directory")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        _begin(folder, identity)
        yield ArtifactWriter(folder)


def _begin(folder: Path, identity: dict[str, Any]) -> None:
    if is_artifact(folder):
        raise ArtifactError(f"{folder}: holds a finished artifact; give another --out")
    resume = folder / _RESUME_FILE
    if resume.exists():
        _check_identity(resume, identity)
        _clear_temporaries(folder)
        return
    # a kill during the very first write leaves only its temporary file
    if any(not entry.match(f".{_RESUME_FILE}.*.tmp") for entry in folder.iterdir()):
        raise ArtifactError(f"{folder}: holds other files; give a new or empty directory")
    _clear_temporaries(folder)
    write_json(resume, identity)


def _check_identity(resume: Path, identity: dict[str, Any]) -> None:
    try:
        started = json.loads(resume.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        started = None
    if not isinstance(started, dict):
        raise ArtifactError(f"{resume}: unreadable; delete the directory and start again")
    before, now = flat(started), flat(json.loads(json.dumps(identity)))
    differing = sorted(key for key, _ in before.items() ^ now.items())
    if differing:
        key = differing[0]
        raise ArtifactError(
            f"{resume.parent}: was begun with {key} = {before.get(key, 'nothing')}, now it is "
            f"{now.get(key, 'nothing')}; give another --out, or delete it"
        )


def _clear_temporaries(folder: Path) -> None:
    """What `write_atomically` leaves behind when it is killed."""
    for path in folder.rglob(".*.tmp"):
        path.unlink()


class ArtifactWriter:
    """Writes an artifact block by block; finished blocks survive a kill."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

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
        blocks = [self.report(i) for i in range(num_blocks)]
        write_json(self.folder / REPORT_FILE, {"blocks": blocks})
        names = [TRANSFORMER_FILE, REPORT_FILE, *map(block_file, range(num_blocks))]
        manifest = replace(manifest, files=_listed(self.folder, names))
        _write_manifest(self.folder, manifest)
        self.end_run(num_blocks)
        return manifest

    def report(self, index: int) -> dict[str, Any]:
        """What `put_block` was given, until the run ends."""
        return json.loads(self._report_path(index).read_text())

    def end_run(self, num_blocks: int) -> None:
        """Remove what only a run that was cut off needs."""
        for index in range(num_blocks):
            self._report_path(index).unlink()
        (self.folder / TRACE_FILE).unlink(missing_ok=True)
        (self.folder / _RESUME_FILE).unlink()

    def _report_path(self, index: int) -> Path:
        return self.folder / "blocks" / f"{index:03d}.json"


def put_kv(folder: str | Path, tensors: Mapping[str, Tensor], kv: dict[str, Any]) -> Manifest:
    """Add or replace the KV cache's parameters of a finished artifact.

    A kill in between leaves an artifact without them, which works with a 16-bit cache.
    """
    folder = Path(folder)
    with locked(folder):
        manifest = read_editable(folder)
        _clear_temporaries(folder)
        if manifest.kv is not None:
            files = {name: entry for name, entry in manifest.files.items() if name != KV_FILE}
            manifest = replace(manifest, kv=None, files=files)
            _write_manifest(folder, manifest)
        write_atomically(folder / KV_FILE, save(on_cpu(tensors)))
        files = {**manifest.files, **_listed(folder, [KV_FILE])}
        manifest = replace(manifest, kv=kv, files=files)
        _write_manifest(folder, manifest)
    return manifest


def read_editable(folder: str | Path) -> Manifest:
    """The manifest of an artifact that may be changed.

    Raises: ArtifactError for one that is part of a model directory, which is made to be passed on.
    """
    manifest = read_manifest(folder)
    if enclosing_model(folder) is not None:
        raise ArtifactError(
            f"{folder}: is a compressed model directory, which stays as it is; calibrate the "
            "artifact that it was saved from, and save it again"
        )
    return manifest


def write_kv(folder: str | Path, tensors: Mapping[str, Tensor], kv: dict[str, Any]) -> None:
    """The KV cache's parameters alone, for a model that is no artifact; the manifest goes last."""
    check_no_artifact(folder)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / KV_MANIFEST).unlink(missing_ok=True)
    write_atomically(folder / KV_FILE, save(on_cpu(tensors)))
    digest = sha256_of(folder / KV_FILE)
    content = {"format": KV_FORMAT, "sha256": digest, "kv_sha256": _digest_of(kv), "kv": kv}
    write_json(folder / KV_MANIFEST, content)


def check_no_artifact(folder: str | Path) -> None:
    """Raises: ArtifactError for an artifact, whose own manifest tells of its KV parameters."""
    if is_artifact(folder) or is_unfinished(folder):
        raise ArtifactError(f"{folder}: is an artifact; give it as --artifact")


def read_kv(folder: str | Path) -> dict[str, Any]:
    """The manifest's ``kv`` of what ``write_kv`` wrote.

    Raises: ArtifactError when it is missing, foreign or not of its parameters.
    """
    path = Path(folder) / KV_MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path}: not readable ({error}); `varc calibrate-kv … --out` writes one"
        ) from None
    if not isinstance(content, dict) or content.get("format") != KV_FORMAT:
        raise ArtifactError(f"{path}: not of format {KV_FORMAT!r}; calibrate again")
    file = path.with_name(KV_FILE)
    if not file.is_file() or sha256_of(file) != content.get("sha256"):
        raise ArtifactError(f"{file}: is not the file of {path}; copy or calibrate it again")
    kv = content.get("kv")
    if not isinstance(kv, dict):
        raise ArtifactError(f"{path}: kv is {type(kv).__name__}, expected dict; calibrate again")
    if content.get("kv_sha256", _digest_of(kv)) != _digest_of(kv):
        raise ArtifactError(f"{path}: its content changed (sha256 differs); copy it again")
    return kv


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


def flat(content: Any, prefix: str = "") -> dict[str, str]:
    """Leaves of nested mappings as JSON, by dotted key."""
    if isinstance(content, dict):
        parts = (
            flat(value, f"{prefix}.{key}" if prefix else key) for key, value in content.items()
        )
        return {key: value for part in parts for key, value in part.items()}
    return {prefix: json.dumps(content)}
