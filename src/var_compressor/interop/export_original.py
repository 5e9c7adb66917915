"""From an artifact of ours to the original's `.pt` files; what it cannot say is left in a recipe.

The original has one branch for q, k and v of cross-attention. Ours are two, of different inputs:
they go beside each other into one of twice the rank, and all others are filled up to it, because
the original reads one rank for all. The import takes them apart again.

Shapes: N output and K input channels, R rank.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from var_compressor.artifact import (
    KV_FILE,
    Manifest,
    artifact_folder,
    read_manifest,
    read_tensors,
    verify_files,
)
from var_compressor.interop import kv_quant_calib
from var_compressor.interop.original import (
    BRANCH,
    KEY_BIASES,
    MODEL,
    PLACES,
    RECIPE,
    SCALE,
    SMOOTH,
    TWINS,
    patched_names,
)
from var_compressor.layers.kv_params import CacheFormat, params_from_tensors
from var_compressor.layers.linear import QuantizedLinear, load_compressed
from var_compressor.layers.nunchaku_linear import plain_bias
from var_compressor.models.checkpoint import block_name, to_official
from var_compressor.models.config import InfinityConfig
from var_compressor.models.new_directory import new_directory
from var_compressor.models.transformer import Infinity

Branch = tuple[Tensor, Tensor]
_KEY_BIAS = ".ca.zero_k_bias"


@dataclass(frozen=True)
class Exported:
    """The files that were written, and what of the artifact found no place in them."""

    files: tuple[str, ...]
    notes: tuple[str, ...]


def export_original(folder: Path, out: Path, *, dtype: torch.dtype) -> Exported:
    """Write model.pt, scale.pt, smooth.pt, branch.pt, perhaps kv_quant_calib.pt, and recipe.yaml.

    ``dtype`` of the blocks' tensors in model.pt; the original's 2B has float32. An import gives
    back the artifact's codes, scales, factors and branches, bit by bit.
    Raises: ValueError for a directory that is no artifact, or an ``out`` that is not empty.
    """
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    model = load_compressed(folder, manifest, dtype=torch.float32, device="cpu")
    rank = _joint_rank(model)
    notes = [
        f"its branches have rank {rank}: set the original's low-rank rank to that",
        f"how inputs are read stands in {RECIPE}: the original reads them signed, 4 bits",
    ]
    with new_directory(out, overwrite=False) as target:
        torch.save(dict(_model_tensors(model, dtype)), target / MODEL)
        torch.save(dict(_scales(model)), target / SCALE)
        torch.save(dict(_factors(model)), target / SMOOTH)
        torch.save(dict(_branches(model, rank)), target / BRANCH)
        settings = {"quant": manifest.spec}
        (target / RECIPE).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        if key_biases := _key_biases(model):
            save_file(key_biases, target / KEY_BIASES)
            # safetensors makes files that nobody else may read
            shutil.copymode(target / RECIPE, target / KEY_BIASES)
            notes.append(
                f"{KEY_BIASES} has the biases of cross-attention's keys, which cancel in the "
                "softmax: the original has none"
            )
        if manifest.kv is not None:
            notes += _write_kv(folder, manifest, model.config, target)
        files = tuple(sorted(os.listdir(target)))
    return Exported(files, tuple(notes))


def _write_kv(
    folder: Path, manifest: Manifest, config: InfinityConfig, target: Path
) -> Iterator[str]:
    assert manifest.kv is not None
    format = CacheFormat.of(manifest.kv, f"{folder}: ")
    file = artifact_folder(folder) / KV_FILE
    params = params_from_tensors(read_tensors(file, "cpu"), format, config, str(file))
    try:
        kv_quant_calib.write_params(target / kv_quant_calib.FILE, params, config, manifest.kv)
    except ValueError as error:
        yield f"without the KV cache: {error}"


def _linears(model: Infinity) -> Iterator[tuple[str, int, str, QuantizedLinear]]:
    """(official block name, block index, our name in it, linear) of every quantized linear."""
    for index, block in enumerate(model.blocks):
        for name in PLACES:
            linear = block.get_submodule(name)
            if isinstance(linear, QuantizedLinear):
                yield block_name(model.config, index), index, name, linear


def _model_tensors(model: Infinity, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    names = patched_names(model.config)
    state = dict(model.state_dict())
    for _, index, name, linear in _linears(model):
        state[f"blocks.{index}.{name}.weight"] = linear.residual()
        state[f"blocks.{index}.{name}.bias"] = plain_bias(linear).float()
    for theirs, tensor in to_official(state, names):
        in_block = theirs.startswith("block_chunks.")
        if in_block and theirs.endswith(_KEY_BIAS):
            continue
        # cloned: a view would bring the whole fused tensor along
        tensor = tensor.to(dtype if in_block else torch.float32).clone()
        yield theirs, tensor
        for twin, kept in TWINS.items():
            if in_block and f".{kept}." in theirs:
                yield theirs.replace(f".{kept}.", f".{twin}."), tensor


def _key_biases(model: Infinity) -> dict[str, Tensor]:
    """Of cross-attention, where any is there; constant over the keys, it cancels in the softmax."""
    names, state, found = patched_names(model.config), model.state_dict(), {}
    for index in range(model.config.depth):
        ours = f"blocks.{index}.cross_attn.kv.bias"
        found[names[ours][0]] = state[ours].float().chunk(2)[0].clone()
    return found if any(bool(one.any()) for one in found.values()) else {}


def _scales(model: Infinity) -> Iterator[tuple[str, Tensor]]:
    for block, _, name, linear in _linears(model):
        parts = PLACES[name].parts
        for part, scales_NG in zip(parts, linear.wscales.float().chunk(len(parts)), strict=True):
            key = f"{block}.{part}.weight"
            scales = scales_NG[:, None, :, None].clone()
            if linear.wtscale is None:
                yield f"{key}.scale.0", scales
            else:
                yield f"{key}.scale.0", linear.wtscale.float().reshape(1, 1, 1, 1)
                yield f"{key}.scale.1", scales
            yield f"{key}.zero", torch.tensor(0.0)


def _factors(model: Infinity) -> Iterator[tuple[str, Tensor]]:
    for block, _, name, linear in _linears(model):
        yield f"{block}.{PLACES[name].smooth}", linear.smooth_factor.float()


# --- branches -------------------------------------------------------------------------------------


def _cross_branches(model: Infinity, index: int) -> tuple[Branch, Branch]:
    """Of cross-attention's queries, and of its keys and values; rank 0 for one that has none."""
    K = model.config.embed_dim
    return (
        _branch_of(model.blocks[index].get_submodule("cross_attn.q"), (K, K)),
        _branch_of(model.blocks[index].get_submodule("cross_attn.kv"), (2 * K, K)),
    )


def _branch_of(linear: nn.Module, shape: tuple[int, int]) -> Branch:
    if isinstance(linear, QuantizedLinear):
        return linear.proj_down.float(), linear.proj_up.float()
    return torch.zeros(0, shape[1]), torch.zeros(shape[0], 0)


def _joint_rank(model: Infinity) -> int:
    """The even rank of all branches: twice the largest that cross-attention has, or more."""
    ranks = [len(linear.proj_down) for _, _, _, linear in _linears(model)]
    cross = [
        2 * max(len(down_RK) for down_RK, _ in _cross_branches(model, index))
        for index in range(model.config.depth)
    ]
    largest = max([0, *ranks, *cross])
    return largest + largest % 2


def _branches(model: Infinity, rank: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for block, _, name, linear in _linears(model):
        place = PLACES[name]
        if place.branch != "ca.to_q" and len(linear.proj_down):
            branch = (linear.proj_down.float(), linear.proj_up.float())
            yield f"{block}.{place.branch}", _filled(branch, rank)
    for index in range(model.config.depth):
        (q_down, q_up), (kv_down, kv_up) = _cross_branches(model, index)
        if len(q_down) or len(kv_down):
            half = rank // 2
            q, kv = _filled((q_down, q_up), half), _filled((kv_down, kv_up), half)
            down_RK = torch.cat([q["a.weight"], kv["a.weight"]])
            up_NR = torch.block_diag(q["b.weight"], kv["b.weight"])
            key = f"{block_name(model.config, index)}.ca.to_q"
            yield key, _filled((down_RK, up_NR), rank)


def _filled(branch: Branch, rank: int) -> dict[str, Any]:
    """With ranks that add nothing."""
    down_RK, up_NR = branch
    missing = rank - len(down_RK)
    return {"a.weight": F.pad(down_RK, (0, 0, 0, missing)), "b.weight": F.pad(up_NR, (0, missing))}
