"""What a file or folder is: recognised by its tensors' names and shapes, sized by part."""

from __future__ import annotations

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from var_compressor.models import directory
from var_compressor.models.config import MODELS
from var_compressor.models.tensor_files import CheckpointError, TensorInfo, open_tensors

Infos = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Part:
    """Tensors that belong together."""

    name: str
    num_tensors: int
    num_parameters: int
    num_bytes: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class File:
    """``sha256`` is None unless hashes were asked for."""

    name: str
    num_bytes: int
    sha256: str | None


@dataclass(frozen=True)
class Inspection:
    """What ``varc inspect`` found; ``description`` is one line for a person."""

    path: str
    kind: str
    description: str
    parts: tuple[Part, ...]
    files: tuple[File, ...]
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect_path(path: str | Path, *, with_hashes: bool) -> Inspection:
    """Look at a checkpoint, a folder of shards, a model directory or a T5 folder.

    The name of an embedded model stands for its directory. Only names, shapes and dtypes are read,
    unless ``with_hashes``.
    Raises: CheckpointError when it is none of these, or damaged.
    """
    path = Path(path).expanduser()
    if str(path) in directory.EMBEDDED and not path.exists():
        path = directory.resolve(path)
    if (path / directory.MODEL_INDEX).is_file():
        return _inspect_model_directory(path, with_hashes=with_hashes)
    return _inspect_tensors(path, with_hashes=with_hashes)


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def weight_hashes(folder: str | Path) -> dict[str, str]:
    """sha256 of every safetensors file below a directory, by relative path."""
    folder = Path(folder)
    return {
        str(file.relative_to(folder)): sha256_of(file)
        for file in sorted(folder.rglob("*.safetensors"))
    }


# --- the kinds -----------------------------------------------------------------------------------


def _inspect_tensors(path: Path, *, with_hashes: bool) -> Inspection:
    source = open_tensors(path, sub_keys=(("trainer", "gpt_fsdp"), ("vae",)))
    infos = {name: source.info(name) for name in sorted(source.names())}
    kind = _kind(infos)
    if kind is None:
        some = ", ".join(sorted(infos)[:3]) or "none"
        raise CheckpointError(
            f"{path}: {len(infos)} tensors of no model known here ({some}, …); expected an "
            "Infinity transformer, its VAE or a T5 encoder"
        )
    root = path if path.is_dir() else path.parent
    return Inspection(
        str(path),
        kind.name,
        kind.describe(infos),
        parts_of(infos, kind.part_of),
        tuple(_file(file, root, with_hashes=with_hashes) for file in source.files),
    )


def _inspect_model_directory(path: Path, *, with_hashes: bool) -> Inspection:
    index = directory.read_index(path)
    parts, descriptions = [], []
    present = ["transformer", *(["vae"] if index.has_vae else [])]
    if index.text_encoder == "":
        present.append("text_encoder")
    for name in present:
        inner = _inspect_tensors(path / name, with_hashes=False)
        descriptions.append(inner.description)
        parts += [Part(**{**vars(part), "name": f"{name}: {part.name}"}) for part in inner.parts]
    if index.text_encoder:
        descriptions.append(f"text encoder elsewhere: {index.text_encoder}")
    description = "model directory: " + "; ".join(descriptions)
    files = list_files(path, with_hashes=with_hashes)
    return Inspection(
        str(path), "model-directory", description, tuple(parts), files, index.provenance
    )


def list_files(root: Path, *, with_hashes: bool) -> tuple[File, ...]:
    """Every file below ``root``."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return tuple(_file(path, root, with_hashes=with_hashes) for path in files)


def _file(path: Path, root: Path, *, with_hashes: bool) -> File:
    digest = sha256_of(path) if with_hashes else None
    return File(str(path.relative_to(root)), path.stat().st_size, digest)


def parts_of(infos: Infos, part_of: Callable[[str], str]) -> tuple[Part, ...]:
    """Sizes of all tensors, grouped by what ``part_of`` calls them."""
    groups: dict[str, list[TensorInfo]] = defaultdict(list)
    for name in sorted(infos):
        groups[part_of(name)].append(infos[name])
    return tuple(
        Part(
            name,
            len(group),
            sum(math.prod(info.shape) for info in group),
            sum(math.prod(info.shape) * _item_bytes(info.dtype) for info in group),
            tuple(sorted({info.dtype for info in group})),
        )
        for name, group in groups.items()
    )


def _item_bytes(dtype: str) -> int:
    known = getattr(torch, dtype, None)
    return known.itemsize if isinstance(known, torch.dtype) else 1


# --- recognising ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    """A sort of checkpoint: which tensors give it away, what it is, which part a tensor is of."""

    name: str
    signs: tuple[str, ...]
    describe: Callable[[Infos], str]
    part_of: Callable[[str], str]


def _kind(infos: Infos) -> _Kind | None:
    for kind in _KINDS:
        if all(sign in infos for sign in kind.signs):
            return kind
    return None


def _describe_transformer(infos: Infos) -> str:
    is_official = "word_embed.weight" in infos
    bit_embed = infos["word_embed.weight" if is_official else "bit_embed.weight"].shape
    text = infos["cfg_uncond" if is_official else "uncond_text"].shape
    scales = [name for name in infos if name.endswith(("scale_mul_1H11", "q_log_scale"))]
    heads = math.prod(infos[scales[0]].shape) if scales else 0
    facts = (len(scales), bit_embed[0], heads, bit_embed[-1], text[-1])
    spelled = "official names" if is_official else "our names"
    for name, model in MODELS.items():
        config = model.transformer
        if facts == (
            config.depth,
            config.embed_dim,
            config.num_heads,
            config.bits_per_token,
            config.text_channels,
        ):
            return f"{name} transformer, {spelled}"
    depth, width, heads, num_bits, _ = facts
    return (
        f"Infinity transformer of no known size (depth {depth}, width {width}, {heads} heads, "
        f"{num_bits} bits per token), {spelled}"
    )


def _describe_vae(infos: Infos) -> str:
    ours = any(".resolutions." in name for name in infos)
    conv = next(n for n in ("decoder.conv_in.conv.weight", "decoder.conv_in.weight") if n in infos)
    code_dim = infos[conv].shape[1]
    stages = {
        found[1]
        for name in infos
        if (found := re.match(r"encoder\.(?:down|resolutions)\.(\d+)", name))
    }
    stride = 2 ** (len(stages) - 1) if stages else 0
    users = [
        name for name, m in MODELS.items() if (m.vae.code_dim, m.vae.stride) == (code_dim, stride)
    ]
    used = f" as for {', '.join(users)}" if users else ""
    spelled = "our names" if ours else "official names"
    return f"VAE, {code_dim} code channels, stride {stride}{used}, {spelled}"


def _describe_t5(infos: Infos) -> str:
    blocks = {n.split(".")[2] for n in infos if n.startswith("encoder.block.")}
    width = infos["encoder.final_layer_norm.weight"].shape[0]
    return f"T5 text encoder, {len(blocks)} blocks, {width} channels"


def _transformer_part(name: str) -> str:
    if not name.startswith(("blocks.", "block_chunks.")):
        return "outside the blocks"
    for part, marks in (
        ("self-attention", (".sa.", ".self_attn.")),
        ("cross-attention", (".ca.", ".cross_attn.")),
        ("feed-forward", (".ffn.",)),
    ):
        if any(mark in name for mark in marks):
            return part
    return "norms and modulation"


def _first_word(name: str) -> str:
    return name.split(".", 1)[0]


_KINDS = (
    _Kind(
        "official-transformer",
        ("pos_start", "word_embed.weight", "cfg_uncond"),
        _describe_transformer,
        _transformer_part,
    ),
    _Kind(
        "transformer",
        ("start_position", "bit_embed.weight", "uncond_text"),
        _describe_transformer,
        _transformer_part,
    ),
    _Kind(
        "official-vae",
        ("decoder.conv_in.conv.weight", "encoder.conv_in.conv.weight"),
        _describe_vae,
        _first_word,
    ),
    _Kind("vae", ("decoder.conv_in.weight", "encoder.conv_in.weight"), _describe_vae, _first_word),
    _Kind(
        "text-encoder",
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.final_layer_norm.weight"),
        _describe_t5,
        _first_word,
    ),
)


def to_text(inspection: Inspection) -> str:
    """The findings for a person."""
    lines = [f"{inspection.path}: {inspection.description}"]
    width = max((len(part.name) for part in inspection.parts), default=0)
    for part in inspection.parts:
        lines.append(
            f"  {part.name:<{width}}  {part.num_parameters:>15,} parameters  "
            f"{_human(part.num_bytes):>10}  {', '.join(part.dtypes)}"
        )
    total = sum(part.num_parameters for part in inspection.parts)
    total_bytes = sum(part.num_bytes for part in inspection.parts)
    lines.append(f"  {'total':<{width}}  {total:>15,} parameters  {_human(total_bytes):>10}")
    lines.append("files")
    for file in inspection.files:
        digest = f"  sha256 {file.sha256}" if file.sha256 else ""
        lines.append(f"  {_human(file.num_bytes):>10}  {file.name}{digest}")
    if inspection.provenance:
        lines.append("provenance")
        lines += [f"  {key}: {value}" for key, value in inspection.provenance.items()]
    return "\n".join(lines)


def _human(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{num_bytes} B" if unit == "B" else f"{size:.1f} {unit}"
