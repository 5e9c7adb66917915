"""Our model directory, laid out as diffusers does: written in one piece, read without copies.

    model_index.json       what the model is, its parts, and where it came from
    transformer/           config.json, diffusion_pytorch_model.safetensors (or shards + index)
    vae/                   the same
    text_encoder/          a Hugging Face T5 folder; absent when the index names one elsewhere
    tokenizer/             its tokenizer

Tensors carry our own names. Files are written under a temporary directory beside the target, which
takes the target's name when everything is on the disk: a killed run leaves nothing that looks
whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from var_compressor import __version__
from var_compressor.models.checkpoint import load_own
from var_compressor.models.config import (
    FLAN_T5_XL_ID,
    MODELS,
    InfinityConfig,
    VAEConfig,
    config_from_dict,
    config_to_dict,
)
from var_compressor.models.tensor_files import CheckpointError, OnTensor
from var_compressor.models.text_encoder import FLAN_T5_XL, T5Shape
from var_compressor.models.transformer import Infinity
from var_compressor.models.vae import VAE

MODEL_INDEX = "model_index.json"
FORMAT_VERSION = 1
PIPELINE_CLASS = "InfinityPipeline"
WEIGHTS = "diffusion_pytorch_model"
MAX_SHARD_BYTES = 2**30
EMBEDDED = ("infinity-tiny",)

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclass(frozen=True)
class ModelIndex:
    """What ``model_index.json`` says.

    ``text_encoder`` is None (no text encoder), "" (the folders ``text_encoder/`` and ``tokenizer/``
    beside it), or a hub id or path of a T5 folder. ``provenance`` is free JSON.
    """

    has_vae: bool
    text_encoder: str | None
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        t5: Any = self.text_encoder
        tokenizer: Any = self.text_encoder
        if self.text_encoder == "":
            t5 = ["transformers", "T5EncoderModel"]
            tokenizer = ["transformers", "AutoTokenizer"]
        return {
            "_class_name": PIPELINE_CLASS,
            "_format_version": FORMAT_VERSION,
            "_var_compressor_version": __version__,
            "transformer": ["var_compressor", "Infinity"],
            "vae": ["var_compressor", "VAE"] if self.has_vae else None,
            "text_encoder": t5,
            "tokenizer": tokenizer,
            "provenance": self.provenance,
        }


# --- finding -------------------------------------------------------------------------------------


def resolve(source: str | Path) -> Path:
    """The directory that a path, the name of an embedded model or a hub id stands for.

    A hub id is downloaded (only our five parts of it).
    Raises: CheckpointError when there is none.
    """
    path = Path(source).expanduser()
    if (path / MODEL_INDEX).is_file():
        return path
    if str(source) in EMBEDDED:
        return _embedded(str(source))
    if path.exists():
        raise CheckpointError(
            f"{path}: no model directory (it has no {MODEL_INDEX}); official files become one "
            "with `varc convert`, and `varc inspect` tells what it is"
        )
    if str(source) in MODELS:
        raise CheckpointError(
            f"{source}: this model does not come with the package; turn its official files into a "
            "directory with `varc convert` and give that"
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return _download(str(source))
    raise CheckpointError(
        f"{source}: no such directory, embedded model ({', '.join(EMBEDDED)}) or hub id"
    )


def _embedded(name: str) -> Path:
    path = _embedded_folder(name)
    if not (path / MODEL_INDEX).is_file():
        raise CheckpointError(f"{path}: the embedded model is missing; reinstall var-compressor")
    return path


def _embedded_folder(name: str) -> Path:
    return Path(str(resources.files("var_compressor"))) / "assets" / name


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    parts = ("transformer", "vae", "text_encoder", "tokenizer")
    try:
        folder = snapshot_download(
            repo_id, allow_patterns=[MODEL_INDEX, *(f"{part}/*" for part in parts)]
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{repo_id}: no such directory, and the hub gave no model of that id ({reason})"
        ) from error
    if not (Path(folder) / MODEL_INDEX).is_file():
        raise CheckpointError(
            f"{repo_id}: this hub repository has no {MODEL_INDEX}; if it holds official files, "
            "download them and run `varc convert`"
        )
    return Path(folder)


# --- reading -------------------------------------------------------------------------------------


def read_index(directory: Path) -> ModelIndex:
    """Raises: CheckpointError when it is not the index of one of our models."""
    path = directory / MODEL_INDEX
    content = read_json(path)
    if content.get("_class_name") != PIPELINE_CLASS:
        raise CheckpointError(
            f"{path}: is a {content.get('_class_name')!r}, expected {PIPELINE_CLASS!r}"
        )
    if content.get("_format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: has format version {content.get('_format_version')!r}, this program reads "
            f"{FORMAT_VERSION}; update var-compressor or write the directory again"
        )
    encoder, provenance = content.get("text_encoder"), content.get("provenance", {})
    if not isinstance(encoder, str | list | None) or not isinstance(provenance, dict):
        raise CheckpointError(f"{path}: text_encoder or provenance is malformed")
    reference = "" if isinstance(encoder, list) else encoder
    return ModelIndex(content.get("vae") is not None, reference, provenance)


def is_ours(directory: Path) -> bool:
    """Whether a directory is one of our models, whatever its format version."""
    try:
        return read_json(directory / MODEL_INDEX).get("_class_name") == PIPELINE_CLASS
    except CheckpointError:
        return False


def load_transformer(
    directory: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    on_tensor: OnTensor | None = None,
) -> Infinity:
    """The transformer of a model directory, blocks in ``dtype``, everything else in float32."""
    folder = Path(directory) / "transformer"
    config = read_transformer_config(folder)
    model = meta_transformer(config, dtype)
    load_own(model, folder, device=device, on_tensor=on_tensor)
    return model


def load_vae(directory: str | Path, *, dtype: torch.dtype, device: torch.device | str) -> VAE:
    """The VAE of a model directory, in ``dtype``."""
    folder = Path(directory) / "vae"
    model = meta_vae(read_vae_config(folder), dtype)
    load_own(model, folder, device=device)
    return model


def meta_transformer(config: InfinityConfig, dtype: torch.dtype) -> Infinity:
    """A transformer without storage, waiting for its tensors."""
    with torch.device("meta"):
        return Infinity(config).set_block_dtype(dtype)


def meta_vae(config: VAEConfig, dtype: torch.dtype) -> VAE:
    """A VAE without storage, waiting for its tensors."""
    with torch.device("meta"):
        return VAE(config).to(dtype)


def text_encoder_folders(directory: Path, index: ModelIndex) -> tuple[str, str] | None:
    """Where the T5 encoder and its tokenizer are: folders or hub ids; None without any.

    A reference may name an embedded model, whose encoder is meant then.
    """
    if index.text_encoder is None:
        return None
    if index.text_encoder == "":
        return str(directory / "text_encoder"), str(directory / "tokenizer")
    if index.text_encoder in EMBEDDED:
        embedded = _embedded_folder(index.text_encoder)
        return str(embedded / "text_encoder"), str(embedded / "tokenizer")
    return index.text_encoder, index.text_encoder


def embedded_tokenizer() -> str:
    """The folder of Infinity-Tiny's tokenizer, which any T5 can read."""
    return str(_embedded_folder(EMBEDDED[0]) / "tokenizer")


def text_encoder_shape(encoder: str) -> T5Shape:
    """Of a T5 folder, of an embedded model's encoder, or of flan-t5-xl; no weight is read.

    Raises: CheckpointError for an encoder that is not here, or not a T5.
    """
    if encoder == FLAN_T5_XL_ID:
        return FLAN_T5_XL
    folder = _embedded_folder(encoder) / "text_encoder" if encoder in EMBEDDED else Path(encoder)
    path = folder / "config.json"
    try:
        return T5Shape.of_config(read_json(path), str(path))
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def read_transformer_config(folder: Path) -> InfinityConfig:
    path = folder / "config.json"
    try:
        return config_from_dict(InfinityConfig, _config_fields(path, "Infinity"), str(path))
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def read_vae_config(folder: Path) -> VAEConfig:
    path = folder / "config.json"
    try:
        return config_from_dict(VAEConfig, _config_fields(path, "VAE"), str(path))
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _config_fields(path: Path, class_name: str) -> dict[str, Any]:
    content = read_json(path)
    if content.pop("_class_name", None) != class_name:
        raise CheckpointError(f"{path}: not the config of a {class_name}")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises: CheckpointError when it is missing or something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; is the directory complete?") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected an object")
    return content


# --- writing -------------------------------------------------------------------------------------


@contextmanager
def new_directory(target: str | Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary directory that becomes ``target`` when the block ends without an error.

    What a killed run left behind is cleared by the next one for the same target.
    Raises: CheckpointError when ``target`` holds something, unless it is one of our models and
    ``overwrite`` is set, or when another process is writing it.
    """
    target = Path(target).expanduser().absolute()
    _refuse_occupied(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.mkdir(exist_ok=True)
    with locked(partial):
        _empty(partial)
        try:
            yield partial
            _sync_tree(partial)
            _refuse_occupied(target, overwrite=overwrite)
            _put_in_place(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _refuse_occupied(target: Path, *, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target}: is a file; give a new directory")
    if not any(target.iterdir()):
        return
    if not is_ours(target):
        raise CheckpointError(f"{target}: holds other files; give a new or empty directory")
    if not overwrite:
        raise CheckpointError(
            f"{target}: holds a model already; give another directory, or overwrite it "
            "(--overwrite)"
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only process that writes ``folder``; a kill gives the lock back.

    Raises: CheckpointError when another process has it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{folder}: another process is writing it; wait for it") from None
        yield
    finally:
        os.close(descriptor)


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _sync_tree(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _put_in_place(partial: Path, target: Path) -> None:
    replaced = target.with_name(f".{target.name}.replaced")
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    partial.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)


def write_component(
    folder: Path,
    config: InfinityConfig | VAEConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_tensor: OnTensor | None = None,
) -> None:
    """Write one model: its config and its tensors, which may come from a generator.

    Holds no more tensors at a time than one shard has.
    """
    class_name = "Infinity" if isinstance(config, InfinityConfig) else "VAE"
    write_model(
        folder,
        {"_class_name": class_name, **config_to_dict(config)},
        tensors,
        stem=WEIGHTS,
        max_shard_bytes=max_shard_bytes,
        on_tensor=on_tensor,
    )


def write_model(
    folder: Path,
    config: dict[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    stem: str,
    max_shard_bytes: int,
    on_tensor: OnTensor | None,
) -> None:
    """`write_component` of any config, into files whose names begin with ``stem``."""
    folder.mkdir()
    _write_json(folder / "config.json", config)
    shards: list[Path] = []
    weight_shards: dict[str, int] = {}
    total_bytes = 0
    for shard in _shards(tensors, max_shard_bytes, on_tensor):
        shards.append(folder / f"shard-{len(shards)}.safetensors")
        save_file(shard, shards[-1], metadata={"format": "pt"})
        # safetensors makes files that nobody else may read
        shutil.copymode(folder / "config.json", shards[-1])
        weight_shards |= dict.fromkeys(shard, len(shards))
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
        # before the next shard is gathered
        del shard
    if len(shards) == 1:
        shards[0].rename(folder / f"{stem}.safetensors")
        return
    names = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for path, name in zip(shards, names, strict=True):
        path.rename(folder / name)
    weight_map = {tensor: names[shard - 1] for tensor, shard in weight_shards.items()}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    _write_json(folder / f"{stem}.safetensors.index.json", index)


def _shards(
    tensors: Iterable[tuple[str, Tensor]], max_bytes: int, on_tensor: OnTensor | None
) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    num_bytes = 0
    for name, tensor in tensors:
        if shard and num_bytes + tensor.nbytes > max_bytes:
            yield shard
            shard, num_bytes = {}, 0
        shard[name] = _alone(tensor)
        num_bytes += tensor.nbytes
        if on_tensor is not None:
            on_tensor(name, tensor.nbytes)
    yield shard


def _alone(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, and not a part of a larger storage: what safetensors accepts."""
    tensor = tensor.detach().cpu().contiguous()
    is_part = tensor.untyped_storage().nbytes() != tensor.nbytes
    return tensor.clone() if is_part else tensor


def write_text_encoder(directory: Path, encoder_dir: str, tokenizer_dir: str) -> None:
    """Copy a T5 folder and its tokenizer into the model directory.

    Raises: CheckpointError when they are not local folders of that kind.
    """
    source = Path(encoder_dir)
    weights = sorted(source.glob("*.safetensors*")) or sorted(source.glob("pytorch_model*.bin*"))
    config = source / "config.json"
    if not weights or not config.is_file():
        raise CheckpointError(f"{source}: no local T5 folder (config.json and weights) to copy")
    _copy_files(directory / "text_encoder", [config, *weights])
    copy_tokenizer(directory, tokenizer_dir)


def copy_tokenizer(directory: Path, tokenizer_dir: str) -> None:
    """Raises: CheckpointError when there is none."""
    tokenizer = [Path(tokenizer_dir) / name for name in _TOKENIZER_FILES]
    present = [path for path in tokenizer if path.is_file()]
    if not present:
        raise CheckpointError(f"{tokenizer_dir}: no tokenizer (tokenizer.json or spiece.model)")
    _copy_files(directory / "tokenizer", present)


def _copy_files(folder: Path, files: Iterable[Path]) -> None:
    folder.mkdir()
    for file in files:
        shutil.copyfile(file, folder / file.name)


def write_index(directory: Path, index: ModelIndex) -> None:
    _write_json(directory / MODEL_INDEX, index.to_json())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
