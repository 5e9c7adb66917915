"""Named tensors of checkpoint files and folders, read one at a time, nothing executed.

``torch.save`` files (``weights_only``, memory-mapped), safetensors, and folders of shards with an
index. Anything missing, foreign, truncated or malicious is refused with one line.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import pickle
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
# told of every tensor that is read or written: its name and bytes
OnTensor = Callable[[str, int], None]
# in order of preference; other frameworks' indexes may lie beside them
_SHARD_INDEXES = ("*.safetensors.index.json", "*.bin.index.json", "*.pth.index.json")


class CheckpointError(ValueError):
    """A weight file that cannot be used; the message names file, tensor, shapes and a way out."""


@dataclass(frozen=True)
class TensorInfo:
    """What a file says of a tensor: its shape and dtype ("float32", …)."""

    shape: tuple[int, ...]
    dtype: str


class TensorSource(Protocol):
    """Named tensors of a file or folder, read one at a time."""

    where: str
    files: tuple[Path, ...]

    def names(self) -> set[str]: ...

    def info(self, name: str) -> TensorInfo: ...

    def read(self, name: str, dtype: torch.dtype) -> Tensor: ...


class _TorchFile:
    """A ``torch.save`` file, memory-mapped; only tensors and plain containers are accepted."""

    def __init__(self, path: Path, sub_keys: tuple[tuple[str, ...], ...]) -> None:
        self.where = str(path)
        self.files: tuple[Path, ...] = (path,)
        content = load_torch_zip(path)
        for keys in sub_keys:
            inner = content
            for key in keys:
                inner = inner.get(key) if isinstance(inner, dict) else None
            if isinstance(inner, dict):
                content = inner
                break
        if not isinstance(content, dict):
            raise CheckpointError(
                f"{path}: holds a {type(content).__name__}, expected a state dict"
            )
        self._tensors = {
            str(name): value for name, value in content.items() if isinstance(value, Tensor)
        }

    def names(self) -> set[str]:
        return set(self._tensors)

    def info(self, name: str) -> TensorInfo:
        tensor = self._tensors[name]
        return TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        stored = self._tensors[name]
        if not is_plain(stored):
            raise CheckpointError(f"{self.where}: {name} is a tensor without plain data")
        if stored.dtype == dtype:
            return stored
        converted = stored.to(dtype)
        _unmap_pages(stored)
        return converted


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor of a file is nothing but numbers: some kinds have no data, or rules."""
    return not tensor.is_meta and tensor.layout == torch.strided and not tensor.is_quantized


def check_zip(path: Path) -> None:
    """Raises: CheckpointError when a part of a torch.save file is not what was written.

    Reads all of it. torch itself compares no checksums: a flipped bit would become a weight.
    """
    _check_head(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise CheckpointError(
                    f"{path}: refused, it is compressed; torch.save never does so"
                )
            damaged = archive.testzip()
    except CheckpointError:
        raise
    # a damaged archive makes zipfile stumble in many ways
    except Exception as error:
        raise CheckpointError(
            f"{path}: not a readable torch checkpoint ({_first_line(error)}); "
            "is the download complete?"
        ) from None
    if damaged is not None:
        raise CheckpointError(f"{path}: {damaged} is damaged (its checksum differs); copy it again")


def load_torch_zip(path: Path) -> object:
    """What ``torch.save`` wrote, memory-mapped, tensors and plain containers alone.

    Raises: CheckpointError for anything else.
    """
    _check_head(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, it holds more than tensors ({_first_line(error)}); "
            "re-save its state dict with torch.save(model.state_dict())"
        ) from None
    # a damaged pickle makes the unpickler stumble in any way there is
    except Exception as error:
        raise CheckpointError(
            f"{path}: not a readable torch checkpoint ({_first_line(error)}); "
            "is the download complete?"
        ) from None


def _check_head(path: Path) -> None:
    """Raises: CheckpointError for what torch.save cannot have written."""
    with path.open("rb") as file:
        head = file.read(16)
    if head.startswith(b"version https://"):
        raise CheckpointError(f"{path}: a git-lfs pointer, not the weights; run `git lfs pull`")
    if not head.startswith(b"PK"):
        raise CheckpointError(
            f"{path}: not a checkpoint that torch.save writes (it begins with {head[:8]!r}); "
            "download it again, or re-save it with torch 1.6 or later"
        )


def _unmap_pages(mapped: Tensor) -> None:
    """Take a memory-mapped tensor's pages out of this process; reading it maps them again."""
    if not sys.platform.startswith("linux"):
        return
    storage = mapped.untyped_storage()
    start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if length > 0:
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def _first_line(error: Exception) -> str:
    # torch quotes what it stumbles over, however long
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


class _SafetensorsFiles:
    """One or several files, of which one is open at a time, so that its pages can be let go."""

    def __init__(self, files: dict[str, Path], where: str) -> None:
        self.where = where
        self.files = tuple(sorted(set(files.values())))
        self._files = files
        self._open_path: Path | None = None
        for path in self.files:
            promised = {name for name, file in files.items() if file == path}
            if lacking := promised.difference(_open_safetensors(path).keys()):
                raise CheckpointError(f"{path}: lacks {min(lacking)}, which the index promises")

    def names(self) -> set[str]:
        return set(self._files)

    def info(self, name: str) -> TensorInfo:
        view = self._file_with(name).get_slice(name)
        dtype = view.get_dtype()
        return TensorInfo(tuple(view.get_shape()), _SAFETENSORS_DTYPES.get(dtype, dtype))

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        return self._file_with(name).get_tensor(name).to(dtype)

    def _file_with(self, name: str) -> Any:
        path = self._files[name]
        if path != self._open_path:
            self._open_file = _open_safetensors(path)
            self._open_path = path
        return self._open_file


class _TorchShards:
    """Files of ``torch.save``, of which one is open at a time."""

    def __init__(self, files: dict[str, Path], where: str) -> None:
        self.where = where
        self.files = tuple(sorted(set(files.values())))
        self._files = files
        self._open_path: Path | None = None

    def names(self) -> set[str]:
        return set(self._files)

    def info(self, name: str) -> TensorInfo:
        return self._file_with(name).info(name)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        return self._file_with(name).read(name, dtype)

    def _file_with(self, name: str) -> _TorchFile:
        path = self._files[name]
        if path != self._open_path:
            if not path.is_file():
                raise CheckpointError(f"{path}: no such file, though the index names it")
            self._open_file = _TorchFile(path, ())
            self._open_path = path
        if name not in self._open_file.names():
            raise CheckpointError(f"{path}: lacks {name}, which the index promises")
        return self._open_file


def seal_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Metadata for a safetensors file, which has no checksum of its own."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return {"sha256": digest.hexdigest()}


def is_as_sealed(path: Path, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the tensors of a file are those that its seal was made for."""
    metadata = _open_safetensors(path).metadata() or {}
    return metadata.get("sha256") == seal_of(tensors)["sha256"]


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file, though the index names it") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({error}); is the download complete?"
        ) from None


def open_tensors(path: str | Path, *, sub_keys: tuple[tuple[str, ...], ...] = ()) -> TensorSource:
    """Open a checkpoint file, or a folder with safetensors or a shard index.

    ``sub_keys`` are places inside a ``torch.save`` dict to look for the state dict first.
    Raises: CheckpointError for anything that is missing, foreign or truncated.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if path.suffix == ".safetensors":
        return _SafetensorsFiles(dict.fromkeys(_open_safetensors(path).keys(), path), str(path))
    return _TorchFile(path, sub_keys)


def _open_folder(path: Path) -> TensorSource:
    if indexes := [index for kind in _SHARD_INDEXES for index in sorted(path.glob(kind))]:
        files = _read_index(indexes[0])
        if all(file.suffix == ".safetensors" for file in files.values()):
            return _SafetensorsFiles(files, str(path))
        return _TorchShards(files, str(path))
    singles = sorted(path.glob("*.safetensors"))
    if len(singles) == 1:
        return open_tensors(singles[0])
    raise CheckpointError(
        f"{path}: a folder with {len(singles)} .safetensors files and no shard index "
        "(*.safetensors.index.json or *.bin.index.json); expected one of either"
    )


def _read_index(index: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a shard index ({error})") from None
    for file in set(files.values()):
        if Path(file).name != file:
            raise CheckpointError(f"{index}: refused, the shard {file!r} lies outside the folder")
    return {name: index.parent / file for name, file in files.items()}
