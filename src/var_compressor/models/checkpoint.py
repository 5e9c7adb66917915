"""Official checkpoints to our names, by an explicit map, strictly.

Reads the published ``.pth`` files, Hugging Face shard folders and safetensors; never more than one
copy of the weights is held: the module is built on the meta device, tensors are read one by one,
converted and assigned.

Source: tensor names of the published Infinity checkpoints (github.com/FoundationVision/Infinity).
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import pickle
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from var_compressor.models.config import InfinityConfig
from var_compressor.models.transformer import Infinity
from var_compressor.models.vae import VAE


class CheckpointError(ValueError):
    """A weight file that cannot be used; the message names file, tensor, shapes and a way out."""


# --- name maps: ours -> official tensors that are concatenated along dim 0 ----------------------

_OUTSIDE_BLOCKS = {
    "uncond_text": ("cfg_uncond",),
    "start_position": ("pos_start",),
    "text_norm.weight": ("text_norm.weight",),
    "text_pool.query": ("text_proj_for_sos.ca.mat_q",),
    "text_pool.kv.weight": ("text_proj_for_sos.ca.mat_kv.weight",),
    "text_pool.kv.bias": ("text_proj_for_sos.ca.zero_k_bias", "text_proj_for_sos.ca.v_bias"),
    "text_pool.proj.weight": ("text_proj_for_sos.ca.proj.weight",),
    "text_pool.proj.bias": ("text_proj_for_sos.ca.proj.bias",),
    "text_proj.0.weight": ("text_proj_for_ca.0.weight",),
    "text_proj.0.bias": ("text_proj_for_ca.0.bias",),
    "text_proj.2.weight": ("text_proj_for_ca.2.weight",),
    "text_proj.2.bias": ("text_proj_for_ca.2.bias",),
    "level_embed.weight": ("lvl_embed.weight",),
    "bit_embed.weight": ("word_embed.weight",),
    "bit_embed.bias": ("word_embed.bias",),
    "ada_proj.weight": ("shared_ada_lin.1.weight",),
    "ada_proj.bias": ("shared_ada_lin.1.bias",),
    "head_ada_proj.weight": ("head_nm.ada_lin.1.weight",),
    "head_ada_proj.bias": ("head_nm.ada_lin.1.bias",),
    "head_proj.weight": ("head.weight",),
    "head_proj.bias": ("head.bias",),
}
_IN_BLOCK = {
    "ada_offset": ("ada_gss",),
    "self_attn.qkv.weight": ("sa.mat_qkv.weight",),
    "self_attn.qkv.bias": ("sa.q_bias", "sa.zero_k_bias", "sa.v_bias"),
    "self_attn.q_log_scale": ("sa.scale_mul_1H11",),
    "self_attn.proj.weight": ("sa.proj.weight",),
    "self_attn.proj.bias": ("sa.proj.bias",),
    "cross_norm.weight": ("ca_norm.weight",),
    "cross_norm.bias": ("ca_norm.bias",),
    "cross_attn.q.weight": ("ca.mat_q.weight",),
    "cross_attn.q.bias": ("ca.mat_q.bias",),
    "cross_attn.kv.weight": ("ca.mat_kv.weight",),
    "cross_attn.kv.bias": ("ca.zero_k_bias", "ca.v_bias"),
    "cross_attn.proj.weight": ("ca.proj.weight",),
    "cross_attn.proj.bias": ("ca.proj.bias",),
    "ffn.fc1.weight": ("ffn.fc1.weight",),
    "ffn.fc1.bias": ("ffn.fc1.bias",),
    "ffn.fc2.weight": ("ffn.fc2.weight",),
    "ffn.fc2.bias": ("ffn.fc2.bias",),
}
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
# in official files without being weights: derived tables and masks
_IGNORED = re.compile(
    r"(.*\.)?(lvl_1L|attn_bias_for_masking|Infinity_visible_kvlen|Infinity_invisible_qlen"
    r"|quantizer?\.lfq\.mask|quantize\.lfq\.mask)$"
)

# in order of preference; other frameworks' indexes may lie beside them
_SHARD_INDEXES = ("*.safetensors.index.json", "*.bin.index.json", "*.pth.index.json")

NameMap = dict[str, tuple[str, ...]]


def block_name(config: InfinityConfig, block: int) -> str:
    """The official name of a block."""
    chunk_size = config.depth // config.num_chunks
    return f"block_chunks.{block // chunk_size}.module.{block % chunk_size}"


def transformer_names(config: InfinityConfig, present: Collection[str] = ()) -> NameMap:
    """Our tensor names and the official ones that each is made of.

    Checkpoints trained in a single chunk say ``blocks.{i}``: that spelling is taken where
    ``present`` holds it.
    """
    is_flat = any(name.startswith("blocks.") for name in present)
    names = dict(_OUTSIDE_BLOCKS)
    for i in range(config.depth):
        official = f"blocks.{i}" if is_flat else block_name(config, i)
        for ours, parts in _IN_BLOCK.items():
            names[f"blocks.{i}.{ours}"] = tuple(f"{official}.{part}" for part in parts)
    return names


def vae_names(model: VAE, present: Collection[str] = ()) -> NameMap:
    """Our VAE tensor names and the official ones.

    Older files leave out the wrapper (``conv_in.weight`` for ``conv_in.conv.weight``): that
    spelling is taken where ``present`` holds it.
    """
    last = len(model.config.channel_mult) - 1
    names: NameMap = {}
    for ours in model.state_dict():
        official = _official_vae_name(ours, last)
        plain = re.sub(r"\.(conv|norm)\.(weight|bias)$", r".\2", official)
        is_plain = official not in present and plain in present
        names[ours] = (plain if is_plain else official,)
    return names


def _official_vae_name(name: str, last: int) -> str:
    side = name.split(".", 1)[0]
    stage, step = ("down", "downsample") if side == "encoder" else ("up", "upsample")
    found = re.search(r"resolutions\.(\d+)", name)
    if found:
        index = int(found[1]) if side == "encoder" else last - int(found[1])
        name = name.replace(found[0], f"{stage}.{index}")
    name = re.sub(r"\.blocks\.", ".block.", name)
    name = re.sub(r"\.mid\.(\d)\.", lambda m: f".mid.block_{int(m[1]) + 1}.", name)
    name = name.replace(".step.conv.", f".{step}.conv.").replace(".shortcut.", ".nin_shortcut.")
    wrapper = "norm" if re.search(r"\.norm(1|2|_out)\.", name) else "conv"
    return re.sub(r"\.(weight|bias)$", rf".{wrapper}.\1", name)


# --- reading files -------------------------------------------------------------------------------


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
        content = _load_torch_zip(path)
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
        if stored.is_meta or stored.layout != torch.strided:
            raise CheckpointError(f"{self.where}: {name} is a tensor without plain data")
        if stored.dtype == dtype:
            return stored
        converted = stored.to(dtype)
        _unmap_pages(stored)
        return converted


def _load_torch_zip(path: Path) -> object:
    with path.open("rb") as file:
        head = file.read(16)
    if head.startswith(b"version https://"):
        raise CheckpointError(f"{path}: a git-lfs pointer, not the weights; run `git lfs pull`")
    if not head.startswith(b"PK"):
        raise CheckpointError(
            f"{path}: not a checkpoint that torch.save writes (it begins with {head[:8]!r}); "
            "download it again, or re-save it with torch 1.6 or later"
        )
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
    return (str(error).splitlines() or [type(error).__name__])[0]


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


# --- assigning -----------------------------------------------------------------------------------


def load_official_transformer(
    model: Infinity, path: str | Path, *, device: torch.device | str = "cpu"
) -> None:
    """Fill a transformer that was built on the meta device from an official checkpoint."""
    source = official_transformer(path)
    assign(model, source, transformer_names(model.config, source.names()), device)


def load_official_vae(model: VAE, path: str | Path, *, device: torch.device | str = "cpu") -> None:
    """Fill a VAE that was built on the meta device from an official checkpoint."""
    source = official_vae(path)
    assign(model, source, vae_names(model, source.names()), device)


def load_own(model: nn.Module, path: str | Path, *, device: torch.device | str = "cpu") -> None:
    """Fill a model that was built on the meta device from tensors that carry our own names."""
    assign(model, open_tensors(path), {name: (name,) for name in model.state_dict()}, device)


def official_transformer(path: str | Path) -> TensorSource:
    """A state dict, or a training checkpoint that holds one under ``["trainer"]["gpt_fsdp"]``."""
    return open_tensors(path, sub_keys=(("trainer", "gpt_fsdp"),))


def official_vae(path: str | Path) -> TensorSource:
    """A state dict, or a checkpoint that holds one under ``["vae"]``, as the published ones do."""
    return open_tensors(path, sub_keys=(("vae",),))


def assign(
    model: nn.Module, source: TensorSource, names: NameMap, device: torch.device | str
) -> None:
    """Fill every tensor of ``model`` (on the meta device) from ``source``.

    Floating tensors are cast to the dtype that the model's own tensor has; one that has it already
    stays mapped to its file, so that loading costs no memory of its own.
    Raises: CheckpointError for missing, left-over or mis-shaped tensors.
    """
    expected = model.state_dict()
    state = {name: tensor.to(device) for name, tensor in mapped_tensors(expected, source, names)}
    model.load_state_dict(state, strict=True, assign=True)
    model.requires_grad_(False).eval()


def mapped_tensors(
    expected: Mapping[str, Tensor], source: TensorSource, names: NameMap
) -> Iterator[tuple[str, Tensor]]:
    """Our tensors one by one, in the dtypes of ``expected``, on the CPU.

    Raises: CheckpointError, before the first tensor, when any is missing, left over or mis-shaped.
    """
    present = source.names()
    wanted = {part for parts in names.values() for part in parts}
    missing = {name for name in wanted - present if not name.endswith("zero_k_bias")}
    foreign = {name for name in present - wanted if not _IGNORED.match(name)}
    if missing or foreign:
        raise CheckpointError(_mismatch(source.where, missing, foreign))
    for ours, parts in names.items():
        for part in parts:
            if part in present:
                _check_part(source, part, _part_shape(expected[ours], parts))
    for ours, parts in names.items():
        yield ours, _read_parts(source, present, parts, expected[ours])


def _mismatch(where: str, missing: set[str], foreign: set[str]) -> str:
    parts = []
    for kind, names in (("lacks", missing), ("has unknown", foreign)):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
            parts.append(f"{kind} {len(names)} tensors ({shown})")
    return f"{where}: {' and '.join(parts)}; is it a checkpoint of this model size?"


def _part_shape(target: Tensor, parts: tuple[str, ...]) -> tuple[int, ...]:
    return (target.shape[0] // len(parts), *target.shape[1:])


def _check_part(source: TensorSource, part: str, needed: tuple[int, ...]) -> None:
    info = source.info(part)
    if not info.dtype.startswith(("float", "bfloat")):
        raise CheckpointError(
            f"{source.where}: {part} is {info.dtype}, expected a floating dtype; "
            "was it quantized by another tool?"
        )
    if info.shape == needed:
        return
    if part.endswith("scale_mul_1H11") and math.prod(info.shape) == math.prod(needed):
        return
    if part == "cfg_uncond" and info.shape[1:] == needed[1:] and info.shape[0] > needed[0]:
        return
    raise CheckpointError(
        f"{source.where}: {part} has shape {list(info.shape)}, the model needs {list(needed)}; "
        "is it a checkpoint of this model size?"
    )


def _read_parts(
    source: TensorSource, present: set[str], parts: tuple[str, ...], target: Tensor
) -> Tensor:
    shape = _part_shape(target, parts)
    values = []
    for part in parts:
        if part not in present:
            values.append(torch.zeros(shape, dtype=target.dtype))
            continue
        value = source.read(part, target.dtype)
        if part == "cfg_uncond":
            value = value[: shape[0]]
        values.append(value.reshape(shape))
    return values[0] if len(values) == 1 else torch.cat(values)


def to_official(state: Mapping[str, Tensor], names: NameMap) -> Iterator[tuple[str, Tensor]]:
    """Our tensors under their official names, fused ones split again."""
    for ours, parts in names.items():
        yield from zip(parts, state[ours].chunk(len(parts)), strict=True)
