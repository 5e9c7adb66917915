"""Our model directory, laid out as diffusers does, read without copies; `new_directory` writes it.

    model_index.json       what the model is, its parts, and where it came from
    transformer/           config.json, diffusion_pytorch_model.safetensors (or shards + index)
    vae/                   the same
    text_encoder/          a Hugging Face T5 folder; absent when the index names one elsewhere
    tokenizer/             its tokenizer

Tensors carry our own names. Of a compressed model, ``transformer/`` holds an artifact's files, and
its config.json a ``quantization_config`` (`artifact`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from var_compressor import __version__
from var_compressor.models import hub
from var_compressor.models.checkpoint import load_own
from var_compressor.models.config import (
    FLAN_T5_XL_ID,
    MODELS,
    InfinityConfig,
    VAEConfig,
    config_from_dict,
)
from var_compressor.models.tensor_files import CheckpointError, OnTensor
from var_compressor.models.text_encoder import FLAN_T5_XL, T5Shape
from var_compressor.models.transformer import Infinity
from var_compressor.models.vae import VAE

MODEL_INDEX = "model_index.json"
FORMAT_VERSION = 1
PIPELINE_CLASS = "InfinityPipeline"
WEIGHTS = "diffusion_pytorch_model"
# in a transformer's config.json: that its weights are compressed, and how
QUANTIZATION = "quantization_config"
EMBEDDED = ("infinity-tiny",)


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


def resolve(source: str | Path, *, revision: str | None = None) -> Path:
    """The directory that a path, the name of an embedded model or a hub id stands for.

    A hub id is downloaded (only our files of it), at ``revision`` or its newest.
    Raises: CheckpointError when there is none.
    """
    path = Path(source).expanduser()
    is_here = path.exists() or str(source) in EMBEDDED
    if is_here and revision is not None:
        raise CheckpointError(f"{source}: is on this machine; only a hub id has a revision")
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
    if not hub.is_repo_id(str(source)):
        raise CheckpointError(
            f"{source}: no such directory, embedded model ({', '.join(EMBEDDED)}) or hub id"
        )
    folder = hub.download(str(source), revision=revision)
    if not (folder / MODEL_INDEX).is_file():
        raise CheckpointError(
            f"{source}: this hub repository has no {MODEL_INDEX}; if it holds official files, "
            "download them and run `varc convert`"
        )
    return folder


def _embedded(name: str) -> Path:
    path = _embedded_folder(name)
    if not (path / MODEL_INDEX).is_file():
        raise CheckpointError(f"{path}: the embedded model is missing; reinstall var-compressor")
    return path


def _embedded_folder(name: str) -> Path:
    return Path(str(resources.files("var_compressor"))) / "assets" / name


# --- reading -------------------------------------------------------------------------------------


def read_index(directory: Path) -> ModelIndex:
    """Raises: CheckpointError when it is not the index of one of our models."""
    path = directory / MODEL_INDEX
    return index_of(read_json(path), str(path))


def index_of(content: dict[str, Any], path: str) -> ModelIndex:
    """`read_index` of what the file at ``path`` holds."""
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
    """Of a full-precision transformer.

    Raises: CheckpointError for anything else, a compressed one too.
    """
    path = folder / "config.json"
    content = _config_fields(path, "Infinity")
    if QUANTIZATION in content:
        raise CheckpointError(
            f"{path}: has a {QUANTIZATION}: its weights are compressed, expected full precision; "
            "InfinityPipeline.from_pretrained opens them if their manifest.json is beside it"
        )
    try:
        return config_from_dict(InfinityConfig, content, str(path))
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
