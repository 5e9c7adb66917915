"""Writing a model directory in one piece.

Files are written under a temporary directory beside the target, which takes the target's name when
everything is on the disk: a killed run leaves nothing that looks whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from var_compressor.models.config import InfinityConfig, VAEConfig, config_to_dict
from var_compressor.models.directory import MODEL_INDEX, WEIGHTS, ModelIndex, is_ours
from var_compressor.models.tensor_files import CheckpointError, OnTensor

MAX_SHARD_BYTES = 2**30
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
)


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
    _copy_files(directory / "text_encoder", t5_files(encoder_dir))
    copy_tokenizer(directory, tokenizer_dir)


def t5_files(encoder_dir: str) -> list[Path]:
    """Config and weights of a local T5 folder. Raises: CheckpointError when they are not there."""
    source = Path(encoder_dir)
    weights = sorted(source.glob("*.safetensors*")) or sorted(source.glob("pytorch_model*.bin*"))
    config = source / "config.json"
    if not weights or not config.is_file():
        raise CheckpointError(f"{source}: no local T5 folder (config.json and weights) to copy")
    return [config, *weights]


def copy_tokenizer(directory: Path, tokenizer_dir: str) -> None:
    """Raises: CheckpointError when there is none."""
    _copy_files(directory / "tokenizer", tokenizer_files(tokenizer_dir))


def tokenizer_files(tokenizer_dir: str) -> list[Path]:
    """Of a local folder. Raises: CheckpointError when it has none."""
    tokenizer = [Path(tokenizer_dir) / name for name in _TOKENIZER_FILES]
    present = [path for path in tokenizer if path.is_file()]
    if not present:
        raise CheckpointError(f"{tokenizer_dir}: no tokenizer (tokenizer.json or spiece.model)")
    return present


def _copy_files(folder: Path, files: Iterable[Path]) -> None:
    folder.mkdir()
    for file in files:
        shutil.copyfile(file, folder / file.name)


def write_index(directory: Path, index: ModelIndex) -> None:
    _write_json(directory / MODEL_INDEX, index.to_json())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
