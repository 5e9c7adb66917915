"""A model directory as a list of files: of a compressed model, of a full-precision one, on the hub.

A list names every file and where its content is, so that it is written, compared or sent without
being copied first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from var_compressor.artifact import (
    CONFIG,
    MANIFEST,
    ArtifactError,
    artifact_folder,
    companions,
    enclosing_model,
    find_model,
    is_artifact,
    model_config,
    read_manifest,
)
from var_compressor.model_card import Measured, card
from var_compressor.models import hub
from var_compressor.models.directory import (
    MODEL_INDEX,
    ModelIndex,
    index_of,
    read_index,
    text_encoder_folders,
)
from var_compressor.models.inspection import sha256_of
from var_compressor.models.new_directory import t5_files, tokenizer_files
from var_compressor.models.tensor_files import CheckpointError

_MANIFEST_NAME = f"transformer/{MANIFEST}"


@dataclass(frozen=True)
class ModelFile:
    """``content``: bytes, or the file that has them; ``sha256``: what it must have, if known."""

    content: Path | bytes
    sha256: str | None = None

    @property
    def num_bytes(self) -> int:
        content = self.content
        return len(content) if isinstance(content, bytes) else content.stat().st_size


ModelFiles = dict[str, ModelFile]
# folders or hub ids of a T5 and of its tokenizer
Encoder = tuple[str, str]


def compressed_files(
    artifact: Path,
    home: Path,
    encoder: Encoder | None,
    *,
    copy_text_encoder: bool,
    provenance: dict[str, Any] | None,
) -> ModelFiles:
    """A model directory with an artifact as its transformer, and the VAE of ``home``.

    Raises: ArtifactError or CheckpointError for what is not there.
    """
    manifest = read_manifest(artifact)
    inner = artifact_folder(artifact)
    names = [MANIFEST, *manifest.files]
    hashes = {name: entry["sha256"] for name, entry in manifest.files.items()}
    files = {f"transformer/{name}": ModelFile(inner / name, hashes.get(name)) for name in names}
    files[f"transformer/{CONFIG}"] = ModelFile(_json(model_config(manifest)))
    weights = manifest.base["vae"]
    vae = [home / "vae" / CONFIG, *sorted((home / "vae").glob("*.safetensors*"))]
    files |= {f"vae/{path.name}": ModelFile(path, weights.get(path.name)) for path in vae}
    reference, t5 = _encoder_files(encoder, copies=copy_text_encoder)
    stated = read_index(home).provenance if provenance is None else provenance
    index = ModelIndex(True, reference, _with_licence(stated, home))
    return {MODEL_INDEX: ModelFile(_json(index.to_json())), **files, **t5}


def directory_files(folder: Path) -> ModelFiles:
    """The files of a model directory, with its text encoder where it refers to another folder."""
    hashes: dict[str, str] = {}
    if is_artifact(folder):
        manifest = read_manifest(folder)
        hashes = {f"transformer/{k}": entry["sha256"] for k, entry in manifest.files.items()}
        hashes |= {f"vae/{name}": digest for name, digest in manifest.base["vae"].items()}
    paths = [folder / MODEL_INDEX, folder / hub.README]
    for part in hub.PARTS:
        paths += sorted((folder / part).rglob("*"))
    names = {path: path.relative_to(folder) for path in paths if path.is_file()}
    files = {
        str(name): ModelFile(path, hashes.get(str(name)))
        for path, name in names.items()
        if not any(part.startswith(".") for part in name.parts)
    }
    index = read_index(folder)
    encoder = text_encoder_folders(folder, index) if index.text_encoder else None
    if encoder is not None and Path(encoder[0]).is_dir():
        _, t5 = _encoder_files(encoder, copies=True)
        files |= t5
        files[MODEL_INDEX] = ModelFile(_json(replace(index, text_encoder="").to_json()))
    return files


def source_files(source: str | Path) -> ModelFiles:
    """Of anything that `from_pretrained` opens, without opening it.

    Raises: ValueError for what is no model, or not all there.
    """
    folder = find_model(source)
    if not is_artifact(folder):
        return directory_files(folder)
    home = companions(folder, read_manifest(folder))
    if enclosing_model(folder) is not None:
        return directory_files(home)
    encoder = text_encoder_folders(home, read_index(home))
    return compressed_files(folder, home, encoder, copy_text_encoder=True, provenance=None)


def write_files(folder: Path, files: ModelFiles) -> None:
    """Raises: ArtifactError for a file that is not what it must be."""
    for name, file in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(file.content, bytes):
            target.write_bytes(file.content)
            continue
        _copy(file.content, target, file.sha256)


# --- for the hub ----------------------------------------------------------------------------------


def published(files: ModelFiles, name: str, results: Sequence[Measured]) -> ModelFiles:
    """What goes to the hub: with a model card, and without folders of this machine.

    ``name`` is the hub id that the card tells people to open. A card that lies in the directory is
    kept, unless there are ``results`` to put into a new one.
    Raises: CheckpointError for a file that is neither JSON nor safetensors nor a tokenizer.
    """
    for file in files:
        if not hub.is_ours(file):
            raise CheckpointError(
                f"{file}: only JSON, safetensors and tokenizers go to the hub; store weights as "
                "safetensors, and leave the rest away"
            )
    found, index = dict(files), _index(files)
    if index.text_encoder and Path(index.text_encoder).is_absolute():
        raise CheckpointError(
            f"{index.text_encoder}: the text encoder is not there; put it back, or save the model "
            "with another one"
        )
    if hub.README not in files or results:
        found[hub.README] = ModelFile(_card(files, name, index, results).encode())
    if _MANIFEST_NAME in files:
        found[_MANIFEST_NAME] = _without_folder(files[_MANIFEST_NAME])
    return found


def push(
    files: ModelFiles, repo_id: str, *, token: str | None, private: bool, commit_message: str | None
) -> str:
    """Put `published` files on the hub in one commit; the commit's address.

    Raises: ArtifactError for a damaged file, before anything is sent; CheckpointError from the hub.
    """
    if not hub.is_repo_id(repo_id):
        raise CheckpointError(f"{repo_id}: no hub id; expected org/name")
    with ThreadPoolExecutor() as pool:
        list(pool.map(_check, files.values()))
    return hub.upload(
        repo_id,
        {name: file.content for name, file in files.items()},
        token=token,
        private=private,
        commit_message=commit_message or "Upload a model with var-compressor",
    )


def _index(files: ModelFiles) -> ModelIndex:
    """What model_index.json says, with the licence of the directory's own card."""
    index = index_of(json.loads(_bytes_of(files[MODEL_INDEX])), MODEL_INDEX)
    if hub.README not in files:
        return index
    readme = files[hub.README].content
    assert isinstance(readme, Path)
    return replace(index, provenance=_with_licence(index.provenance, readme.parent))


def _card(files: ModelFiles, name: str, index: ModelIndex, results: Sequence[Measured]) -> str:
    is_compressed = _MANIFEST_NAME in files
    file = files[_MANIFEST_NAME if is_compressed else f"transformer/{CONFIG}"].content
    assert isinstance(file, Path)
    manifest = read_manifest(file.parent) if is_compressed else None
    return card(name, file.parent, manifest, index, results)


def _without_folder(manifest: ModelFile) -> ModelFile:
    """A base that is a folder here named by its last word; the manifest's hash allows for it."""
    content = json.loads(_bytes_of(manifest))
    source = Path(content["base"]["source"])
    if not source.is_absolute():
        return manifest
    # no name that a model could be found by: there it would be another one
    content["base"]["source"] = f"a folder named {source.name}"
    return ModelFile(_json(content))


def _encoder_files(encoder: Encoder | None, *, copies: bool) -> tuple[str | None, ModelFiles]:
    """What model_index.json says of a text encoder, and its files if they are copied."""
    if encoder is None:
        return None, {}
    folder, tokenizer = encoder
    if not Path(folder).is_dir() or not copies:
        return folder, {}
    files = {f"text_encoder/{path.name}": ModelFile(path) for path in t5_files(folder)}
    files |= {f"tokenizer/{path.name}": ModelFile(path) for path in tokenizer_files(tokenizer)}
    return "", files


def _with_licence(provenance: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """With the licence that the model card in a directory states, unless there is one."""
    try:
        front = (folder / hub.README).read_text(encoding="utf-8").split("---\n")
        stated = yaml.safe_load(front[1])["license"] if front[0] == "" else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError, yaml.YAMLError):
        stated = None
    licence = {"license": stated} if isinstance(stated, str) else {}
    return {**licence, **provenance}


def _bytes_of(file: ModelFile) -> bytes:
    return file.content if isinstance(file.content, bytes) else file.content.read_bytes()


def _check(file: ModelFile) -> None:
    if isinstance(file.content, Path) and not file.content.is_file():
        raise ArtifactError(f"{file.content}: missing; {_again(file.content)}")
    if file.sha256 is None or isinstance(file.content, bytes):
        return
    if sha256_of(file.content) != file.sha256:
        raise ArtifactError(f"{file.content}: its content changed; {_again(file.content)}")


def _copy(source: Path, target: Path, sha256: str | None) -> None:
    digest = hashlib.sha256()
    try:
        with source.open("rb") as reading, target.open("wb") as writing:
            while piece := reading.read(1 << 22):
                digest.update(piece)
                writing.write(piece)
    except FileNotFoundError:
        raise ArtifactError(f"{source}: missing; {_again(source)}") from None
    if sha256 is not None and digest.hexdigest() != sha256:
        raise ArtifactError(f"{source}: its content changed (sha256 differs); {_again(source)}")


def _again(path: Path) -> str:
    return hub.how_to_get_again(path, "copy it again from where it came from")


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
