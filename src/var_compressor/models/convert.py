"""Making model directories: from official files, or of random weights; tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from var_compressor.models.checkpoint import (
    mapped_tensors,
    official_transformer,
    official_vae,
    transformer_names,
    vae_names,
)
from var_compressor.models.config import MODELS, ModelConfig
from var_compressor.models.directory import (
    ModelIndex,
    OnTensor,
    embedded_tokenizer,
    meta_transformer,
    meta_vae,
    text_encoder_shape,
)
from var_compressor.models.new_directory import (
    MAX_SHARD_BYTES,
    copy_tokenizer,
    new_directory,
    write_component,
    write_index,
    write_model,
    write_text_encoder,
)
from var_compressor.models.random_init import random_t5_tensors, random_tensors


@dataclass(frozen=True)
class WriteOptions:
    """How a directory is written.

    ``dtype`` is that of the blocks and of the VAE; everything else is float32. ``on_tensor(name,
    bytes)`` is called after each tensor.
    """

    dtype: torch.dtype
    overwrite: bool = False
    max_shard_bytes: int = MAX_SHARD_BYTES
    on_tensor: OnTensor | None = None


def model_config(name: str) -> ModelConfig:
    """Raises: ValueError for a name that is not in ``MODELS``."""
    if name not in MODELS:
        raise ValueError(f"model is {name!r}; use one of {', '.join(MODELS)}")
    return MODELS[name]


def convert_official(
    config: ModelConfig,
    out: str | Path,
    *,
    transformer: str | Path,
    vae: str | Path,
    text_encoder: str,
    copy_text_encoder: bool,
    options: WriteOptions,
) -> None:
    """Official files to a model directory.

    ``text_encoder`` is a T5 folder or hub id: with ``copy_text_encoder`` a folder is copied, else
    the directory refers to it (a folder by its absolute path).
    Raises: CheckpointError, leaving nothing behind, for files that do not fit ``config``.
    """
    network = meta_transformer(config.transformer, options.dtype)
    decoder = meta_vae(config.vae, options.dtype)
    is_folder = Path(text_encoder).expanduser().is_dir()
    t5 = str(Path(text_encoder).expanduser().absolute()) if is_folder else text_encoder
    source, vae_source = official_transformer(transformer), official_vae(vae)
    with new_directory(out, overwrite=options.overwrite) as folder:
        names = transformer_names(config.transformer, source.names())
        tensors = mapped_tensors(network.state_dict(), source, names)
        vae_tensors = mapped_tensors(
            decoder.state_dict(), vae_source, vae_names(decoder, vae_source.names())
        )
        # the small one first: a wrong VAE should not cost a converted transformer
        for part, part_config, part_tensors in (
            ("vae", config.vae, vae_tensors),
            ("transformer", config.transformer, tensors),
        ):
            write_component(
                folder / part,
                part_config,
                part_tensors,
                max_shard_bytes=options.max_shard_bytes,
                on_tensor=options.on_tensor,
            )
        if copy_text_encoder:
            write_text_encoder(folder, t5, t5)
        files = [*source.files, *vae_source.files]
        provenance = {
            "made_by": "convert",
            "files": {file.name: {"bytes": file.stat().st_size} for file in files},
        }
        write_index(folder, ModelIndex(True, "" if copy_text_encoder else t5, provenance))


def init_random(
    config: ModelConfig,
    out: str | Path,
    *,
    seed: int,
    with_vae: bool,
    with_text_encoder: bool,
    options: WriteOptions,
) -> None:
    """A model directory of random weights.

    Its text encoder is random too, with the tokenizer of Infinity-Tiny, or only referred to.
    """
    network = meta_transformer(config.transformer, options.dtype)
    with new_directory(out, overwrite=options.overwrite) as folder:
        write_component(
            folder / "transformer",
            config.transformer,
            random_tensors(network, seed=seed),
            max_shard_bytes=options.max_shard_bytes,
            on_tensor=options.on_tensor,
        )
        if with_vae:
            write_component(
                folder / "vae",
                config.vae,
                random_tensors(meta_vae(config.vae, options.dtype), seed=seed),
                max_shard_bytes=options.max_shard_bytes,
                on_tensor=options.on_tensor,
            )
        if with_text_encoder:
            _write_random_t5(folder, config, seed=seed, options=options)
        provenance = {"made_by": "init", "seed": seed}
        reference = "" if with_text_encoder else config.text_encoder
        write_index(folder, ModelIndex(with_vae, reference, provenance))


def _write_random_t5(
    folder: Path, config: ModelConfig, *, seed: int, options: WriteOptions
) -> None:
    shape = text_encoder_shape(config.text_encoder)
    write_model(
        folder / "text_encoder",
        shape.to_config(),
        random_t5_tensors(shape, dtype=options.dtype, seed=seed),
        stem="model",
        max_shard_bytes=options.max_shard_bytes,
        on_tensor=options.on_tensor,
    )
    copy_tokenizer(folder, embedded_tokenizer())


def num_bytes(
    config: ModelConfig, dtype: torch.dtype, *, with_vae: bool, with_text_encoder: bool
) -> int:
    """Bytes of all tensors of a model directory."""
    tensors = list(meta_transformer(config.transformer, dtype).state_dict().values())
    if with_vae:
        tensors += meta_vae(config.vae, dtype).state_dict().values()
    t5_bytes = 0
    if with_text_encoder:
        t5_bytes = text_encoder_shape(config.text_encoder).num_values * dtype.itemsize
    return sum(tensor.nbytes for tensor in tensors) + t5_bytes
