"""Official checkpoints to our names, by an explicit map, strictly.

Reads the published ``.pth`` files, Hugging Face shard folders and safetensors; never more than one
copy of the weights is held: the module is built on the meta device, tensors are read one by one,
converted and assigned.

Source: tensor names of the published Infinity checkpoints (github.com/FoundationVision/Infinity).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from var_compressor.models.config import InfinityConfig
from var_compressor.models.tensor_files import (
    CheckpointError,
    OnTensor,
    TensorSource,
    check_zip,
    open_tensors,
)
from var_compressor.models.transformer import Infinity
from var_compressor.models.vae import VAE

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
# in official files without being weights: derived tables and masks
DERIVED = re.compile(
    r"(.*\.)?(lvl_1L|attn_bias_for_masking|Infinity_visible_kvlen|Infinity_invisible_qlen"
    r"|quantizer?\.lfq\.mask|quantize\.lfq\.mask)$"
)

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


def load_own(
    model: nn.Module,
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    on_tensor: OnTensor | None = None,
) -> None:
    """Fill a model that was built on the meta device from tensors that carry our own names."""
    names: NameMap = {name: (name,) for name in model.state_dict()}
    assign(model, open_tensors(path), names, device, on_tensor)


def official_transformer(path: str | Path) -> TensorSource:
    """A state dict, or a training checkpoint that holds one under ``["trainer"]["gpt_fsdp"]``."""
    return undamaged(open_tensors(path, sub_keys=(("trainer", "gpt_fsdp"),)))


def official_vae(path: str | Path) -> TensorSource:
    """A state dict, or a checkpoint that holds one under ``["vae"]``, as the published ones do."""
    return undamaged(open_tensors(path, sub_keys=(("vae",),)))


def undamaged(source: TensorSource) -> TensorSource:
    """The source, its files' checksums compared; safetensors have none."""
    for file in source.files:
        # one that is gone is told of when it is read
        if file.suffix != ".safetensors" and file.is_file():
            check_zip(file)
    return source


def assign(
    model: nn.Module,
    source: TensorSource,
    names: NameMap,
    device: torch.device | str,
    on_tensor: OnTensor | None = None,
) -> None:
    """Fill every tensor of ``model`` (on the meta device) from ``source``.

    ``on_tensor`` hears of each: its name and bytes.

    Floating tensors are cast to the dtype that the model's own tensor has; one that has it already
    stays mapped to its file, so that loading costs no memory of its own.
    Raises: CheckpointError for missing, left-over or mis-shaped tensors.
    """
    expected = model.state_dict()
    state = {}
    for name, tensor in mapped_tensors(expected, source, names):
        state[name] = tensor.to(device)
        if on_tensor is not None:
            on_tensor(name, tensor.nbytes)
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
    foreign = {name for name in present - wanted if not DERIVED.match(name)}
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
